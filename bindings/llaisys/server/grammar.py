"""Grammars that answers must follow: compiled with care, and turned into masks of allowed tokens.

llguidance does the work (MIT licence, one wheel without dependencies; masks take microseconds). Two
things are this module's: what strangers send is compiled in a process of its own first, within a
time limit (see trial.py), and masks are computed by worker threads that hand them to the engine
themselves, so that neither the engine's thread nor the event loop waits for a grammar.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tokenizer import _readable_errors
from . import trial
from .errors import ApiError
from .logs import log

if TYPE_CHECKING:
    from ..engine import Engine
    from ..tokenizer import Tokenizer

__all__ = ["Constraint", "Grammars", "Plan"]

SECONDS = 1.0  # a grammar may take to compile
START_SECONDS = 60.0  # the trial process may take to start
MAX_WAITING = 32  # requests that may wait for the trial process
MAX_CACHED = 64  # grammars
MAX_CACHED_BYTES = 64 << 20  # about what they may take
STATE_BYTES = 2048  # about what a token adds to a grammar's automaton, where it is a new one
WORKERS = 4
LIMITS = {  # of llguidance: a mask takes some 20 ms at most
    "max_items_in_row": 4000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 100_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


@dataclass
class Plan:
    """What an answer must follow, in llguidance's Lark.

    after: a token; what comes up to it, and with it, is free. repeats: once the grammar is at its
    end, the answer is free again up to the next such token; else only the end of the text follows.
    param: of the request, for messages.
    """

    grammar: str
    param: str
    after: int | None = None
    repeats: bool = False


class _Grammar:
    """A compiled grammar; matchers are copies of it, and share its automaton."""

    def __init__(self, matcher: Any, size: int) -> None:
        self.matcher, self.cost = matcher, size


class Grammars:
    """Compiles, and keeps the grammars used last. Belongs to one event loop.

    To create one takes seconds for a large vocabulary, in which no other Python runs: it is better
    done while the server starts. Raises TokenizerError.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos: Sequence[int]) -> None:
        self.vocab = vocab
        with _readable_errors("llguidance"):
            text, ends = tokenizer.to_json(), list(eos)
            self._setup = {"tokenizer": text, "vocab": vocab, "eos": ends, "limits": LIMITS}
            self._tokenizer = trial.make_tokenizer(text, vocab, ends)
        self._cache: OrderedDict[str, _Grammar | str] = OrderedDict()
        self._lock = asyncio.Lock()
        self._waiting = 0
        self._trial: asyncio.subprocess.Process | None = None
        self._workers = ThreadPoolExecutor(WORKERS, "masks")

    async def compile(self, plan: Plan) -> _Grammar:
        """Raises ApiError 400 where the grammar is wrong, too large or takes too long."""
        found = self._cache.get(plan.grammar)
        if found is None:
            if self._waiting >= MAX_WAITING:
                raise ApiError(429, "too many new schemas at once", retry_after=1)
            self._waiting += 1
            try:
                async with self._lock:
                    found = self._cache.get(plan.grammar) or await self._compile(plan.grammar)
            finally:
                self._waiting -= 1
        self._keep(plan.grammar, found)
        if isinstance(found, str):
            raise ApiError(400, f"{plan.param}: {found}", param=plan.param, code="invalid_schema")
        return found

    def close(self) -> None:
        """Waits for the workers: afterwards none of them touches the engine."""
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._end_trial()

    def submit(self, work: Any, *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # shut down: the answers are ending
            self._workers.submit(work, *args)

    def _keep(self, key: str, grammar: _Grammar | str) -> None:
        self._cache[key] = grammar
        self._cache.move_to_end(key)
        costs = [len(k) + getattr(g, "cost", 0) for k, g in self._cache.items()]
        total = sum(costs)
        for cost in costs[:-1]:
            if len(self._cache) <= MAX_CACHED and total <= MAX_CACHED_BYTES:
                break
            self._cache.popitem(last=False)
            total -= cost

    async def _compile(self, grammar: str) -> _Grammar | str:
        error = await self._try(grammar)
        if error is not None:
            return error
        matcher, error = await asyncio.to_thread(trial.check, self._tokenizer, grammar, LIMITS)
        return _Grammar(matcher, 4 * len(grammar)) if error is None else error

    # ---- the trial process ----

    async def _try(self, grammar: str) -> str | None:
        """What is wrong with a grammar, found out where it can do no harm."""
        try:
            process = await self._start_trial()
            return await asyncio.wait_for(_ask(process, grammar), SECONDS)
        except asyncio.TimeoutError:
            reason = f"takes more than {SECONDS:g} s to compile"
        except (EOFError, ConnectionError):
            reason = "takes too much memory to compile"
        except asyncio.CancelledError:
            self._end_trial()  # its answer would be taken for the next one's
            raise
        self._end_trial()
        return f"{reason}: make it smaller; multipleOf, pattern and large counts cost most"

    async def _start_trial(self) -> asyncio.subprocess.Process:
        if self._trial is None or self._trial.returncode is not None:
            self._trial = await asyncio.create_subprocess_exec(
                sys.executable,
                str(Path(trial.__file__)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the server's
            )
            try:
                await asyncio.wait_for(_ask(self._trial, self._setup), START_SECONDS)
            except (asyncio.TimeoutError, EOFError, ConnectionError) as error:
                self._end_trial()
                raise ApiError(500, "the process that compiles schemas does not start") from error
        return self._trial

    def _end_trial(self) -> None:
        process, self._trial = self._trial, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


async def _ask(process: asyncio.subprocess.Process, question: Any) -> Any:
    process.stdin.write(json.dumps(question).encode() + b"\n")
    await process.stdin.drain()
    answer = await process.stdout.readline()
    if not answer.endswith(b"\n"):
        raise EOFError
    return json.loads(answer)


class Constraint:
    """One answer's way through a grammar.

    news() is called by the event loop, in the order of the answer's tokens. A token under a mask
    is followed by no other before the next mask is set, so that one worker at a time looks at it.
    """

    def __init__(self, grammars: Grammars, grammar: _Grammar, plan: Plan) -> None:
        self.error: str | None = None  # why the answer cannot go on; the request is cancelled then
        self.param = plan.param
        self._grammars, self._grammar, self._plan = grammars, grammar, plan
        self._matcher = grammar.matcher.deep_copy()
        self._is_free = plan.after is not None
        self._count = 0  # of the answer's tokens
        self._engine: Engine | None = None
        self._number = 0

    def begin(self, engine: Engine, number: int) -> None:
        self._engine, self._number = engine, number
        if not self._is_free:
            self._grammars.submit(self._step, None)

    def news(self, tokens: Sequence[int], *, is_last: bool) -> None:
        self._count += len(tokens)
        if is_last or not tokens:
            return
        if not self._is_free:
            self._grammar.cost += STATE_BYTES
            self._grammars.submit(self._step, tokens[-1])
        elif tokens[-1] == self._plan.after:
            self._is_free = False
            self._grammars.submit(self._step, None)

    def _step(self, token: int | None) -> None:
        """In a worker: moves on by a token and sets the mask for the next."""
        is_set = False
        try:
            self._set(token)
            is_set = True
        finally:
            if not is_set:  # whatever it was, a panic in Rust even: the answer must not wait
                log("failure", logging.ERROR, trace=True, what="mask")
                self._fail("the grammar has failed")

    def _set(self, token: int | None) -> None:
        matcher, plan = self._matcher, self._plan
        if token is not None and not matcher.consume_token(token):
            self._fail(matcher.get_error())
            return
        if plan.repeats and matcher.is_stopped() and not matcher.is_error():
            self._matcher = self._grammar.matcher.deep_copy()
            self._is_free = True  # before the engine may tell of more
            self._engine.set_mask(self._number, self._count, None)
            return
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            self._fail(matcher.get_error())
            return
        size = (self._grammars.vocab + 31) // 32 * 4
        self._engine.set_mask(self._number, self._count, mask[:size])

    def _fail(self, error: str) -> None:
        self.error = trial.explain(error)
        with contextlib.suppress(Exception):  # the engine is closing
            self._engine.cancel(self._number)
