"""Requests as OpenAI's clients send them. What is not declared here is ignored, and said so."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from .errors import ApiError

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "GenerationRequest",
    "Message",
    "NamedTool",
    "TokenizeRequest",
    "Tool",
    "parse",
]

MAX_STOPS, MAX_STOP_LENGTH, MAX_STOP_IDS = 16, 256, 64
MAX_MESSAGES, MAX_TOOLS = 10_000, 128
INT32 = 2**31 - 1


class _Model(BaseModel):
    # strict: "1" and true are no numbers
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class TextPart(_Model):
    type: Literal["text"]
    text: str


class OtherPart(_Model):
    """An image, a sound, a file: refused later with a message of its own, and never fetched."""

    type: str


class CalledFunction(_Model):
    name: str
    arguments: str | dict[str, Any] | None = None  # OpenAI's clients send JSON in a string


class ToolCall(_Model):
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class Message(_Model):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[TextPart | OtherPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None


class StreamOptions(_Model):
    include_usage: bool | None = None


class JsonSchema(_Model):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(_Model):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Model):
    type: Literal["function"]
    function: Function


class NamedFunction(_Model):
    name: str


class NamedTool(_Model):
    type: Literal["function"]
    function: NamedFunction


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Count = Annotated[int, Field(ge=1, le=INT32)]
# the first wrong element is enough: a body has room for millions
Prompts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]


class GenerationRequest(_Model):
    """What chat and plain completions have in common. null is the same as absent."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    n: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_IDS)] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: (
        dict[str, Annotated[float, Field(ge=-100, le=100)]] | None  # by token id
    ) = None
    response_format: ResponseFormat | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    # taken without effect
    user: str | None = None


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    # taken without effect
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    reasoning_effort: str | None = None


class CompletionRequest(GenerationRequest):
    prompt: str | Prompts | Ids | Annotated[list[Ids], Field(fail_fast=True)]
    suffix: str | None = None
    echo: bool | None = None
    best_of: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TokenizeRequest(_Model):
    """vLLM's prompt or messages, or llama.cpp's content."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: (
        Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
        | None
    ) = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    add_generation_prompt: bool | None = None


class DetokenizeRequest(_Model):
    model: str | None = None
    tokens: Ids


Parsed = TypeVar("Parsed", bound=_Model)


def parse(kind: type[Parsed], body: bytes) -> Parsed:
    """A request from a body in JSON, or an ApiError that names what is wrong with it."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False, include_context=False)) from None


def _explain(errors: list[ErrorDetails]) -> ApiError:
    if errors[0]["type"] == "json_invalid":
        why = errors[0]["msg"].removeprefix("Invalid JSON: ")
        return ApiError(400, f"the body is not valid JSON: {why[:200]}")
    # of a union, which says why each of its kinds does not fit, the one that went deepest
    error = max(errors, key=_depth)
    name = _name(error["loc"])
    found = "" if error["type"] == "missing" else f", found {_show(error['input'])}"
    where = name or "the body"
    return ApiError(400, f"{where}: {error['msg']}{found}", param=name or None)


def _depth(error: ErrorDetails) -> tuple[int, bool]:
    """Places in lists, then whether the kind was right at least."""
    places = [part for part in error["loc"] if isinstance(part, int)]
    return len(places), not error["type"].endswith("_type")


def _name(loc: tuple[int | str, ...]) -> str:
    """messages[2].content of a location, without the names that pydantic gives kinds of a union."""
    name = ""
    for part in loc:
        if isinstance(part, int):
            name += f"[{part}]"
        elif not ("[" in part or "-" in part or part in KINDS):
            name += f".{part}" if name else part
    return name[:200]


KINDS = {"str", "int", "float", "bool", "dict", "TextPart", "OtherPart", "NamedTool"}


def _show(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = repr(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:77] + "..."
