"""From a request of a client to requests of the engine, or an ApiError that says what is wrong.

NEUTRAL is the one place that knows which parameters may not be followed: what neither the server nor
the engine's Request has must be neutral, and is refused otherwise, since ignoring it would give
another answer than the one asked for.
"""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import hashlib
import importlib.util
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine import Request
from ..tokenizer import Tokenizer, TokenizerError
from .config import Config
from .errors import ApiError
from .grammar import Constraint, Grammars
from .plans import make_plan, tools_of
from .schema import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Message,
    NamedTool,
    TextPart,
    TokenizeRequest,
    Tool,
)
from .text import THINK, THINK_END, TokenTable
from .tools import describe, is_native

__all__ = ["Model", "Prepared"]

# what this engine's requests can ask for
ENGINE = frozenset(item.name for item in dataclasses.fields(Request))
# parameters that are the engine's under the same name
PASSED = ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
# parameter -> its neutral values
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "logprobs": (False,),  # 0 asks for those of the tokens chosen
    "functions": ([],),
    "suffix": ("",),
    "audio": (),
    "modalities": (["text"],),
    "continue_final_message": (False,),
}
MAX_KWARGS = 64 << 10  # characters of chat_template_kwargs
INLINE = 4096  # characters that are tokenized at once; more go to a thread
LONG = 1 << 18  # more go there one after another: they take up to 400 bytes of memory each
MAX_WAITING = 16  # requests of which each is longer


@dataclass
class Prepared:
    """What to submit, and how to present what comes of it."""

    requests: list[Request]
    stops: list[str]
    is_stream: bool
    include_usage: bool
    reasoning: bool | None = None  # None: thoughts are not told apart; True: the prompt opens them
    echo: list[str] = field(default_factory=list)  # texts put before the answers, by prompt
    n: int = 1  # answers to each prompt
    logprobs: bool = False
    constrain: Callable[[], Constraint] | None = None  # the way of one answer through its grammar
    calls: str | None = None  # how calls end an answer: "tool_calls" or, where demanded, "stop"
    ignored: list[str] = field(default_factory=list)  # parameters that are not known


class Model:
    """What the server knows of a model folder without its weights. Raises TokenizerError."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = Path(config.model)
        self.name = config.model_name or self.path.resolve().name
        self.tokenizer = Tokenizer(self.path)
        self.table = TokenTable(self.tokenizer)
        self.defaults = _generation_defaults(self.path / "generation_config.json")
        template = self.tokenizer.chat_template or ""
        self.thinks = THINK_END in template or self.tokenizer.token_id(THINK_END) is not None
        self.max_seq = self.vocab = 0  # known once the engine is open
        self.max_choices = config.max_choices  # less where the engine's queue is shorter
        self._grammars: Grammars | None = None
        self._without_grammars = "they are not ready"
        self._long = asyncio.Lock()
        self._waiting = 0

    def prepare_grammars(self) -> None:
        """What schemas and tools need; without it, requests that ask for them are refused."""
        try:
            vocab, ends = _vocabulary(self.path)
            if importlib.util.find_spec("llguidance") is None:
                raise TokenizerError("there is no Python package llguidance")
            if not ends:
                raise TokenizerError("the model has no end token")
            self._grammars = Grammars(self.tokenizer, vocab, ends)
        except TokenizerError as error:
            self._without_grammars = _without_path(error, self.path)

    def close(self) -> None:
        """Before the engine is closed: no more masks from now on."""
        if self._grammars is not None:
            self._grammars.close()

    def name_of(self, token: int) -> str:
        """How OpenAI writes a token: its text, or its bytes where they are no whole characters."""
        data = self.table.spelled(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    # ---- prompts ----

    async def chat(self, request: ChatRequest) -> Prepared:
        self._check(request)
        tools = tools_of(request)
        size = sum(map(_size, request.messages))
        size += INLINE * (len(tools) > 8)
        if request.chat_template is not None:
            size += INLINE  # it may take all the time that it is given
        text, ids = await self._run(size, self._chat_ids, request, tools)
        prepared = self._prepared(request, [ids], _either(request))
        if self.thinks:
            prepared.reasoning = text.rstrip().endswith(THINK)
        if tools:
            # as OpenAI has it: what was demanded by name is no news
            prepared.calls = "stop" if isinstance(request.tool_choice, NamedTool) else "tool_calls"
        await self._constrain(request, prepared)
        return prepared

    async def completion(self, request: CompletionRequest) -> Prepared:
        self._check(request)
        prompts = _prompts(request.prompt)
        if not prompts:
            raise ApiError(400, "prompt: expected at least one", param="prompt")
        self._check_count(len(prompts) * (request.n or 1), "prompt")
        if request.best_of not in (None, 1, request.n):
            raise ApiError(400, "best_of: expected to equal n", param="best_of")
        if request.echo and request.logprobs is not None:
            raise ApiError(
                400,
                "logprobs: not supported beside echo: the prompt's are not known",
                param="logprobs",
                code="unsupported_parameter",
            )
        size = sum(map(len, prompts))
        encode = self.tokenizer.encode
        ids = await self._run(size, lambda: [encode(p) if _is_text(p) else p for p in prompts])
        # OpenAI's default for plain completions
        prepared = self._prepared(request, ids, request.max_tokens or 16)
        if request.echo:
            decode = self.tokenizer.decode
            prepared.echo = [p if _is_text(p) else decode(_small(p, self.vocab)) for p in prompts]
        await self._constrain(request, prepared)
        return prepared

    async def tokenize(self, request: TokenizeRequest) -> list[int]:
        text = request.content if request.prompt is None else request.prompt
        if (text is None) == (request.messages is None):
            raise ApiError(400, "expected either prompt, content or messages")
        tokenizer = self.tokenizer
        if text is not None:
            special = False not in (request.add_special_tokens, request.add_special)
            return await self._run(len(text), tokenizer.encode, text, special)

        def encode() -> list[int]:
            open_answer = request.add_generation_prompt is not False
            messages = _plain(request.messages)
            if not is_native(tokenizer.chat_template or ""):
                messages = describe(messages, [])
            chat = tokenizer.apply_chat_template(messages, open_answer)
            return tokenizer.encode(chat, add_special_tokens=False)

        return await self._run(sum(map(_size, request.messages)), encode)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        for token in tokens:
            if not 0 <= token < self.vocab:
                message = f"tokens: expected ids from 0 to {self.vocab - 1}, found {token}"
                raise ApiError(400, message[:200], param="tokens")
        return await self._run(len(tokens), self.tokenizer.decode, tokens)

    def _chat_ids(self, request: ChatRequest, tools: Sequence[Tool]) -> tuple[str, list[int]]:
        tokenizer = self.tokenizer
        if request.chat_template is not None:
            tokenizer = _with_template(tokenizer, request.chat_template)
        messages = _plain(request.messages)
        told: list[Any] | None = [tool.model_dump(exclude_none=True) for tool in tools] or None
        if not is_native(request.chat_template or tokenizer.chat_template or ""):
            messages, told = describe(messages, told or []), None
        text = tokenizer.apply_chat_template(
            messages,
            request.add_generation_prompt is not False,
            tools=told,
            **(request.chat_template_kwargs or {}),
        )
        return text, tokenizer.encode(text, add_special_tokens=False)

    async def _constrain(self, request: GenerationRequest, prepared: Prepared) -> None:
        plan = make_plan(request, self.tokenizer, thinks=prepared.reasoning is True)
        if plan is None:
            return
        if request.ignore_eos:
            raise ApiError(
                400, f"ignore_eos: an answer with {plan.param} has an end", param="ignore_eos"
            )
        grammars = self._grammars
        if grammars is None:
            raise ApiError(
                400,
                f"{plan.param}: this server cannot follow it: {self._without_grammars}",
                param=plan.param,
                code="unsupported_parameter",
            )
        grammar = await grammars.compile(plan)
        prepared.constrain = lambda: Constraint(grammars, grammar, plan)
        for item in prepared.requests:
            item.constrained, item.constrain_after = True, plan.after

    async def _run(self, size: int, work: Callable[..., Any], *args: Any) -> Any:
        """Long texts go to a thread, so that nobody else's tokens wait for them."""
        try:
            if size <= INLINE:
                return work(*args)
            if size <= LONG:
                return await asyncio.to_thread(work, *args)
            if self._waiting >= MAX_WAITING:
                raise ApiError(429, "too many long texts at once", retry_after=1)
            self._waiting += 1
            try:
                async with self._long:
                    return await asyncio.to_thread(_and_release, work, *args)
            finally:
                self._waiting -= 1
        except TokenizerError as error:
            raise ApiError(400, _without_path(error, self.path)) from error
        except RecursionError as error:
            raise ApiError(400, "the request is nested too deeply") from error

    # ---- parameters ----

    def _check(self, request: GenerationRequest) -> None:
        self.check_model(request.model)
        self._check_count(request.n or 1, "n")
        for name in ("chat_template", "chat_template_kwargs"):
            value = getattr(request, name, None)
            if (
                value is not None
                and name == "chat_template"
                and not self.config.allow_chat_template
            ):
                raise ApiError(400, "chat_template: not allowed by this server", param=name)
        kwargs = getattr(request, "chat_template_kwargs", None) or {}
        if reserved := RESERVED.intersection(kwargs):
            name = f"chat_template_kwargs.{min(reserved)}"
            raise ApiError(400, f"{name}: not a variable that can be set", param=name)
        if kwargs and len(json.dumps(kwargs)) > MAX_KWARGS:
            raise ApiError(400, "chat_template_kwargs: too long", param="chat_template_kwargs")
        self._check_ids(request)
        for name, neutral in NEUTRAL.items():
            value = getattr(request, name, None)
            if name.removeprefix("top_") in ENGINE or value is None:
                continue
            if value not in neutral or (name == "logprobs" and value is not False):
                raise _unsupported(name)
        if getattr(request, "top_logprobs", None) and not request.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs", param="top_logprobs")

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"the model {name[:100]!r} does not exist; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def _check_count(self, count: int, name: str) -> None:
        most = self.max_choices
        if count > most:
            raise ApiError(
                400, f"{name}: {count} answers asked, at most {most} allowed", param=name
            )

    def _check_ids(self, request: GenerationRequest) -> None:
        for token in request.stop_token_ids or ():
            if not 0 <= token < self.vocab:
                raise ApiError(
                    400,
                    f"stop_token_ids: expected ids from 0 to {self.vocab - 1}, found {token}"[:200],
                    param="stop_token_ids",
                )
        for key in request.logit_bias or ():
            if not (key.isascii() and key.isdigit() and len(key) < 20 and int(key) < self.vocab):
                raise ApiError(
                    400,
                    f"logit_bias: expected ids from 0 to {self.vocab - 1}, found {key[:40]!r}",
                    param="logit_bias",
                )

    def _prepared(
        self, request: GenerationRequest, prompts: Sequence[Sequence[int]], most: int | None
    ) -> Prepared:
        for i, ids in enumerate(prompts):
            self._check_prompt(ids, "messages" if isinstance(request, ChatRequest) else "prompt", i)

        def chosen(name: str, otherwise: float) -> Any:
            value = getattr(request, name)
            return self.defaults.get(name, otherwise) if value is None else value

        n = request.n or 1
        temperature, top_p = chosen("temperature", 1.0), chosen("top_p", 1.0)
        if top_p == 0:  # only the likeliest token is left
            temperature, top_p = 0.0, 1.0
        top_k = max(chosen("top_k", 0), 0)
        seed = random.getrandbits(64) if request.seed is None else request.seed
        salt = 0
        if request.cache_salt is not None:
            digest = hashlib.blake2b(request.cache_salt.encode(), digest_size=8).digest()
            salt = int.from_bytes(digest, "little")
        options = {
            name: value
            for name in PASSED
            if name in ENGINE and (value := getattr(request, name)) is not None
        }
        if "logit_bias" in ENGINE and request.logit_bias:
            options["logit_bias"] = {int(key): bias for key, bias in request.logit_bias.items()}
        if "logprobs" in ENGINE:
            options["logprobs"] = _logprobs(request)
        requests = [
            Request(
                ids,
                most,
                **options,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=(seed + i) % 2**64,
                stop=request.stop_token_ids or (),
                ignore_eos=bool(request.ignore_eos),
                cache_salt=salt,
            )
            for ids in prompts
            for i in range(n)
        ]
        stop = request.stop
        streaming = request.stream_options
        return Prepared(
            requests,
            [stop] if isinstance(stop, str) else stop or [],
            is_stream=bool(request.stream),
            include_usage=bool(streaming and streaming.include_usage),
            logprobs=_logprobs(request) is not None,
            n=n,
            ignored=sorted(request.model_extra or ()),
        )

    def _check_prompt(self, ids: Sequence[int], name: str, index: int) -> None:
        if not ids:
            raise ApiError(400, f"{name}: prompt {index} is empty", param=name)
        if len(ids) >= self.max_seq:
            raise ApiError(
                400,
                f"the context holds {self.max_seq} tokens, at least one of them the answer's, "
                f"but the prompt has {len(ids)} tokens",
                param=name,
                code="context_length_exceeded",
            )
        for token in ids if name == "prompt" else ():
            if not 0 <= token < self.vocab:
                raise ApiError(
                    400,
                    f"prompt: expected token ids from 0 to {self.vocab - 1}, found {token}"[:200],
                    param=name,
                )


def _logprobs(request: GenerationRequest) -> int | None:
    """How many of the most probable tokens are to be told beside each one; None: nothing."""
    asked = getattr(request, "logprobs", None)
    if isinstance(request, ChatRequest):
        return (request.top_logprobs or 0) if asked else None
    return asked


RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "self"}


def _unsupported(name: str) -> ApiError:
    return ApiError(
        400,
        f"{name}: not supported by this server yet",
        param=name,
        code="unsupported_parameter",
    )


def _either(request: ChatRequest) -> int | None:
    return request.max_completion_tokens or request.max_tokens


def _and_release(work: Callable[..., Any], *args: Any) -> Any:
    """Calls, and has the C library give back what it keeps: after a long text, gigabytes."""
    try:
        return work(*args)
    finally:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def _is_text(prompt: object) -> bool:
    return isinstance(prompt, str)


def _prompts(prompt: Any) -> list[Any]:
    """One prompt or many, as texts or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [prompt]
    return prompt


def _small(ids: Sequence[int], vocab: int) -> list[int]:
    return [token for token in ids if 0 <= token < vocab]


def _size(message: Message) -> int:
    """About how much work a message is, in characters."""
    content = message.content
    if isinstance(content, list):
        return sum(len(part.text) + 50 for part in content if isinstance(part, TextPart))
    return len(content or "") + 50


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates know them: content is one text."""
    plain = []
    for i, message in enumerate(messages):
        entry = message.model_dump(exclude_none=True, exclude=set(message.model_extra or ()))
        if isinstance(message.content, list):
            entry["content"] = _join(message.content, f"messages[{i}].content")
        if message.role == "developer":
            entry["role"] = "system"
        if message.content is None:
            entry["content"] = ""  # templates rarely know messages that are calls alone
        for call in entry.get("tool_calls", ()):
            _parse_arguments(call["function"], f"messages[{i}].tool_calls")
        plain.append(entry)
    return plain


def _parse_arguments(function: dict[str, Any], name: str) -> None:
    """Clients send arguments as a string of JSON; templates write them as JSON themselves."""
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return
    try:
        function["arguments"] = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise ApiError(
            400, f"{name}: arguments: expected JSON in a string: {str(error)[:100]}", param=name
        ) from error


def _join(parts: Sequence[Any], name: str) -> str:
    for i, part in enumerate(parts):
        if not isinstance(part, TextPart):
            where = f"{name}[{i}]"
            if part.type == "text":
                raise ApiError(400, f"{where}.text: expected a string", param=f"{where}.text")
            raise ApiError(
                400,
                f"{where}: this model takes text alone, found {part.type[:40]!r}",
                param=where,
            )
    return "".join(part.text for part in parts)


def _with_template(tokenizer: Tokenizer, source: str) -> Tokenizer:
    """The same tokenizer with another template, which is sandboxed and bounded as its own is."""
    other = object.__new__(Tokenizer)
    other.__dict__ = dict(tokenizer.__dict__)
    other._templates, other._compiled = {"default": source}, {}
    return other


def _without_path(error: TokenizerError, path: Path) -> str:
    """What clients need not know is where the model lies."""
    return str(error).removeprefix(f"{path}: ")


def _vocabulary(folder: Path) -> tuple[int, list[int]]:
    """The model's vocabulary, and the tokens that end its answers, as the engine reads them."""
    vocab, ends = 0, []
    for name in ("config.json", "generation_config.json"):
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise TokenizerError(f"{name}: expected JSON: {error}") from error
        if isinstance(config, dict):
            vocab = vocab or config.get("vocab_size", 0)
            ids = config.get("eos_token_id")
            ends += ids if isinstance(ids, list) else [ids]
    if not isinstance(vocab, int) or not 0 < vocab < 2**31:
        raise TokenizerError("config.json: expected a vocab_size")
    return vocab, list(dict.fromkeys(i for i in ends if isinstance(i, int) and 0 <= i < vocab))


def _generation_defaults(file: Path) -> dict[str, float]:
    """What the model's authors recommend: temperature, top_p, top_k."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{file}: expected JSON: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{file}: expected an object")
    if config.get("do_sample") is False:
        return {"temperature": 0.0}
    limits = {"temperature": (0, 2), "top_p": (0, 1), "top_k": (0, 2**31 - 1)}
    return {
        name: config[name]
        for name, (least, most) in limits.items()
        if isinstance(config.get(name), (int, float)) and least <= config[name] <= most
    }
