"""From a configuration to a running server, and back to nothing when a signal says so.

The port is taken first, so that a second server on it is refused before it loads anything. While
the model loads, the server already answers: /health with 503. The first SIGTERM or SIGINT drains:
new requests are refused with 503, those under way may finish for drain_timeout seconds. The second
one ends them at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from ..engine import Engine
from ..libllaisys import LlaisysError
from .app import Server, make_app
from .config import Config
from .hub import Hub
from .logs import log, set_up
from .prepare import Model
from .protocol import make_protocol

__all__ = ["ServeError", "serve"]

BACKLOG = 1024
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class ServeError(OSError):
    """The server could not start; one line that says why."""


def serve(config: Config, begun: float | None = None) -> None:
    """Serves until SIGTERM or SIGINT. Raises ServeError, LlaisysError or TokenizerError.

    begun: when the program began, in seconds of time.perf_counter, for the start-up breakdown.
    """
    begun = time.perf_counter() if begun is None else begun
    # one text at a time is no faster with the tokenizer's threads, as many as there are cores
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    clock = _Clock(begun)
    clock.lap("imports")
    listener = _bind(config.host, config.port)
    set_up(config.log_format)
    try:
        runner = _Runner(config, listener, clock)
        uvicorn_config = uvicorn.Config(
            make_app(runner.server),
            http=make_protocol(config.max_headers, config.header_timeout),
            ws="none",
            loop="uvloop",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # names of clients that others could forge
            backlog=BACKLOG,
            limit_concurrency=config.max_connections,
            timeout_graceful_shutdown=2,
        )
        http = _Http(uvicorn_config)
        loop = uvicorn_config.get_loop_factory()()
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(runner.run(http))
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            asyncio.set_event_loop(None)
            loop.close()
    finally:
        listener.close()
    if runner.error is not None:
        raise runner.error


class _Clock:
    """Where the time of the start went: seconds by part, in order."""

    def __init__(self, begun: float) -> None:
        self.begun = self._last = begun
        self.parts: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.parts[name] = now - self._last
        self._last = now

    def line(self) -> str:
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.parts.items())
        return f"ready in {self._last - self.begun:.2f} s ({parts})"


class _Http(uvicorn.Server):
    """uvicorn's server, but signals are the runner's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Runner:
    def __init__(self, config: Config, listener: socket.socket, clock: _Clock) -> None:
        self.config, self.listener, self.clock = config, listener, clock
        self.server = Server(config)
        self.error: Exception | None = None
        self._signals = 0
        self._told = asyncio.Event()

    async def run(self, http: uvicorn.Server) -> None:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        serving = loop.create_task(http.serve(sockets=[self.listener]))
        engine = None
        try:
            engine = await self._load()
            if engine is not None:
                self._announce()
                gc.collect()
                gc.freeze()  # what lives as long as the server need not be looked through again
                await self._wait(serving)
                await self._drain()
        finally:
            http.should_exit = True
            await serving
            if self.server.model is not None:
                await asyncio.to_thread(self.server.model.close)
            if engine is not None:
                engine.close()

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        log("signal", name=signal.Signals(number).name, count=self._signals)
        self._told.set()

    async def _load(self) -> Engine | None:
        """Opens the model in a thread; None if that failed, or a signal came first."""
        config, server = self.config, self.server
        hub = Hub(server.metrics, config.request_timeout, config.stall_timeout)
        try:
            model = await asyncio.to_thread(Model, config)
            self.clock.lap("tokenizer")
            # a model that opens cannot be interrupted: its thread is waited for either way
            grammars = asyncio.ensure_future(asyncio.to_thread(model.prepare_grammars))
            engine = await asyncio.to_thread(lambda: Engine(config.model, **config.engine))
        except (LlaisysError, ValueError, OSError) as error:
            self.error = error
            return None
        self.clock.lap("model")
        await grammars  # which has run beside it
        self.clock.lap("schemas")
        meta = engine.meta
        model.max_seq, model.vocab = meta.maxseq, meta.voc
        stats = engine.stats()  # more at once would be refused for ever, with a 429 at that
        model.max_choices = min(config.max_choices, stats["max_seqs"] + stats["max_queue"])
        if self._told.is_set():
            return engine
        server.metrics.model = model.name
        server.metrics.stats = lambda: engine.stats() if hub.state != "stopped" else None
        server.model, server.hub = model, hub
        hub.open(engine)
        return engine

    def _announce(self) -> None:
        host, port = self.listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        model, stats = self.server.model, self.server.metrics.stats()
        if model is None:  # a signal came while the model was loading
            return
        tokens = stats["kv_blocks"] * stats["kv_block"]
        print(
            f"llaisys: {model.name}: {stats['maxseq']} tokens a request, {stats['max_seqs']} "
            f"requests at once, {stats['max_queue']} may wait, {tokens} tokens of KV cache\n"
            f"llaisys: {self.clock.line()}\n"
            f"llaisys: listening on http://{host}:{port} "
            f"({'with' if self.config.api_keys else 'without'} API key; Ctrl-C ends)",
            file=sys.stderr,
            flush=True,
        )
        if not self.config.api_keys and not host.startswith(("127.", "[::1]")):
            log("whoever reaches this port may ask: there is no API key", logging.WARNING)

    async def _wait(self, serving: asyncio.Task[Any]) -> None:
        told = asyncio.ensure_future(self._told.wait())
        await asyncio.wait((told, serving), return_when=asyncio.FIRST_COMPLETED)
        told.cancel()

    async def _drain(self) -> None:
        hub = self.server.hub
        if hub is None:
            return
        log("draining", running=len(hub.generations), limit_s=self.config.drain_timeout)
        begun = time.monotonic()
        self._told.clear()
        draining = asyncio.ensure_future(hub.drain(self.config.drain_timeout))
        again = asyncio.ensure_future(self._told.wait())
        await asyncio.wait((draining, again), return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            draining.cancel()
            await hub.stop()
        again.cancel()
        log("drained", seconds=round(time.monotonic() - begun, 2), cut=len(hub.generations))


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket; connections wait in it until the server takes them."""
    if not 0 <= port < 65536:
        raise ServeError(f"port {port}: expected 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            # not SO_REUSEPORT, with which two servers would share the port unnoticed
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise ServeError(
                f"{host}:{port} is in use by another program: choose another --port"
            ) from error
        text = getattr(error, "strerror", None) or str(error)
        raise ServeError(f"{host}:{port}: {text}") from error
    listener.setblocking(False)
    return listener
