"""Tools: how a model is told of them, and how its calls are found in its answer.

Calls have the form that Qwen's and Hermes' models are trained on:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>

A chat template that knows it is given the tools. For any other, the tools are described in the
system message in the same words, and past calls and their results are written out as text.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from .text import held

__all__ = ["CLOSE", "OPEN", "CallParser", "describe", "is_native", "merge"]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
PROMPT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
%s
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""

Delta = dict[str, Any]  # of tool_calls, in a stream


def is_native(template: str) -> bool:
    """Whether a chat template takes tools and has calls in this form."""
    return OPEN in template and re.search(r"\btools\b", template) is not None


def describe(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Messages for a template that knows no tools."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        entry = {k: v for k, v in message.items() if k not in ("tool_calls", "tool_call_id")}
        calls = [_spell(call["function"]) for call in message.get("tool_calls") or ()]
        if calls:
            entry["content"] = "\n".join([entry.get("content") or "", *calls]).lstrip("\n")
        if message["role"] == "tool":
            text = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
            entry = {"role": "user", "content": text}
            if plain and plain[-1].get("content", "").endswith("</tool_response>"):
                plain[-1]["content"] += "\n" + text  # templates want roles to take turns
                continue
        plain.append(entry)
    if tools:
        prompt = PROMPT % "\n".join([json.dumps(tool, ensure_ascii=False) for tool in tools])
        if plain[0]["role"] == "system":
            plain[0]["content"] = f"{plain[0].get('content') or ''}\n\n{prompt}"
        else:
            plain.insert(0, {"role": "system", "content": prompt})
    return plain


def _spell(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": function.get("arguments", {})}
    return f"{OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{CLOSE}"


class CallParser:
    """Parts an answer's text, piece by piece, into content and calls.

    The arguments of a call are passed on as they come, in the text that the model wrote. What looks
    like a call but is none stays content.
    """

    def __init__(self) -> None:
        self.count = 0  # of calls so far
        self._state = "text"  # "head": behind the opening tag; "arguments"; "tail": behind them
        self._kept = ""
        self._depth = 0  # of braces and brackets in the arguments
        self._is_string = self._is_escaped = False

    def push(self, text: str) -> tuple[str, list[Delta]]:
        """The content and the pieces of calls that are certain by now."""
        content, deltas = "", []
        self._kept += text
        while True:
            before = len(self._kept), self._state
            step = getattr(self, f"_{self._state}")
            more, found = step()
            content += more
            deltas += found
            if (len(self._kept), self._state) == before or not self._kept:
                return content, deltas

    def finish(self) -> tuple[str, list[Delta]]:
        """What was held back, once the answer has ended."""
        kept, self._kept = self._kept, ""
        if self._state == "head":
            found = self._whole(kept)
            return (OPEN + kept, []) if found is None else ("", found)
        if self._state == "text":
            return ("" if self.count else kept), []
        return "", []

    # ---- states ----

    def _text(self) -> tuple[str, list[Delta]]:
        text, tag, rest = self._kept.partition(OPEN)
        bare = text.rstrip()
        if tag:
            self._kept, self._state = rest, "head"
            return bare, []
        size = held(self._kept, (OPEN,))
        bare = self._kept[: len(self._kept) - size].rstrip()
        self._kept = self._kept[len(bare) :]  # white space before a call is dropped
        return bare, []

    def _head(self) -> tuple[str, list[Delta]]:
        match = HEAD.match(self._kept)
        if match:
            self._kept, self._state = self._kept[match.end() :], "arguments"
            self._depth, self._is_string, self._is_escaped = 0, False, False
            return "", [self._begin(match[1], "")]
        body, tag, rest = self._kept.partition(CLOSE)
        if not tag:
            return "", []
        self._kept, self._state = rest, "text"
        found = self._whole(body)
        return (OPEN + body + CLOSE, []) if found is None else ("", found)

    def _arguments(self) -> tuple[str, list[Delta]]:
        end = len(self._kept)
        for i, c in enumerate(self._kept):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_string:
                self._is_escaped, self._is_string = c == "\\", c != '"'
            elif c == '"':
                self._is_string = True
            elif c in "{[":
                self._depth += 1
            elif c in "}]":
                self._depth -= 1
                if self._depth == 0:
                    end, self._state = i + 1, "tail"
                    break
        piece, self._kept = self._kept[:end], self._kept[end:]
        if not piece:
            return "", []
        return "", [{"index": self.count - 1, "function": {"arguments": piece}}]

    def _tail(self) -> tuple[str, list[Delta]]:
        _, tag, rest = self._kept.partition(CLOSE)
        if tag:
            self._kept, self._state = rest, "text"
        return "", []

    def _whole(self, body: str) -> list[Delta] | None:
        """A call that is complete, however it is written."""
        try:
            call = json.loads(body)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        if not isinstance(name, str):
            return None
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        return [self._begin(name, text)]

    def _begin(self, name: str, arguments: str) -> Delta:
        self.count += 1
        return {
            "index": self.count - 1,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }


def merge(deltas: Sequence[Delta]) -> list[dict[str, Any]]:
    """The calls that a stream's pieces make up."""
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if "id" in delta:
            call = {key: delta[key] for key in ("id", "type")}
            calls.append(call | {"function": dict(delta["function"])})
        else:
            calls[-1]["function"]["arguments"] += delta["function"]["arguments"]
    return calls
