"""The engine within the server's event loop: requests in, their new tokens out, a few wake-ups.

The engine's own thread computes and never waits for Python; this one is told by a file descriptor
that there is news. News is read in rounds, and a round that had news of many requests is followed
by a pause: with a few streams there is none, with many their tokens gather meanwhile and leave in
fewer, larger pieces, so that passing tokens on does not take the engine's cores away.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from ..engine import Engine, EngineBusy, EngineClosed, Request
from ..libllaisys.engine import Finish, LlaisysEvent
from .grammar import Constraint
from .metrics import Metrics

__all__ = ["KEEP_ALIVE", "Choice", "Generation", "Hub"]

KEEP_ALIVE = 15.0  # seconds after which a stream that waits sends a comment, for proxies
FEW = 4  # requests with news in a round after which there is no pause
PAUSE_PER_REQUEST = 0.0003  # seconds; passing news of one on takes about a tenth of it
FINISH = {finish: finish.name.lower() for finish in Finish}
PAUSE = 0.025  # seconds at most: 40 updates a second look smooth
PAUSE_CONSTRAINED = 0.004  # where some answer's next token waits for news of its last to be read


class Choice:
    """One request of the engine: what has come of it, and what has not been read yet."""

    __slots__ = (
        "cached",
        "completion",
        "constraint",
        "finish",
        "finished_s",
        "first_s",
        "generation",
        "index",
        "logprobs",
        "message",
        "number",
        "prompt",
        "queued_s",
        "tokens",
        "told",
    )

    def __init__(self, generation: Generation, index: int) -> None:
        self.generation, self.index = generation, index
        self.constraint: Constraint | None = None
        self.number = 0  # the engine's
        self.tokens: list[int] = []  # unread
        self.logprobs: list[list[tuple[int, float]]] = []  # unread: the token's, then the top ones
        self.finish: str | None = None
        self.message: str | None = None
        self.prompt = self.cached = self.completion = 0
        self.queued_s = self.first_s = self.finished_s = 0.0  # since submission; 0: not yet
        self.told = 0.0  # when the last news came, in monotonic seconds

    def take(self, event: LlaisysEvent) -> None:
        count = event.ntoken
        if count:
            tokens = event.tokens[:count]
            self.tokens += tokens
            if self.constraint is not None:  # first of all: the next token waits for it
                self.constraint.news(tokens, is_last=bool(event.finish))
            width = getattr(event, "nlogprob", 0)  # per token; 0 where nobody asked
            for i in range(0, count * width, width or 1):
                entry = event.logprobs[i : i + width]
                self.logprobs.append([(item.token, item.logprob) for item in entry])
        if not self.completion:
            self.prompt, self.cached = event.prompt_tokens, event.cached_tokens
            self.queued_s, self.first_s = event.queued_s, event.first_token_s
        if event.finish:
            self.finish = FINISH[event.finish]
            self.finished_s = event.finished_s
            if event.message:
                self.message = event.message.decode("utf-8", "replace")
            if self.finish == "error" and self.generation.hub.state == "ready":
                self.generation.hub.state = "failed"  # a device that failed stays so
        self.generation.hub.metrics.took(self, count)
        self.completion += count
        self.generation.wake()


class Generation:
    """The choices of one HTTP request; wait() returns when there is news of some of them."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.choices: list[Choice] = []
        self.ended: str | None = None  # why the server gave up: "disconnect", "timeout", "stall"
        self.begun = time.monotonic()
        self.written = self.begun  # when something was last sent
        self.writing_since = 0.0  # monotonic seconds; 0 while nothing is being written
        self.abort: Callable[[], None] | None = None  # closes the client's connection at once
        self._waiter: asyncio.Future[None] | None = None
        self._has_news = False

    def wake(self) -> None:
        self._has_news = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        if not self._has_news:
            self._waiter = self.hub.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._has_news = False

    def give_up(self, why: str) -> None:
        """Ends all choices; whoever waits is woken at once."""
        if self.ended is None:
            self.ended = why
        self.cancel()
        self.wake()

    def cancel(self) -> None:
        for choice in self.choices:
            if choice.finish is None:
                self.hub.engine.cancel(choice.number)


def _constrained(generation: Generation) -> int:
    return sum([choice.constraint is not None for choice in generation.choices])


class Hub:
    """Opens nothing by itself: given an engine, it runs requests from within one event loop."""

    def __init__(self, metrics: Metrics, request_timeout: float, stall_timeout: float) -> None:
        self.metrics = metrics
        self.loop = asyncio.get_running_loop()
        self.engine: Engine | None = None
        self.state = "loading"  # "ready", "draining", "failed", "stopped"
        self.generations: set[Generation] = set()
        self.constrained = 0  # answers under way that follow a grammar
        self._timeouts = (request_timeout, stall_timeout)
        self._reading = False
        self._janitor: asyncio.Task[None] | None = None

    def open(self, engine: Engine) -> None:
        self.engine = engine
        self.state = "ready"
        self._listen()
        self._janitor = self.loop.create_task(self._watch())

    # ---- requests ----

    def submit(
        self, requests: Sequence[Request], constrain: Callable[[], Constraint] | None = None
    ) -> Generation:
        """Starts requests, all or none. Raises EngineBusy, EngineClosed or RequestError."""
        generation = Generation(self)
        try:
            for index, request in enumerate(requests):
                choice = Choice(generation, index)
                if constrain is not None:
                    choice.constraint = constrain()
                choice.number = self._submit(request, choice)
                if choice.constraint is not None:
                    choice.constraint.begin(self.engine, choice.number)
                generation.choices.append(choice)
        except BaseException:
            generation.cancel()
            raise
        self.generations.add(generation)
        self.constrained += _constrained(generation)
        return generation

    def _submit(self, request: Request, choice: Choice) -> int:
        try:
            return self.engine.submit(request, choice.take)
        except EngineBusy:
            # ended requests give their memory back to the next poll, which a pause may hold up
            self._read_all()
            return self.engine.submit(request, choice.take)

    def finish(self, generation: Generation) -> None:
        """Must come once for each generation: whatever still runs ends, and nobody waits for it."""
        generation.cancel()
        if generation in self.generations:
            self.generations.discard(generation)
            self.constrained -= _constrained(generation)

    # ---- rounds of news ----

    def _listen(self) -> None:
        if not self._reading and self.engine is not None:
            self._reading = True
            self.loop.add_reader(self.engine.fileno(), self._round)

    def _unlisten(self) -> None:
        if self._reading:
            self._reading = False
            self.loop.remove_reader(self.engine.fileno())

    def _round(self) -> None:
        count = self._read_all()
        if count > FEW and self._reading:
            self._unlisten()
            pause = PAUSE if not self.constrained else PAUSE_CONSTRAINED
            self.loop.call_later(min(count * PAUSE_PER_REQUEST, pause), self._resume)

    def _read_all(self) -> int:
        """How many requests had news."""
        count = 0
        try:
            while more := self.engine.poll():
                count += more
        except EngineClosed:
            self._unlisten()
        return count

    def _resume(self) -> None:
        if self.state != "stopped":
            self._listen()

    # ---- time ----

    async def _watch(self) -> None:
        """Gives up what takes too long, with a precision of some tenths of a second."""
        total, stall = self._timeouts
        while True:
            await asyncio.sleep(0.25)
            now = time.monotonic()
            for generation in list(self.generations):
                if generation.writing_since and now - generation.writing_since > stall:
                    generation.give_up("stall")
                    if generation.abort is not None:
                        generation.abort()
                elif now - generation.begun > total:
                    generation.give_up("timeout")
                elif now - generation.written > KEEP_ALIVE:
                    generation.wake()  # to send a sign of life

    async def drain(self, timeout: float) -> None:
        """Refuses new requests, waits for those under way, then ends what is left with "closed"."""
        self.state = "draining"
        until = time.monotonic() + timeout
        while self.generations and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await self.stop()

    async def stop(self) -> None:
        """Ends everything now, and gives readers a moment to tell their clients."""
        self.state = "stopped"
        if self.engine is None:
            return
        await asyncio.to_thread(self.engine.stop)
        self._read_all()
        self._unlisten()
        for _ in range(50):
            if not self.generations:
                break
            await asyncio.sleep(0.02)
        if self._janitor is not None:
            self._janitor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._janitor
