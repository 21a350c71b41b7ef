"""Text to token ids and back, and chat templates: thin over Hugging Face tokenizers and Jinja.

    tokenizer = Tokenizer("models/refrain-mini")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer)
    print(stream.push(ids[0]), end="")

Ids, texts and rendered templates equal those of transformers' AutoTokenizer for the same folder.
Templates come with a checkpoint, so they are sandboxed and bounded: see Bounds.
"""

from __future__ import annotations

import codecs
import functools
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.visitor
import tokenizers
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["Bounds", "TextStream", "Tokenizer", "TokenizerError"]


class TokenizerError(ValueError):
    """A tokenizer or template that cannot be used, or a chat that a template refuses; one line."""


class Bounds(NamedTuple):
    """What a chat template may take: characters of text, seconds, characters of source."""

    text: int = 4 << 20
    seconds: float = 5.0
    source: int = 1 << 20


DEFAULT_BOUNDS = Bounds()
# Characters up to which a text is encoded at once. For a longer one the library's call for batches
# is worth its thread pool: it lets other Python threads run meanwhile, and keeps no offsets.
SHORT = 4096


class Tokenizer:
    """The tokenizer of a model folder: tokenizer.json and tokenizer_config.json.

    May be used by several threads at once.
    """

    def __init__(self, path: str | os.PathLike[str], bounds: Bounds = DEFAULT_BOUNDS) -> None:
        self.path = Path(path)
        self.bounds = bounds
        self._backend = _load_backend(self.path / "tokenizer.json")
        config = _load_config(self.path / "tokenizer_config.json")
        self._templates = _load_templates(self.path, config)
        self._compiled: dict[str, jinja2.Template] = {}
        # Templates see the special tokens by name: bos_token, eos_token and so on.
        self.special_tokens = {
            key: text
            for key, value in config.items()
            if key.endswith("_token") and (text := _token_text(value)) is not None
        }
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self.byte_level = type(self._backend.decoder).__name__ == "ByteLevel"

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def to_json(self) -> str:
        """The tokenizer as a tokenizer.json, for other libraries."""
        return self._backend.to_str()

    @property
    def chat_template(self) -> str | None:
        """Source of the default chat template, or None."""
        return self._templates.get("default")

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name, such as "<|im_end|>", or None."""
        return self._backend.token_to_id(token)

    def is_special(self, token: int) -> bool:
        """Whether decode leaves the token out with skip_special_tokens."""
        return token in self._special_ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. A rendered chat template has its special tokens: pass False."""
        backend = self._backend
        try:
            if len(text) <= SHORT:
                return backend.encode(text, add_special_tokens=add_special_tokens).ids
            found = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return found[0].ids
        except TypeError as error:
            if not isinstance(text, str):
                raise
            raise TokenizerError("text: expected valid Unicode, found a lone surrogate") from error

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids. Unknown ids add nothing, bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token adds to a text, perhaps a part of a character."""
        name = self._backend.id_to_token(token)
        if name is None:
            return b""
        if not self.byte_level:
            return self._backend.decode([token], skip_special_tokens=False).encode()
        try:
            return bytes(_BYTE_OF_CHAR[c] for c in name)
        except KeyError:  # added tokens are spelled as they are
            return name.encode()

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt of a chat. kwargs, such as enable_thinking, are variables of the template.

        Raises TokenizerError where there is no template, or where it fails, refuses the chat or
        exceeds its bounds.
        """
        template = self._template(
            "tool_use" if tools and "tool_use" in self._templates else "default"
        )
        variables = {**self.special_tokens, **_plain("template variables", kwargs)}
        variables.update(
            messages=_plain_messages(messages),
            tools=_plain("tools", tools),
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )
        with _readable_errors(f"{self.path}: chat template"):
            return template.environment.run(template, variables)

    def _template(self, name: str) -> jinja2.Template:
        if name not in self._compiled:
            if name not in self._templates:
                found = ", ".join(sorted(self._templates)) or "none"
                raise TokenizerError(
                    f"{self.path}: expected a chat template named {name!r}, found {found}"
                )
            with _readable_errors(f"{self.path}: chat template"):
                self._compiled[name] = _Environment(self.bounds).compile_template(
                    self._templates[name]
                )
        return self._compiled[name]


class TextStream:
    """Turns tokens into text as they come, holding back bytes until they form whole characters.

    The pieces, flush() included, join to what decode() makes of all the tokens: a character whose
    bytes are spread over tokens comes whole or, should it never be finished, as U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # A decoder that is not byte-level looks at neighbours: it gets the tokens shown last too.
        self._shown: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that is certain once `token` is known; often one token's, sometimes empty."""
        if self._skip and self._tokenizer.is_special(token):
            return ""
        if self._tokenizer.byte_level:
            return self._utf8.decode(self._tokenizer.token_bytes(token))
        self._held.append(token)
        text = self._window()
        return "" if text.endswith("\ufffd") else self._show(text)

    def flush(self) -> str:
        """What is still held, at the end of the text."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._show(self._window())

    def _window(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._held)[len(before) :]

    def _show(self, text: str) -> str:
        if self._held:
            self._shown, self._held = self._held, []
        return text


# ---- loading ----


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    _require_file(path)
    with _readable_errors(str(path)):
        backend = tokenizers.Tokenizer.from_file(str(path))
        # Limits stored by training scripts would cut prompts silently.
        backend.no_truncation()
        backend.no_padding()
        return backend


def _load_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    _require_file(path)
    with _readable_errors(str(path)):
        config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise TokenizerError(f"{path}: expected an object, found {type(config).__name__}")
    return config


def _load_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Sources of the chat templates by name; a file of its own wins over the configuration."""
    file = folder / "chat_template.jinja"
    if file.exists():
        _require_file(file)
        with _readable_errors(str(file)):
            return {"default": file.read_text(encoding="utf-8")}
    found = config.get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    try:
        templates = {entry["name"]: entry["template"] for entry in found}
    except (KeyError, TypeError):
        templates = {"": None}
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: chat_template: expected a string or a list of "
            '{"name": string, "template": string}'
        )
    return templates


def _token_text(value: Any) -> str | None:
    if isinstance(value, Mapping):  # an AddedToken: its text and how it matches
        value = value.get("content")
    return value if isinstance(value, str) else None


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise TokenizerError(
            f"{path}: expected a file, found {'a folder' if path.is_dir() else 'none'}"
        )


class _readable_errors:
    """Turns whatever a parser, compiler or template raises into a TokenizerError of one line."""

    def __init__(self, subject: str) -> None:
        self.subject = subject

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if error is None or isinstance(
            error, (KeyboardInterrupt, SystemExit, GeneratorExit, TokenizerError)
        ):
            return
        # Not only Exception: a panic in the Rust library derives from BaseException.
        if isinstance(error, RecursionError):
            text = "nested too deeply"
        elif isinstance(error, MemoryError):
            text = "needs too much memory"
        else:
            text = " ".join(str(error).split())[:500] or type(error).__name__
        raise TokenizerError(f"{self.subject}: {text}") from error


def _byte_alphabet() -> dict[str, int]:
    """The characters of byte-level BPE: printable Latin-1 is itself, other bytes are U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF_CHAR = _byte_alphabet()


# ---- chat templates ----


def _plain(subject: str, value: Any) -> Any:
    """A copy made of JSON's types alone: templates must not reach methods of richer objects."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{subject}: expected JSON data: {error}") from error


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as transformers hands them over: no null fields, reasoning under all its names."""
    plain = _plain("messages", messages)
    if not isinstance(plain, list) or not plain:
        raise TokenizerError("messages: expected a list of at least one message")
    for i, message in enumerate(plain):
        if not isinstance(message, dict):
            raise TokenizerError(
                f"messages[{i}]: expected an object, found {type(message).__name__}"
            )
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next(
            (
                message[key]
                for key in ("reasoning_content", "thinking", "reasoning")
                if key in message
            ),
            None,
        )
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        plain[i] = message
    return plain


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a prompt is not.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks what is trained on; here it is its body."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Bounded(jinja2.visitor.NodeTransformer):
    """Sends what can grow without end, loops and ~, through filters that count."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_bounded_loop", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        pieces = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(pieces, "_bounded_concat", [], [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with bounds on time and on the size of texts.

    Loops and calls check the clock; *, +, **, ~, captured blocks, the output and the widths given
    to string methods and filters check sizes.
    """

    intercepted_binops = frozenset(("*", "+", "**"))

    def __init__(self, bounds: Bounds) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        self.bounds = bounds
        self._run = threading.local()  # .deadline, of the render that this thread is in
        self.concat = self._join  # what templates collect their output with
        for name in ("batch", "center", "indent", "slice"):
            self.filters[name] = self._bounded_filter(self.filters[name])
        self.filters.update(tojson=_to_json, _bounded_loop=self._loop, _bounded_concat=self._concat)
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    def compile_template(self, source: str) -> jinja2.Template:
        if len(source) > self.bounds.source:
            raise jinja2.TemplateError(
                f"source: expected at most {self.bounds.source} characters, found {len(source)}"
            )
        return self.from_string(source)

    def run(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        self._run.deadline = time.monotonic() + self.bounds.seconds
        try:
            return self._join(template.generate(variables))
        finally:
            del self._run.deadline

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Bounded().visit(source), *args, **kwargs)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if operator == "**":
            self._check_size(_bits(left) * abs(right) if isinstance(right, int) else 0)
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            self._check_size(_bits(left) + _bits(right))
        elif operator == "*":
            for text, count in ((left, right), (right, left)):
                if hasattr(text, "__len__") and isinstance(count, int):
                    self._check_size(len(text) * count)
        elif hasattr(left, "__len__") and hasattr(right, "__len__"):
            self._check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(
        self, context: jinja2.runtime.Context, function: Any, /, *args: Any, **kwargs: Any
    ) -> Any:
        self._check_time()
        if isinstance(getattr(function, "__self__", None), str):
            self._check_widths(args, kwargs)
        return super().call(context, function, *args, **kwargs)

    def _bounded_filter(self, function: Any) -> Any:
        @functools.wraps(function)  # keeps the marks by which Jinja passes a context
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self._check_widths(args[1:], kwargs)
            return function(*args, **kwargs)

        return bounded

    def _loop(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._check_time()
            yield item

    def _concat(self, pieces: Iterable[Any]) -> str:
        return self._join(map(str, pieces))

    def _join(self, pieces: Iterable[str]) -> str:
        kept, size = [], 0
        for piece in pieces:
            size += len(piece)
            self._check_size(size)
            kept.append(piece)
        return "".join(kept)

    def _check_widths(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int):
                self._check_size(abs(value))

    def _check_size(self, size: int) -> None:
        if size > self.bounds.text:
            raise jinja2.TemplateError(f"makes more than {self.bounds.text} characters")

    def _check_time(self) -> None:
        if time.monotonic() > getattr(self._run, "deadline", float("inf")):
            raise jinja2.TemplateError(f"runs for more than {self.bounds.seconds:g} s")


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 1
