"""From tokens to HTTP: one JSON object, or a stream of server-sent events, and why it ended."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from json.encoder import encode_basestring_ascii as quote
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from . import hub
from .errors import ApiError
from .hub import Choice, Generation, Hub
from .prepare import Model, Prepared
from .text import Detokenizer, Reasoning, StopStrings
from .tools import CallParser, Delta, merge

__all__ = ["Answer"]

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes events on at once
]


class ChoiceText:
    """One choice's text as it comes, and its finish reason once that is known."""

    def __init__(self, choice: Choice, model: Model, prepared: Prepared) -> None:
        self.choice = choice
        self.count = 0  # tokens read, up to the stop string
        self.finish_reason: str | None = None
        self.logprobs: list[list[tuple[int, float]]] = []  # of the tokens that the last read gave
        self.offset = 0  # of the next token in the text, in characters
        self.told = Detokenizer(model.table)  # of the tokens before it
        self._detokenizer = Detokenizer(model.table)
        self._reasoning = None if prepared.reasoning is None else Reasoning(prepared.reasoning)
        self._stops = StopStrings(prepared.stops) if prepared.stops else None
        self._calls = CallParser() if prepared.calls else None
        self._calls_end = prepared.calls
        self.calls: list[Delta] = []  # pieces of tool calls that the last read gave

    def read(self) -> tuple[str, str]:
        """The new thoughts and the new text; sets finish_reason with the last of them."""
        thoughts, text = self._read()
        if self._calls is not None:
            text, self.calls = self._calls.push(text) if text else ("", [])
            if self.finish_reason is not None:
                more, deltas = self._calls.finish()
                text, self.calls = text + more, self.calls + deltas
                if self.finish_reason == "stop" and self._calls.count and self._is_whole():
                    self.finish_reason = self._calls_end
        return thoughts, text

    def _is_whole(self) -> bool:
        """Whether no stop string has cut the answer."""
        return self._stops is None or self._stops.matched is None

    def _read(self) -> tuple[str, str]:
        choice = self.choice
        tokens, choice.tokens = choice.tokens, []
        finish = choice.finish
        end = len(tokens)
        if finish == "stop" and tokens:
            end -= 1  # the token that ends the text is no part of it
        if choice.logprobs:
            self.logprobs, choice.logprobs = choice.logprobs[:end], []
        if self._stops is None:
            self.count += len(tokens)
            thoughts, text = self._push(tokens[:end])
        else:
            thoughts, text = "", ""
            for i in range(end):  # one by one, to know how many there are up to a stop string
                more = self._push(tokens[i : i + 1])
                thoughts, text = thoughts + more[0], text + more[1]
                self.count += 1
                if self._stops.matched is not None:
                    self.finish_reason = "stop"
                    self.logprobs = self.logprobs[: i + 1]
                    return thoughts, text
            self.count += len(tokens) - end
        if finish in ("stop", "length"):
            self.finish_reason = finish
            more = self._finish()
            thoughts, text = thoughts + more[0], text + more[1]
        return thoughts, text

    def _push(self, tokens: Sequence[int]) -> tuple[str, str]:
        return self._part(self._detokenizer.push(tokens))

    def _part(self, text: str) -> tuple[str, str]:
        thoughts = ""
        if self._reasoning is not None and text:
            thoughts, text = self._reasoning.push(text)
        if self._stops is not None and text:
            text = self._stops.push(text)
        return thoughts, text

    def _finish(self) -> tuple[str, str]:
        thoughts, text = self._part(self._detokenizer.finish())
        if self._reasoning is not None:
            more, last = self._reasoning.finish()
            thoughts += more
            text += self._stops.push(last) if self._stops is not None else last
        if self._stops is not None:
            text += self._stops.finish()
            if self._stops.matched is not None:
                self.finish_reason = "stop"
        return thoughts, text


class Answer(Response):
    """What a request for text is answered with; ends the generation when the client goes away."""

    def __init__(
        self,
        engine_hub: Hub,
        model: Model,
        generation: Generation,
        prepared: Prepared,
        *,
        is_chat: bool,
    ) -> None:
        # not Response's own: there is no body yet
        self.status_code = 200
        self.background = None
        self.hub, self.model, self.generation, self.prepared = (
            engine_hub,
            model,
            generation,
            prepared,
        )
        self.is_chat = is_chat
        self.texts = [ChoiceText(choice, model, prepared) for choice in generation.choices]
        self.created = int(time.time())
        self.id = ("chatcmpl-" if is_chat else "cmpl-") + uuid.uuid4().hex
        self.extra_headers: list[tuple[bytes, bytes]] = []
        if prepared.ignored:
            known = [name[:64] for name in prepared.ignored[:16] if name.isidentifier()]
            value = ",".join(name for name in known if name.isascii())
            self.extra_headers.append((b"x-ignored-parameters", value.encode()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.get("state", {})
        self.generation.abort = state.get("abort")
        listener = asyncio.ensure_future(self._listen(receive))
        try:
            await (self._stream(send) if self.prepared.is_stream else self._whole(send))
        finally:
            listener.cancel()
            self.hub.finish(self.generation)
            state["generation"] = self

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.generation.give_up("disconnect")

    def summary(self) -> dict[str, Any]:
        """What the log says of it."""
        reasons = {text.finish_reason or text.choice.finish or "running" for text in self.texts}
        choice = self.texts[0].choice
        return {
            "finish": self.generation.ended or ",".join(sorted(reasons)),
            "prompt_tokens": choice.prompt,
            "cached_tokens": choice.cached,
            "completion_tokens": sum(text.count for text in self.texts),
            "ttft_ms": round(1000 * choice.first_s, 1),
        }

    # ---- what both forms need ----

    def _read(self, text: ChoiceText) -> tuple[str, str]:
        news = text.read()
        if text.finish_reason == "stop" and text.choice.finish is None:
            self.hub.engine.cancel(text.choice.number)  # a stop string: the rest is not wanted
        return news

    def _failure(self, text: ChoiceText) -> ApiError | None:
        """Why a choice has ended other than by itself, or None."""
        ended, choice = self.generation.ended, text.choice
        if text.finish_reason is not None:
            return None
        if ended == "timeout":
            return ApiError(504, "the answer took longer than this server allows", code="timeout")
        if choice.finish in ("cancelled", "masked") and choice.constraint is not None:
            why = choice.constraint.error or choice.message
            if why is not None:
                param = choice.constraint.param
                message = f"{param}: the answer cannot go on: {why}"
                return ApiError(400, message, param=param, code="invalid_schema")
        if choice.finish == "error":
            return ApiError(500, f"the engine failed: {choice.message}", code="engine_error")
        if choice.finish == "closed":
            return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        if choice.finish == "cancelled":
            return ApiError(500, "the request was cancelled", code="cancelled")
        return None

    def _usage(self) -> dict[str, Any]:
        firsts = [text.choice for text in self.texts[:: self.prepared.n]]
        lengths = [len(request.prompt) for request in self.prepared.requests[:: self.prepared.n]]
        prompt, completion = sum(lengths), sum(text.count for text in self.texts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(c.cached for c in firsts)},
        }

    def _timings(self) -> dict[str, Any]:
        """llama.cpp's names, of the first choice; milliseconds since the engine had the request."""
        text = self.texts[0]
        choice = text.choice
        end = choice.finished_s or time.monotonic() - self.generation.begun
        decode, prefill = end - choice.first_s, choice.first_s - choice.queued_s
        computed = choice.prompt - choice.cached
        return {
            "queued_ms": round(1000 * choice.queued_s, 3),
            "ttft_ms": round(1000 * choice.first_s, 3),
            "total_ms": round(1000 * end, 3),
            "cache_n": choice.cached,
            "prompt_n": computed,
            "prompt_ms": round(1000 * prefill, 3),
            "prompt_per_second": round(computed / prefill, 1) if prefill > 0 else None,
            "predicted_n": text.count,
            "predicted_ms": round(1000 * decode, 3),
            "predicted_per_second": (
                round((text.count - 1) / decode, 1) if decode > 0 and text.count > 1 else None
            ),
        }

    def _echo(self, index: int) -> str:
        return self.prepared.echo[index // self.prepared.n] if self.prepared.echo else ""

    def _logprobs(self, text: ChoiceText) -> dict[str, Any] | None:
        """Log-probabilities of the tokens that the last read gave, in OpenAI's two forms."""
        if not self.prepared.logprobs:
            return None
        entries, text.logprobs = text.logprobs, []
        name, data = self.model.name_of, self.model.table.spelled

        def show(token: int, value: float) -> dict[str, Any]:
            value = max(value, -9999.0)  # JSON has no infinity
            return {"token": name(token), "logprob": value, "bytes": list(data(token))}

        if self.is_chat:
            return {
                "content": [
                    show(*own) | {"top_logprobs": [show(*item) for item in top if item[0] >= 0]}
                    for own, *top in entries
                ]
            }
        result: dict[str, Any] = {
            "tokens": [name(own[0]) for own, *_ in entries],
            "token_logprobs": [max(own[1], -9999.0) for own, *_ in entries],
            "top_logprobs": [
                {name(t): max(value, -9999.0) for t, value in [own, *top] if t >= 0}
                for own, *top in entries
            ],
            "text_offset": [],
        }
        for own, *_ in entries:
            result["text_offset"].append(text.offset)
            text.offset += len(text.told.push([own[0]]))
        return result

    # ---- one object ----

    async def _whole(self, send: Send) -> None:
        parts: list[list[tuple[str, str]]] = [[] for _ in self.texts]
        deltas: list[list[Delta]] = [[] for _ in self.texts]
        logprobs: list[dict[str, Any] | None] = [None for _ in self.texts]
        error = None
        while error is None and any(text.finish_reason is None for text in self.texts):
            await self.generation.wait()
            if self.generation.ended == "disconnect":
                return
            for index, (text, part) in enumerate(zip(self.texts, parts, strict=True)):
                if text.finish_reason is None:
                    part.append(self._read(text))
                    deltas[index] += text.calls
                    logprobs[index] = _join(logprobs[index], self._logprobs(text))
                    error = error or self._failure(text)
        if error is not None:
            await _send_json(send, error.status, error.json(), error.headers.items())
            return
        choices = []
        for index, (text, part) in enumerate(zip(self.texts, parts, strict=True)):
            thoughts = "".join([thought for thought, _ in part])
            answer = self._echo(index) + "".join([piece for _, piece in part])
            choice: dict[str, Any] = {"index": index}
            if self.is_chat:
                choice["message"] = {"role": "assistant", "content": answer}
                if deltas[index]:
                    choice["message"] = {
                        "role": "assistant",
                        "content": answer or None,
                        "tool_calls": merge(deltas[index]),
                    }
                if self.prepared.reasoning is not None:
                    choice["message"]["reasoning_content"] = thoughts or None
            else:
                choice["text"] = answer
            choice |= {"logprobs": logprobs[index], "finish_reason": text.finish_reason}
            choices.append(choice)
        body = {
            "id": self.id,
            "object": "chat.completion" if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
            "usage": self._usage(),
            "timings": self._timings(),
        }
        extra = [(name.decode(), value.decode()) for name, value in self.extra_headers]
        await _send_json(send, 200, json.dumps(body).encode(), extra)

    # ---- a stream ----

    async def _stream(self, send: Send) -> None:
        generation = self.generation
        headers = STREAM_HEADERS + self.extra_headers
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        head = (
            f'data: {{"id":"{self.id}","object":"{kind}","created":{self.created},'
            f'"model":{quote(self.model.name)},"choices":['
        )
        tail = '],"usage":null}\n\n' if self.prepared.include_usage else "]}\n\n"
        pieces = [head + self._opening(index) + tail for index in range(len(self.texts))]
        left = len(self.texts)
        pieces = [piece for piece in pieces if self.is_chat or self.prepared.echo]
        error = None
        while left and error is None:
            await generation.wait()
            if generation.ended in ("disconnect", "stall"):
                return
            for index, text in enumerate(self.texts):
                if text.finish_reason is not None:
                    continue
                thoughts, answer = self._read(text)
                is_end = text.finish_reason is not None
                if thoughts or answer or text.calls or text.logprobs or is_end:
                    pieces.append(head + self._delta(index, text, thoughts, answer) + tail)
                left -= text.finish_reason is not None
                error = error or self._failure(text)
            if error is not None:
                pieces.append(f"data: {json.dumps(error.body())}\n\n")
            elif not left and self.prepared.include_usage:
                usage = json.dumps(self._usage())
                timings = json.dumps(self._timings())
                pieces.append(f'{head}],"usage":{usage},"timings":{timings}}}\n\n')
            if not left or error is not None:
                pieces.append("data: [DONE]\n\n")
            now = time.monotonic()
            if not pieces and now - generation.written > hub.KEEP_ALIVE:
                pieces.append(": waiting\n\n")
            if pieces:
                body = "".join(pieces).encode()
                pieces.clear()
                more = bool(left) and error is None
                generation.written = generation.writing_since = now
                await send({"type": "http.response.body", "body": body, "more_body": more})
                generation.writing_since = 0.0

    def _opening(self, index: int) -> str:
        if self.is_chat:
            delta = '"delta":{"role":"assistant","content":""}'
        else:
            delta = f'"text":{quote(self._echo(index))}'
        return f'{{"index":{index},{delta},"logprobs":null,"finish_reason":null}}'

    def _delta(self, index: int, text: ChoiceText, thoughts: str, answer: str) -> str:
        if not self.is_chat:
            delta = f'"text":{quote(answer)}'
        elif text.calls:
            parts = {"reasoning_content": thoughts, "content": answer}
            found = {name: value for name, value in parts.items() if value}
            delta = f'"delta":{json.dumps(found | {"tool_calls": text.calls})}'
        elif not thoughts:
            delta = f'"delta":{{"content":{quote(answer)}}}' if answer else '"delta":{}'
        else:
            content = f',"content":{quote(answer)}' if answer else ""
            delta = f'"delta":{{"reasoning_content":{quote(thoughts)}{content}}}'
        reason = f'"{text.finish_reason}"' if text.finish_reason else "null"
        logprobs = self._logprobs(text)
        told = json.dumps(logprobs) if logprobs else "null"
        return f'{{"index":{index},{delta},"logprobs":{told},"finish_reason":{reason}}}'


def _join(a: dict[str, Any] | None, b: dict[str, Any] | None) -> dict[str, Any] | None:
    """Two pieces of log-probabilities as one."""
    return {key: a[key] + b[key] for key in b} if a and b else a or b


async def _send_json(
    send: Callable[[Any], Awaitable[None]], status: int, body: bytes, headers: Any = ()
) -> None:
    fields = {"content-type": "application/json", "content-length": str(len(body)), **dict(headers)}
    raw = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
