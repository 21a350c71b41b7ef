"""A chat in the terminal, with a model here or with a server: llaisys chat.

What is asked is the same JSON either way; Local and Remote turn it into pieces of an answer.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import sys
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

__all__ = ["Chat", "ChatError", "Local", "Remote"]

HELP = """\
/new                 forget what was said
/system TEXT         what the model is told first; without TEXT, show it
/set NAME VALUE      temperature, top_p, top_k, seed, max_tokens, stop, think, ...; no VALUE: the default
/regenerate          answer the last question again
/edit [TEXT]         change the last question, and ask it again
/show                all that was said
/save FILE           keep the chat as JSON
/load FILE           go on with a kept chat
/help, /quit
Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer, Ctrl-D ends.
A message between two lines of \"\"\" may have many lines, too."""
SETTINGS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
    "seed": int,
    "max_tokens": int,
    "stop": str,
    "think": lambda text: {"on": True, "off": False, "true": True, "false": False}[text],
}
TIMEOUT = 600  # seconds without a byte from a server


class ChatError(ValueError):
    """A question that could not be answered; one line."""


class Piece(NamedTuple):
    """What has come of an answer since the last piece."""

    thoughts: str = ""
    text: str = ""
    finish: str | None = None
    usage: Mapping[str, Any] | None = None


# ---- where answers come from ----


class Local:
    """A model folder, opened in this process."""

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        from .engine import Engine
        from .server.config import Config
        from .server.prepare import Model

        self._model = Model(Config(model))
        self.name = self._model.name
        self._engine = Engine(model, **{"max_seqs": 1, "progress": True, **options})
        meta = self._engine.meta
        self._model.max_seq, self._model.vocab = meta.maxseq, meta.voc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def stream(self, body: Mapping[str, Any]) -> Iterator[Piece]:
        from .server.answer import ChoiceText
        from .server.errors import ApiError
        from .server.schema import ChatRequest, parse

        try:
            request = parse(ChatRequest, json.dumps(body).encode())
            prepared = asyncio.run(self._model.chat(request))
        except ApiError as error:
            raise ChatError(error.message) from error
        choice = _LocalChoice()
        number = self._engine.submit(prepared.requests[0], choice.take)
        text = ChoiceText(choice, self._model, prepared)
        try:
            while text.finish_reason is None and choice.finish in (None, "stop", "length"):
                self._engine.poll(1.0)
                thoughts, answer = text.read()
                if thoughts or answer:
                    yield Piece(thoughts, answer)
        finally:
            self._engine.cancel(number)
            while choice.finish is None:
                self._engine.poll(1.0)
        if text.finish_reason is None:
            raise ChatError(choice.message or f"the answer ended: {choice.finish}")
        yield Piece(finish=text.finish_reason, usage=choice.usage(text.count))


class _LocalChoice:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[list[tuple[int, float]]] = []  # never asked for
        self.finish: str | None = None
        self.message: str | None = None
        self.cached = self.prompt = 0
        self.first_s = self.finished_s = 0.0

    def take(self, event: Any) -> None:
        from .server.hub import FINISH

        self.tokens += event.tokens[: event.ntoken]
        self.cached, self.prompt = event.cached_tokens, event.prompt_tokens
        self.first_s, self.finished_s = event.first_token_s, event.finished_s
        if event.finish:
            self.finish = FINISH[event.finish]
            self.message = event.message.decode("utf-8", "replace") if event.message else None

    def usage(self, count: int) -> dict[str, Any]:
        seconds = self.finished_s - self.first_s
        return {
            "completion_tokens": count,
            "prompt_tokens": self.prompt,
            "cached_tokens": self.cached,
            "ttft_ms": 1000 * self.first_s,
            "per_second": (count - 1) / seconds if seconds > 0 and count > 1 else None,
        }


class Remote:
    """A server that speaks OpenAI's API."""

    def __init__(self, url: str, key: str | None) -> None:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ChatError(f"--url: expected http://HOST:PORT, found {url}")
        self._parts = parts
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"content-type": "application/json"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"
        self._connection: http.client.HTTPConnection | None = None
        try:
            self.name = str(json.loads(self._ask("GET", "/v1/models").read())["data"][0]["id"])
        except ChatError:
            raise
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise ChatError(f"--url: {url}: expected a server of OpenAI's API") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ask(self, method: str, path: str, body: bytes | None = None) -> http.client.HTTPResponse:
        self._close()
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        try:
            self._connection = kind(self._parts.hostname, self._parts.port, timeout=TIMEOUT)
            self._connection.request(method, self._path + path, body, self._headers)
            response = self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise ChatError(f"{self._parts.geturl()}: {error}") from error
        if response.status != 200:
            text = response.read(10_000)
            with suppress(ValueError, KeyError, TypeError):
                text = json.loads(text)["error"]["message"]
            raise ChatError(f"{response.status}: {text}")
        return response

    def stream(self, body: Mapping[str, Any]) -> Iterator[Piece]:
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        asked["model"] = self.name
        response = self._ask("POST", "/v1/chat/completions", json.dumps(asked).encode())
        is_whole = False
        try:
            for line in response:
                if line.startswith(b"data: {"):
                    for piece in self._pieces(json.loads(line[6:])):
                        is_whole = is_whole or piece.finish is not None
                        yield piece
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ChatError(f"the answer broke off: {error}") from error
        finally:
            self._close()  # which ends the answer, if there is more of it
        if not is_whole:
            raise ChatError("the answer broke off")

    def _pieces(self, event: Mapping[str, Any]) -> Iterator[Piece]:
        if "error" in event:
            raise ChatError(event["error"]["message"])
        for choice in event["choices"]:
            delta = choice["delta"]
            thoughts = delta.get("reasoning_content") or ""
            yield Piece(thoughts, delta.get("content") or "", choice["finish_reason"])
        usage, timings = event.get("usage"), event.get("timings") or {}
        if usage:
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            known = {"ttft_ms": timings.get("ttft_ms"), "cached_tokens": cached}
            known["per_second"] = timings.get("predicted_per_second")
            yield Piece(usage={**usage, **known})


# ---- what is shown ----

# A model's text must not move the cursor, or set the title or the clipboard, by escape sequences.
CONTROLS = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)), "\ufffd")
CONTROLS |= {ord("\t"): "\t", ord("\n"): "\n", ord("\r"): ""}


class _Screen:
    """An answer as it comes: markdown on a terminal, plain text elsewhere.

    Finished blocks are printed once and for all; the one that still grows is drawn again and again.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._text = ""
        self._live: Live | None = None
        self._thinking = False

    def add(self, piece: Piece) -> None:
        if piece.thoughts:
            self._thinking = True
            self.console.print(Text(piece.thoughts.translate(CONTROLS), "dim italic"), end="")
        if not piece.text:
            return
        if self._thinking:
            self.console.print("\n")
            self._thinking = False
        if not self.console.is_terminal:
            self.console.out(piece.text, end="", highlight=False)
            return
        self._text += piece.text.translate(CONTROLS)
        done, self._text = _split_blocks(self._text)
        if done:
            self._stop()
            self.console.print(Markdown(done))
        if self._text.strip():
            if self._live is None:
                self._live = Live(console=self.console, transient=True, refresh_per_second=20)
                self._live.start()
            self._live.update(Markdown(self._text))

    def end(self) -> None:
        self._stop()
        if not self.console.is_terminal or self._thinking:
            self.console.print()
        if self._text.strip():
            self.console.print(Markdown(self._text))
        self._text = ""

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _split_blocks(text: str) -> tuple[str, str]:
    """The blocks of a markdown text that are complete, and the rest. Code fences stay whole."""
    end, at, fence = 0, 0, ""
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        at += len(line)
        if fence:
            if bare.startswith(fence) and not bare.strip(fence[0]):
                fence = ""
        elif bare[:3] in ("```", "~~~"):
            fence = bare[:3]
        elif not bare and line.endswith("\n"):
            end = at
    return text[:end], text[end:]


# ---- the conversation ----


class Chat:
    """Reads lines, answers questions, obeys /commands, until the input ends or /quit."""

    def __init__(
        self, backend: Local | Remote, settings: Mapping[str, Any], system: str | None
    ) -> None:
        self.backend = backend
        self.settings = dict(settings)
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.console = Console(highlight=False)
        self._input = _make_input()

    def run(self) -> None:
        self._note(f"{self.backend.name}; /help lists the commands")
        while True:
            try:
                line = self._input("")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if not line.strip():
                continue
            if line.strip() in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self._command(line)
                else:
                    self._ask(line)
            except (ChatError, OSError) as error:
                self._note(f"error: {error}", "red")

    def _note(self, text: str, style: str = "dim") -> None:
        self.console.print(Text(text.translate(CONTROLS), style))

    def _body(self) -> dict[str, Any]:
        told = [{"role": "system", "content": self.system}] if self.system else []
        body = {"messages": told + self.messages, **self.settings}
        think = body.pop("think", None)
        if think is not None:
            body["chat_template_kwargs"] = {"enable_thinking": think}
        return body

    def _ask(self, question: str, kept: list[dict[str, str]] | None = None) -> None:
        """kept: what was said, if nothing comes of the question; by default, what was before."""
        kept = list(self.messages) if kept is None else kept
        self.messages.append({"role": "user", "content": question})
        answer, usage, finish = "", None, None
        screen = _Screen(self.console)
        stream = self.backend.stream(self._body())
        try:
            for piece in stream:
                screen.add(piece)
                answer += piece.text
                usage, finish = piece.usage or usage, piece.finish or finish
        except KeyboardInterrupt:
            finish = "stopped"
        except ChatError:
            if not answer:
                self.messages = kept  # so that it can be asked again
            raise
        finally:
            stream.close()
            screen.end()
            if answer or finish:
                self.messages.append({"role": "assistant", "content": answer})
        self._note(_summary(usage, finish))

    # ---- commands ----

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        method = getattr(self, f"_on_{name}", None) if name.isalpha() else None
        if method is None:
            raise ChatError(f"there is no /{name}; /help lists the commands")
        method(rest.strip())

    def _on_help(self, _rest: str) -> None:
        self._note(HELP, "")

    def _on_new(self, _rest: str) -> None:
        self.messages.clear()
        self._note("a new chat")

    def _on_system(self, rest: str) -> None:
        self.system = rest or self.system
        self._note(f"system: {self.system or '(none)'}")

    def _on_set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name and name not in SETTINGS:
            raise ChatError(f"/set: expected one of {', '.join(SETTINGS)}, found {name}")
        if name and value:
            try:
                self.settings[name] = SETTINGS[name](value.strip())
            except (ValueError, KeyError) as error:
                raise ChatError(f"/set {name}: {value} is not a value for it") from error
        elif name:
            self.settings.pop(name, None)
        shown = ", ".join(f"{k} {v}" for k, v in self.settings.items())
        self._note(f"settings: {shown or 'the defaults'}")

    def _on_regenerate(self, _rest: str) -> None:
        kept = list(self.messages)
        self._ask(self._take_back(), kept)

    def _on_edit(self, rest: str) -> None:
        kept = list(self.messages)
        question = self._take_back()
        text = rest
        if not text:
            try:
                text = self._input(question)
            except (KeyboardInterrupt, EOFError):
                text = ""
        self._ask(text or question, kept)

    def _take_back(self) -> str:
        """The last question, removed with its answer."""
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise ChatError("nothing has been asked yet")
        question = self.messages[asked[-1]]["content"]
        del self.messages[asked[-1] :]
        return question

    def _on_show(self, _rest: str) -> None:
        for message in self.messages:
            self._note(f"{message['role']}:")
            self.console.print(Markdown(message["content"].translate(CONTROLS)))

    def _on_save(self, rest: str) -> None:
        file = _file("save", rest)
        kept = {"system": self.system, "settings": self.settings, "messages": self.messages}
        text = json.dumps(kept, ensure_ascii=False, indent=1)
        file.write_text(text + "\n", encoding="utf-8", errors="replace")
        self._note(f"{len(self.messages)} messages saved to {rest}")

    def _on_load(self, rest: str) -> None:
        file = _file("load", rest)
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            messages = [
                {"role": str(m["role"]), "content": str(m["content"])} for m in kept["messages"]
            ]
            settings = {k: v for k, v in dict(kept["settings"]).items() if k in SETTINGS}
            system = kept["system"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ChatError(f"{rest}: expected a saved chat") from error
        self.messages, self.settings, self.system = messages, settings, system
        self._note(f"{len(messages)} messages loaded")


def _file(command: str, name: str) -> Path:
    if not name:
        raise ChatError(f"/{command}: expected a file")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~ of nobody
        raise ChatError(f"/{command}: {name}: {error}") from error


def _summary(usage: Mapping[str, Any] | None, finish: str | None) -> str:
    parts = [] if finish == "stop" else [f"({finish})"]
    if usage:
        parts.append(f"{usage['completion_tokens']} tokens")
        if usage.get("per_second"):
            parts.append(f"{usage['per_second']:.0f} tokens/s")
        if usage.get("ttft_ms") is not None:
            parts.append(f"TTFT {usage['ttft_ms']:.0f} ms")
        parts.append(f"{usage['cached_tokens']} of {usage['prompt_tokens']} prompt tokens cached")
    return ", ".join(parts)


def _make_input() -> Callable[[str], str]:
    """A function that reads a message; its argument is what stands there already."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _read_plain
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: Any) -> None:
        buffer = event.current_buffer
        lines = buffer.text.split("\n")
        if lines[0].strip() == '"""' and (len(lines) < 2 or lines[-1].strip() != '"""'):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "llaisys"
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        history = FileHistory(str(state / "chat_history"))
    except OSError:
        history = InMemoryHistory()
    session: Any = PromptSession(history=history, multiline=True, key_bindings=keys)

    def read(default: str) -> str:
        return _unquote(session.prompt("> ", default=default, prompt_continuation="  "))

    return read


def _read_plain(_default: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    if line.strip() == '"""':
        for more in sys.stdin:
            line += more
            if more.strip() == '"""':
                break
    return _unquote(line.rstrip("\n"))


def _unquote(text: str) -> str:
    lines = text.split("\n")
    if len(lines) > 1 and lines[0].strip() == '"""':
        lines = lines[1:-1] if lines[-1].strip() == '"""' else lines[1:]
    return "\n".join(lines)
