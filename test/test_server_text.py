"""Tokens to text: whole characters, stop strings, thoughts; the same however the pieces are cut."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bindings")]

pytest.importorskip("fastapi")
from llaisys.server.text import Detokenizer, Reasoning, StopStrings, TokenTable
from llaisys.tokenizer import Tokenizer

MINI = ROOT / "models" / "refrain-mini"
TABLE = TokenTable(Tokenizer(MINI))


def cut(data, items):
    """Cuts a sequence into pieces at places that hypothesis draws."""
    at = sorted(data.draw(st.lists(st.integers(0, len(items)), max_size=8)))
    return [items[a:b] for a, b in zip([0, *at], [*at, len(items)], strict=True)]


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.data())
def test_text_comes_back(text, data):
    ids = TABLE.tokenizer.encode(text, add_special_tokens=False)
    expected = TABLE.tokenizer.decode(ids, skip_special_tokens=True)
    assert expected == text or "<|" in text
    stream = Detokenizer(TABLE)
    pieces = [stream.push(piece) for piece in cut(data, ids)]
    assert "".join(pieces) + stream.finish() == expected
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2047)), st.data())
def test_any_tokens(ids, data):
    """Bytes that are no UTF-8 are U+FFFD, but what is only unfinished at the end is left out."""
    expected = TABLE.tokenizer.decode(ids, skip_special_tokens=True)
    stream = Detokenizer(TABLE)
    text = "".join([stream.push(piece) for piece in cut(data, ids)]) + stream.finish()
    assert expected.startswith(text)
    assert set(expected[len(text) :]) <= {"\ufffd"}


def test_unfinished_character_waits():
    ids = TABLE.tokenizer.encode("a👍", add_special_tokens=False)
    assert len(ids) == 5  # four bytes
    stream = Detokenizer(TABLE)
    assert [stream.push([token]) for token in ids] == ["a", "", "", "", "👍"]
    stream = Detokenizer(TABLE)
    assert stream.push(ids[:-1]) + stream.finish() == "a"


def plain_stop(text, stops):
    """The obvious way: letter by letter."""
    for end in range(len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


letters = st.text("ab", max_size=30)


@settings(max_examples=500)
@given(letters, st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4), st.data())
def test_stop_strings(text, stops, data):
    expected, is_found = plain_stop(text, stops)
    stream = StopStrings(stops)
    sent, seen = "", ""
    for piece in cut(data, text):
        seen += piece
        sent += stream.push(piece)
        assert expected.startswith(sent)  # nothing of a stop string leaks
        # and nothing is late: what is held back may begin a stop string
        if stream.matched is None:
            held = seen[len(sent) :]
            assert not held or any(s.startswith(held) and s != held for s in stops)
        else:
            break
    if stream.matched is None:
        sent += stream.finish()
    assert sent == expected
    assert (stream.matched is not None) == is_found


def test_no_stop_strings():
    stream = StopStrings([])
    assert stream.push("abc") == "abc"
    assert stream.finish() == ""


THOUGHT = [
    (False, "Hello", "", "Hello"),
    (False, "<think>\nhm\n</think>\n\nHello", "hm", "Hello"),
    (False, "  <think>a</think>b", "a", "b"),
    (False, "<th", "", "<th"),
    (False, "<thinking>", "", "<thinking>"),
    (False, "say <think>x</think>", "", "say <think>x</think>"),
    (True, "hm\n</think>\n\nHello <think>", "hm", "Hello <think>"),
    (True, "never ends ", "never ends ", ""),
    (True, "</think>Hi", "", "Hi"),
    (True, "a </thin b</think>\nc\n", "a </thin b", "c\n"),
]


@settings(max_examples=20)
@given(st.data())
@pytest.mark.parametrize(("is_inside", "text", "thoughts", "answer"), THOUGHT)
def test_thoughts(is_inside, text, thoughts, answer, data):
    stream = Reasoning(is_inside)
    pieces = [stream.push(piece) for piece in cut(data, text)] + [stream.finish()]
    assert ("".join(p[0] for p in pieces), "".join(p[1] for p in pieces)) == (thoughts, answer)


@given(st.text(alphabet="<>/think \n", max_size=60), st.booleans(), st.data())
def test_thoughts_do_not_depend_on_cuts(text, is_inside, data):
    whole, stream = Reasoning(is_inside), Reasoning(is_inside)
    once = [whole.push(text), whole.finish()]
    pieces = [stream.push(piece) for piece in cut(data, text)] + [stream.finish()]
    for i in range(2):
        assert "".join(p[i] for p in pieces) == "".join(p[i] for p in once)
