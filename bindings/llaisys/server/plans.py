"""From a request's response_format and tools to the grammar that its answer must follow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..tokenizer import Tokenizer
from .errors import ApiError
from .grammar import Plan
from .schema import ChatRequest, GenerationRequest, NamedTool, Tool
from .text import THINK_END
from .tools import CLOSE, OPEN

__all__ = ["make_plan", "tools_of"]

MAX_SCHEMA = 64 << 10  # characters of JSON
MAX_TOOLS_SIZE = 256 << 10  # of all schemas together
# Between JSON's tokens. Bounded, since a weak model may not find its way out of white space.
SPACE = r"[ \t]{1,4}|\n[ \t]{0,24}"
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
KINDS = ("type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const")
TEXT = r"/(.|\n)*/"


def tools_of(request: GenerationRequest) -> list[Tool]:
    """The tools that the answer may call."""
    if not isinstance(request, ChatRequest) or request.tool_choice == "none":
        return []
    tools = request.tools or []
    if isinstance(request.tool_choice, NamedTool):
        name = request.tool_choice.function.name
        tools = [tool for tool in tools if tool.function.name == name]
        if not tools:
            raise ApiError(
                400, f"tool_choice: there is no tool {name[:64]!r} in tools", param="tool_choice"
            )
    elif request.tool_choice == "required" and not tools:
        raise ApiError(400, "tool_choice: required, but there are no tools", param="tool_choice")
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: expected names that differ", param="tools")
    return tools


def make_plan(request: GenerationRequest, tokenizer: Tokenizer, *, thinks: bool) -> Plan | None:
    """None where nothing restricts the answer. thinks: the prompt has opened a think block."""
    tools, rules = tools_of(request), []
    schema = _schema(request)
    if schema is not None:
        rules.append(f"json: {schema}")
    is_auto = bool(tools) and getattr(request, "tool_choice", None) in (None, "auto")
    is_parallel = getattr(request, "parallel_tool_calls", None) is not False
    if not tools:
        if schema is None:
            return None
        return _behind_thoughts("json", rules, tokenizer, thinks, "response_format")
    rules += _calls(tools, tokenizer)
    calls = 'call ("\\n" call)*' if is_parallel else "call"
    if not is_auto:
        return _behind_thoughts(calls, rules, tokenizer, thinks, "tools")
    if schema is not None:
        return _behind_thoughts(f"json | {calls}", rules, tokenizer, thinks, "tools")
    opened = _token(OPEN, tokenizer)
    if opened is not None:  # free up to a call, and again behind it
        grammar = "\n".join(["start: inner", *rules])
        return Plan(grammar, "tools", after=opened, repeats=is_parallel)
    rules += [f'opened[lazy]: TEXT "{OPEN}"', "tag: opened inner", "rest: TEXT", f"TEXT: {TEXT}"]
    start = "tag* rest" if is_parallel else "tag | rest"
    return _behind_thoughts(start, rules, tokenizer, thinks, "tools")


def _behind_thoughts(
    start: str, rules: Sequence[str], tokenizer: Tokenizer, thinks: bool, param: str
) -> Plan:
    """The answer proper follows the grammar; thoughts are free."""
    if not thinks:
        return Plan("\n".join([f"start: {start}", *rules]), param)
    lines = [f"answer: {start}", r"BREAK: /\n{1,2}/", *rules]
    end = _token(THINK_END, tokenizer)
    if end is not None:
        return Plan("\n".join(["start: BREAK? answer", *lines]), param, after=end)
    lines.append(f'thoughts[lazy]: {TEXT} "{THINK_END}"')
    return Plan("\n".join(["start: thoughts BREAK? answer", *lines]), param)


def _token(text: str, tokenizer: Tokenizer) -> int | None:
    """The token of a tag, if it has one that is not left out of the text."""
    token = tokenizer.token_id(text)
    return None if token is None or tokenizer.is_special(token) else token


def _tag(text: str, tokenizer: Tokenizer) -> str:
    token = _token(text, tokenizer)
    return json.dumps(text) if token is None else f"<[{token}]>"


def _calls(tools: Sequence[Tool], tokenizer: Tokenizer) -> list[str]:
    bodies, size = [], 0
    for i, tool in enumerate(tools):
        function = tool.function
        name = f"tools[{i}].function.parameters"
        parameters = NO_PARAMETERS if function.parameters is None else function.parameters
        if not any(kind in parameters for kind in KINDS):
            parameters = {"type": "object", **parameters}
        schema = _json(parameters, name, is_strict=bool(function.strict))
        size += len(schema)
        if size > MAX_TOOLS_SIZE:
            raise ApiError(
                400, f"tools: more than {MAX_TOOLS_SIZE} characters of schemas", param="tools"
            )
        head = json.dumps(f'{{"name": {json.dumps(function.name)}, "arguments": ')
        bodies.append(f'tool_{i}: {head} {schema} "}}"')
    names = " | ".join(f"tool_{i}" for i in range(len(tools)))
    return [
        f"call: {_tag(OPEN, tokenizer)} inner",
        f'inner: "\\n" ({names}) "\\n" {_tag(CLOSE, tokenizer)}',
        *bodies,
    ]


def _schema(request: GenerationRequest) -> str | None:
    asked = request.response_format
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return _json({"type": "object"}, "response_format", is_strict=True)
    name = "response_format.json_schema"
    if asked.json_schema is None:
        raise ApiError(400, f"{name}: expected one for the type json_schema", param=name)
    given = asked.json_schema
    schema = {"type": "object"} if given.schema_ is None else given.schema_
    return _json(schema, f"{name}.schema", is_strict=bool(given.strict))


def _json(schema: Mapping[str, Any], name: str, *, is_strict: bool) -> str:
    """The rule for a schema. What it demands and cannot be kept is refused, if it is strict."""
    options = {
        "whitespace_pattern": SPACE,
        "lenient": not is_strict,
        "coerce_one_of": True,
    }
    try:
        text = json.dumps({**schema, "x-guidance": options})
    except RecursionError:
        raise ApiError(400, f"{name}: nested too deeply", param=name) from None
    if len(text) > MAX_SCHEMA:
        raise ApiError(
            400,
            f"{name}: {len(text)} characters of JSON, at most {MAX_SCHEMA} allowed",
            param=name,
            code="invalid_schema",
        )
    return f"%json {text}"
