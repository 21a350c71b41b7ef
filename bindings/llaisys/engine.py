"""Many requests at once over one model: tokens in, tokens out.

    with Engine("models/refrain-mini") as engine:
        for answer in engine.generate([[1, 2, 3], [4, 5, 6]], max_new_tokens=16):
            print(answer.tokens, answer.finish)

    async def chat(engine, prompt):
        async with engine.stream(prompt, temperature=0.8, seed=7) as stream:
            async for token in stream:  # as they come; leaving the block early cancels the request
                print(token)
        print(stream.answer.finish, stream.answer.cached_tokens)

Requests share the model's steps and the KV cache of common prefixes; a request's tokens do not
depend on what else runs. An engine is used by one thread at a time, either through generate or, by
any number of streams, within one asyncio event loop. The C header llaisys/engine.h has the details.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import time
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .libllaisys import (
    LIB_LLAISYS,
    DataType,
    DeviceType,
    LlaisysError,
    LlaisysQwen2Meta,
)
from .libllaisys.engine import (
    Constraint,
    EngineBusy,
    EngineClosed,
    Finish,
    LlaisysEngineOptions,
    LlaisysEngineStats,
    LlaisysEvent,
    LlaisysLogitBias,
    LlaisysRequest,
    RequestError,
)
from .options import check_sizes, model_options, sampling_options

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

__all__ = [
    "Answer",
    "Engine",
    "EngineBusy",
    "EngineClosed",
    "Logprobs",
    "Request",
    "RequestError",
    "Stream",
    "plan",
]

EVENTS = 64  # read with one call
_USAGE = (
    "prompt_tokens",
    "cached_tokens",
    "preemptions",
    "queued_s",
    "first_token_s",
    "finished_s",
)


@dataclass
class Request:
    """A prompt in token ids, and how to go on.

    max_new_tokens None, or more than there is room for, means up to the engine's max_seq tokens in
    all. temperature 0 or top_k 1 is greedy, and temperature None is 1; top_k 0 or None, top_p 1 or
    None and min_p 0 switch these filters off, repetition_penalty 1 (over prompt and answer),
    presence_penalty 0 and frequency_penalty 0 (over the answer) the penalties.
    logit_bias: by token, -100 to 100, or -inf, which bans the token.
    logprobs: None, or how many of the most probable tokens are told with each token beside itself.
    constrained: the answer's tokens wait for masks, see Engine.set_mask; with constrain_after, only
    those behind that token. stop: tokens that end the answer beside the model's own, which ignore_eos leaves out. Higher
    priorities go first. cache False neither uses nor fills the prefix cache; requests share
    prefixes only within one cache_salt.
    """

    prompt: Sequence[int]
    max_new_tokens: int | None = None
    temperature: float | None = 0.0
    top_k: int | None = 0
    top_p: float | None = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    logprobs: int | None = None
    constrained: bool = False
    constrain_after: int | None = None
    stop: Sequence[int] = ()
    ignore_eos: bool = False
    priority: int = 0
    cache: bool = True
    cache_salt: int = 0


class Logprobs(NamedTuple):
    """Of one token of an answer: natural logarithms of the model's own probabilities.

    They are those before bias, penalties, temperature and filters. top: (token, logprob) of the
    most probable tokens, the most probable first.
    """

    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Answer:
    """What has come of a request; times are seconds since it was submitted, 0 for not yet.

    finish: None while more is to come, then "stop" (the last token ends the text), "length",
    "cancelled", "error" or "masked" (with a message) or "closed". logprobs: one for each of tokens, if the
    request asked for them.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish: str | None = None
    message: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    queued_s: float = 0.0
    first_token_s: float = 0.0
    finished_s: float = 0.0

    def take(self, event: LlaisysEvent) -> list[int]:
        """Adds an event to the answer and returns its tokens."""
        tokens = event.tokens[: event.ntoken]
        if event.finish or not self.tokens:  # what does not change in between
            for name in _USAGE:
                setattr(self, name, getattr(event, name))
        self.tokens += tokens
        n = event.nlogprob
        for i in range(0, event.ntoken * n, n or 1):
            own, *top = event.logprobs[i : i + n]
            self.logprobs.append(Logprobs(own.logprob, [(t.token, t.logprob) for t in top]))
        if event.finish:
            self.finish = Finish(event.finish).name.lower()
            self.message = event.message.decode("utf-8", "replace") if event.message else None
        return tokens


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


def _leave_engines() -> None:
    """A forked child has none of the engines' threads: to wait for one would be for ever."""
    for engine in _ENGINES:
        engine._engine = None
        engine._sinks.clear()


os.register_at_fork(after_in_child=_leave_engines)


class Engine:
    """A model folder in transformers' format, opened for many requests.

    max_seq: tokens of one request, prompt and answer together. max_seqs: requests computed at once.
    kv_tokens: tokens of the KV cache over all requests. kv_block: tokens of one of its blocks.
    max_queue: requests that may wait. mixed_rows: tokens of a step in which a request decodes,
    which bounds how long answers wait for others' prompts. max_logprobs: what a request's logprobs
    may be, up to 20. None is the engine's choice. The other options are those of Qwen2.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        device: DeviceType = DeviceType.CPU,
        *,
        device_ids: Sequence[int] | None = None,
        max_seq: int | None = None,
        max_seqs: int | None = None,
        kv_tokens: int | None = None,
        kv_block: int | None = None,
        max_queue: int | None = None,
        prefill_chunk: int | None = None,
        mixed_rows: int | None = None,
        max_logprobs: int | None = None,
        threads: int | None = None,
        dtype: DataType | None = None,
        progress: bool | None = None,
    ) -> None:
        self._engine = None
        self._sinks: dict[int, Callable[[LlaisysEvent], None]] = {}  # by request
        self._loop: asyncio.AbstractEventLoop | None = None  # which waits for the descriptor
        model = model_options(device, device_ids, max_seq, prefill_chunk, threads, dtype, progress)
        sizes = check_sizes(
            max_seqs=max_seqs,
            kv_tokens=kv_tokens,
            kv_block=kv_block,
            max_queue=max_queue,
            mixed_rows=mixed_rows,
        )
        options = LlaisysEngineOptions(model=model, **sizes)
        if max_logprobs is not None and not 0 <= max_logprobs <= 20:
            raise ValueError(f"max_logprobs: expected 0 to 20, found {max_logprobs}")
        options.max_logprobs = 0 if max_logprobs is None else max_logprobs or -1
        self._events = (LlaisysEvent * EVENTS)()
        self._count = ctypes.c_size_t()  # of those, read by the last call
        self._next = 0  # of those, the first not handed out yet
        self._engine = LIB_LLAISYS.llaisysEngineOpen(os.fsencode(model_path), ctypes.byref(options))
        _ENGINES.add(self)

    # ---- answers ----

    def generate(
        self,
        prompts: Iterable[Sequence[int] | Request],
        max_new_tokens: int | None = None,
        *,
        progress: bool | None = None,
        on_answer: Callable[[int, Answer], object] | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Answers all prompts and returns the answers in their order.

        A prompt is a list of token ids, for which the other arguments hold (see Request), or a
        Request of its own. Prompts beyond what the engine's queue holds wait here. progress: a bar
        on standard error; None draws it where that is a terminal. on_answer is called with index
        and answer as each one ends.
        """
        self._handle()
        self._clear_up()
        if self._sinks:
            raise RuntimeError("the engine is answering streams: generate would take their events")
        requests = [
            prompt if isinstance(prompt, Request) else Request(prompt, max_new_tokens, **options)
            for prompt in prompts
        ]
        answers = [Answer() for _ in requests]
        bar = _Bar(len(requests), progress)

        def sink(index: int, answer: Answer) -> Callable[[LlaisysEvent], None]:
            def take(event: LlaisysEvent) -> None:
                bar.tokens += len(answer.take(event))
                if answer.finish:
                    bar.done += 1
                    if on_answer is not None:
                        on_answer(index, answer)

            return take

        try:
            for index, request in enumerate(requests):
                is_last_try = False
                while True:
                    try:
                        self._submit(request, sink(index, answers[index]))
                        break
                    except EngineBusy:
                        if is_last_try:
                            raise
                    # ended requests give their memory back to the next poll
                    is_last_try = not self._sinks
                    self._pump(1000 if self._sinks else 0)
                    bar.draw()
            while self._sinks:
                self._pump(1000)
                bar.draw()
        finally:
            self._cancel_all()
            bar.close()
        return answers

    def stream(
        self, prompt: Sequence[int] | Request, max_new_tokens: int | None = None, **options: Any
    ) -> Stream:
        """Submits a request at once and returns its tokens as an asynchronous iterator.

        Takes what generate takes. Raises EngineBusy where the queue is full.
        """
        if not isinstance(prompt, Request):
            prompt = Request(prompt, max_new_tokens, **options)
        loop = asyncio.get_running_loop()
        self._clear_up()
        if self._loop not in (None, loop):
            raise RuntimeError("the engine is in use by another event loop")
        stream = Stream(self)
        stream._id = self._submit(prompt, stream._take)
        if self._loop is None:
            self._loop = loop
            loop.add_reader(LIB_LLAISYS.llaisysEngineFd(self._handle()), self._on_readable)
        return stream

    # ---- for an event loop of one's own ----

    def fileno(self) -> int:
        """A descriptor that is readable while there are events: whoever waits for it calls poll."""
        return LIB_LLAISYS.llaisysEngineFd(self._handle())

    def submit(self, request: Request, sink: Callable[[LlaisysEvent], None]) -> int:
        """Submits a request whose events poll hands to sink, and returns its number for cancel.

        sink reads the event's tokens before it returns, and must not raise.
        Raises EngineBusy where the queue is full. Not to be mixed with generate or stream.
        """
        return self._submit(request, sink)

    def poll(self, timeout: float = 0.0) -> int:
        """Hands out at most EVENTS events that are there, and returns how many there were.

        Where there are none, it waits for some, or for a signal, up to timeout seconds. The memory
        of requests that have ended is free again once a later call has returned.
        Raises EngineClosed once the engine is stopped and everything has been handed out.
        """
        return self._pump(int(1000 * timeout))

    def pending(self) -> list[int]:
        """Numbers of the requests whose end has not been handed out yet."""
        return list(self._sinks)

    def cancel(self, number: int) -> None:
        """Ends a request soon; one that has ended already is no error."""
        self._cancel(number)

    def set_mask(self, number: int, index: int, mask: bytes | None) -> None:
        """Says which tokens may stand at index of a constrained request's answer.

        mask: 32-bit words, in this machine's byte order; bit t % 32 of word t // 32 allows token t.
        None: the answer goes on without masks, until the request's constrain_after. index is the
        number of tokens that the answer has; RequestError otherwise. Any thread may call it, but
        none while close is called.
        """
        words = 0 if mask is None else len(mask) // 4
        LIB_LLAISYS.llaisysEngineSetMask(self._handle(), number, index, mask, words)

    # ---- what it does now ----

    def stats(self) -> dict[str, Any]:
        """Counts and times of struct LlaisysEngineStats; finished is a dict by reason."""
        stats = LlaisysEngineStats()
        LIB_LLAISYS.llaisysEngineStats(self._handle(), ctypes.byref(stats))
        values = {name: getattr(stats, name) for name, *_ in stats._fields_}
        values["finished"] = {f.name.lower(): stats.finished[f] for f in Finish if f}
        return values

    @property
    def meta(self) -> LlaisysQwen2Meta:
        """Dimensions of the model; maxseq is the one in force."""
        meta = LlaisysQwen2Meta()
        LIB_LLAISYS.llaisysEngineMeta(self._handle(), ctypes.byref(meta))
        return meta

    def is_end(self, token: int) -> bool:
        """Whether the token is one of those of the model that end a text."""
        return bool(LIB_LLAISYS.llaisysEngineIsEnd(self._handle(), token))

    def drain(self, timeout: float | None = None) -> None:
        """Takes no more requests and waits until all have ended; EngineBusy if time is up first."""
        timeout_ms = -1 if timeout is None else max(0, int(1000 * timeout))
        LIB_LLAISYS.llaisysEngineDrain(self._handle(), timeout_ms)

    def stop(self) -> None:
        """Ends all requests with "closed"; streams still give what has come so far."""
        LIB_LLAISYS.llaisysEngineStop(self._handle())

    def close(self) -> None:
        """Stops, tells the streams, and frees the engine's memory. May be called again."""
        engine = self._engine
        if not engine:
            return
        LIB_LLAISYS.llaisysEngineStop(engine)
        while self._sinks:
            self._pump(0)
        self._forget_loop()
        self._engine = None
        LIB_LLAISYS.llaisysEngineClose(engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        engine, self._engine = getattr(self, "_engine", None), None
        if engine:
            LIB_LLAISYS.llaisysEngineClose(engine)

    # ---- inside ----

    def _handle(self) -> int:
        if not self._engine:
            raise ValueError("the engine is closed")
        return self._engine

    def _submit(self, request: Request, sink: Callable[[LlaisysEvent], None]) -> int:
        sampling = sampling_options(request.top_k, request.top_p, request.temperature, request.seed)
        most = request.max_new_tokens
        if most is not None and most < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, found {most}")
        if not -(2**31) <= request.priority < 2**31:
            raise ValueError(f"priority: expected 32 bits, found {request.priority}")
        if not 0 <= request.cache_salt < 2**64:
            raise ValueError(f"cache_salt: expected 0 to 2**64 - 1, found {request.cache_salt}")
        if not request.repetition_penalty > 0:  # 0 would be the C field's default
            raise ValueError(
                f"repetition_penalty: expected above 0, found {request.repetition_penalty}"
            )
        if request.logprobs is not None and not 0 <= request.logprobs < 2**31:
            raise ValueError(f"logprobs: expected None or 0 to 20, found {request.logprobs}")
        constrained, after = Constraint(bool(request.constrained)), request.constrain_after
        if request.constrained and after is not None:
            constrained = Constraint.AFTER
            if not 0 <= after < 2**31:
                raise RequestError(f"constrain_after: expected a token's id, found {after}")
        prompt, stop = _ids("prompt", request.prompt), _ids("stop", request.stop)
        biased = _ids("logit_bias", list(request.logit_bias))
        values = array("f", request.logit_bias.values())
        bias = (LlaisysLogitBias * len(biased))(*zip(biased, values, strict=True))
        number = ctypes.c_uint64()
        LIB_LLAISYS.llaisysEngineSubmit(
            self._handle(),
            LlaisysRequest(
                prompt=_pointer(prompt),
                nprompt=len(prompt),
                max_tokens=min(most or 0, 2**63 - 1),
                stop=_pointer(stop),
                nstop=len(stop),
                ignore_eos=request.ignore_eos,
                sampling=sampling,
                min_p=request.min_p,
                repetition_penalty=request.repetition_penalty,
                presence_penalty=request.presence_penalty,
                frequency_penalty=request.frequency_penalty,
                logit_bias=bias,
                nlogit_bias=len(bias),
                logprobs=request.logprobs is not None,
                top_logprobs=request.logprobs or 0,
                constrained=constrained,
                constrain_after=-1 if after is None else after,
                priority=request.priority,
                no_cache=not request.cache,
                cache_salt=request.cache_salt,
            ),
            number,
        )
        self._sinks[number.value] = sink
        return number.value

    def _pump(self, timeout_ms: int) -> int:
        """Hands events to those who wait for them; returns how many were read.

        Whatever raises on the way, be it a signal, the rest is handed out by the next call.
        """
        if self._next == self._count.value:
            self._next = self._count.value = 0
            LIB_LLAISYS.llaisysEnginePoll(
                self._handle(), self._events, EVENTS, timeout_ms, ctypes.byref(self._count)
            )
        while self._next < self._count.value:
            event = self._events[self._next]
            take = self._sinks.pop if event.finish else self._sinks.get
            sink = take(event.request, None)
            self._next += 1
            if sink is None:  # an interrupt came between its submission and its note
                self._cancel(event.request)
            else:
                sink(event)
        return self._count.value

    def _on_readable(self) -> None:
        # An empty poll gives ended requests' memory back; events that never end come back here
        # after the loop's other tasks have had their turn.
        for _ in range(4):
            if not self._pump(0):
                break
        if not self._sinks:
            self._forget_loop()

    def _forget_loop(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(LIB_LLAISYS.llaisysEngineFd(self._engine))
        self._loop = None

    def _clear_up(self) -> None:
        """Ends what an ended loop, or a generate interrupted twice, has left behind."""
        if self._loop is None or self._loop.is_closed():
            self._loop = None
            self._cancel_all()

    def _cancel(self, number: int) -> None:
        if self._engine:
            LIB_LLAISYS.llaisysEngineCancel(self._engine, number)

    def _cancel_all(self) -> None:
        """Ends what nobody waits for any more, as after an exception."""
        if not self._sinks:
            return
        for number in self._sinks:
            self._cancel(number)
            self._sinks[number] = lambda event: None
        while self._sinks:
            self._pump(1000)


class Stream:
    """The tokens of one request as they come, for `async for`, within `async with` if need be.

    answer: what has come so far, with the reason once the request has ended.
    """

    def __init__(self, engine: Engine) -> None:
        self.answer = Answer()
        self._engine = engine
        self._id = 0
        self._tokens: deque[int] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def cancel(self) -> None:
        """Ends the request soon; tokens that have come by then are still given."""
        if not self.answer.finish:
            self._engine._cancel(self._id)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> int:
        while not self._tokens:
            if self.answer.finish == "error":
                raise LlaisysError(self.answer.message)
            if self.answer.finish:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._tokens.popleft()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def _take(self, event: LlaisysEvent) -> None:
        self._tokens.extend(self.answer.take(event))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def plan(
    model_path: str | os.PathLike[str],
    device: DeviceType = DeviceType.CPU,
    *,
    format: str = "text",
    device_ids: Sequence[int] | None = None,
    max_seq: int | None = None,
    max_seqs: int | None = None,
    kv_tokens: int | None = None,
    kv_block: int | None = None,
    prefill_chunk: int | None = None,
    threads: int | None = None,
    dtype: DataType | None = None,
) -> str:
    """Where every byte of an engine's arena would lie, without loading it: "text", "json", "svg".

    The options are those of Engine.
    """
    model = model_options(device, device_ids, max_seq, prefill_chunk, threads, dtype)
    sizes = check_sizes(max_seqs=max_seqs, kv_tokens=kv_tokens, kv_block=kv_block)
    options = LlaisysEngineOptions(model=model, **sizes)
    text = LIB_LLAISYS.llaisysEnginePlan(
        os.fsencode(model_path), ctypes.byref(options), format.encode()
    )
    try:
        return ctypes.string_at(text).decode()
    finally:
        LIB_LLAISYS.llaisysFreeString(text)


def _ids(name: str, ids: Sequence[int]) -> array[int]:
    try:
        return array("q", iter(ids))  # of bytes, too, one id each
    except OverflowError as error:
        raise RequestError(f"{name}: expected token ids, found one beyond 64 bits") from error


def _pointer(ids: array[int]) -> Any:
    return ctypes.cast(ids.buffer_info()[0], ctypes.POINTER(ctypes.c_int64))


class _Bar:
    """Progress on standard error: how many answers have ended, and tokens a second."""

    WIDTH, SECONDS = 24, 0.1  # characters; between drawings

    def __init__(self, total: int, show: bool | None) -> None:
        self.total, self.done, self.tokens = total, 0, 0
        self._show = sys.stderr.isatty() if show is None else show
        self._begun = time.monotonic()
        self._drawn = 0.0

    def draw(self, *, last: bool = False) -> None:
        now = time.monotonic()
        if not self._show or (not last and now - self._drawn < self.SECONDS):
            return
        self._drawn = now
        share = self.done / self.total if self.total else 1.0
        seconds = now - self._begun
        left = f"{seconds * (1 / share - 1):.0f}s" if share else "?"
        bar = ("#" * int(share * self.WIDTH)).ljust(self.WIDTH)
        print(
            f"\r{share:4.0%}|{bar}| {self.done}/{self.total} "
            f"[{seconds:.0f}s<{left}, {self.tokens / max(seconds, 1e-9):.0f} tokens/s]\033[K",
            end="\n" if last else "",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        self.draw(last=True)
