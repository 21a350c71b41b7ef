"""From tokens to the text of an answer: whole characters, thoughts apart, cut at stop strings.

Everything here works piece by piece, and what comes out does not depend on where the pieces were
cut: a stream joins to the text that is sent in one go.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from ..tokenizer import TextStream, Tokenizer

__all__ = ["Detokenizer", "Reasoning", "StopStrings", "TokenTable", "held"]

THINK, THINK_END = "<think>", "</think>"


class TokenTable:
    """The bytes of each token of a byte-level tokenizer, looked up once; special ones are empty."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}

    def join(self, tokens: Iterable[int]) -> bytes:
        known = self._bytes
        try:
            return b"".join([known[token] for token in tokens])
        except KeyError:
            return b"".join([self._look_up(token) for token in tokens])

    def spelled(self, token: int) -> bytes:
        """The bytes of a token, special or not."""
        return self.tokenizer.token_bytes(token)

    def _look_up(self, token: int) -> bytes:
        found = self._bytes.get(token)
        if found is None:
            special = self.tokenizer.is_special(token)
            found = b"" if special else self.tokenizer.token_bytes(token)
            self._bytes[token] = found
        return found


class Detokenizer:
    """Turns tokens into text, holding bytes back until they form whole characters.

    Bytes that can never become a character are U+FFFD. A character that is still unfinished when
    the answer ends is left out.
    """

    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # A decoder that is not byte-level looks at neighbouring tokens.
        self._stream = None if table.tokenizer.byte_level else TextStream(table.tokenizer)

    def push(self, tokens: Sequence[int]) -> str:
        if self._stream is not None:
            return "".join([self._stream.push(token) for token in tokens])
        return self._utf8.decode(self._table.join(tokens))

    def finish(self) -> str:
        return "" if self._stream is None else self._stream.flush().rstrip("\ufffd")


def held(text: str, words: Iterable[str]) -> int:
    """Length of the longest end of text with which one of the words may begin."""
    longest = 0
    for word in words:
        for size in range(min(len(word) - 1, len(text)), longest, -1):
            if text.endswith(word[:size]):
                longest = size
                break
    return longest


class StopStrings:
    """Passes text on up to the stop string that is complete first, which is left out.

    Text that may be the beginning of a stop string is held back until that is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._kept = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        if not self._stops or not text:
            return text
        if self.matched is not None:
            return ""
        text = self._kept + text
        # the first to end; of those that end together, the longest
        ends = [(at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if ends:
            _, begin, self.matched = min(ends)
            self._kept = ""
            return text[:begin]
        size = held(text[-self._longest :], self._stops)
        self._kept = text[len(text) - size :]
        return text[: len(text) - size]

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        kept, self._kept = self._kept, ""
        return kept


class Reasoning:
    """Parts an answer into thoughts, between <think> and </think>, and what follows them.

    is_inside: the prompt ends in <think>, so that the answer holds only the closing tag. Else
    thoughts are recognized at the answer's beginning alone. Blank lines around thoughts are
    dropped.
    """

    def __init__(self, is_inside: bool) -> None:
        self._state = "inside" if is_inside else "before"
        self._kept = ""
        self._at_start = True  # of thoughts or of the answer: white space is dropped

    def push(self, text: str) -> tuple[str, str]:
        """The thoughts and the answer's text that are certain by now."""
        if self._state == "answer" and not self._at_start:
            return "", text
        thoughts = ""
        text = self._kept + text
        self._kept = ""
        if self._state == "before":
            bare = text.lstrip()
            if len(bare) < len(THINK) and THINK.startswith(bare):
                self._kept = text
                return "", ""
            if not bare.startswith(THINK):
                self._state, self._at_start = "answer", False
                return "", text
            self._state, text = "inside", bare[len(THINK) :]
        if self._state == "inside":
            if self._at_start:
                text = text.lstrip()
                self._at_start = not text
            thoughts, tag, rest = text.partition(THINK_END)
            if not tag:
                # white space before the tag is dropped with it
                size = held(thoughts, (THINK_END,))
                bare = thoughts[: len(thoughts) - size].rstrip()
                self._kept = thoughts[len(bare) :]
                return bare, ""
            thoughts, text = thoughts.rstrip(), rest
            self._state, self._at_start = "answer", True
        text = text.lstrip()
        self._at_start = not text
        return thoughts, text

    def finish(self) -> tuple[str, str]:
        kept, self._kept = self._kept, ""
        return ("", kept) if self._state == "before" else (kept, "")
