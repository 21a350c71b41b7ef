"""HTTP as it comes from strangers: uvicorn's protocol with limits on headers and on patience."""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import ApiError

__all__ = ["make_protocol"]

REASONS = {
    400: b"Bad Request",
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
}


class _Protocol(HttpToolsProtocol):
    """Adds to uvicorn's: 431 for long headers, 408 for slow ones, and who has gone away."""

    max_headers = 64 << 10
    header_timeout = 10.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._size = 0  # bytes of the headers so far
        self._in_headers = True
        self._is_refused = False
        self._cycles: list[Any] = []
        self._timer: asyncio.TimerHandle | None = None
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        # uvicorn tells the last of pipelined requests alone that its client has gone
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self._in_headers:
            if self._timer is None:
                self._start_timer()
            self._size += len(data)
        super().data_received(data)
        # what does not even end is not counted by on_header
        if self._in_headers and self._size > self.max_headers and not self._is_refused:
            self._refuse(431, "the headers are too large")

    def on_message_begin(self) -> None:
        self._in_headers = True
        self._fields = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += len(name) + len(value) + 4
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers, self._size = False, 0
        self._stop_timer()
        if self._is_refused:
            return
        if self._fields + len(self.url) > self.max_headers:
            self._refuse(431, "the headers are too large")
            return
        try:
            httptools.parse_url(self.url).path.decode("ascii")
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError, AttributeError):
            self._refuse(400, "the address is not a valid URL")
            return
        self.scope["state"]["abort"] = self.transport.abort
        super().on_headers_complete()
        self._cycles = [c for c in self._cycles if not c.response_complete]
        self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_headers = True
        if not self._is_refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if not self._is_refused:
            self._refuse(400, "the request is not valid HTTP")

    # ---- patience ----

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self.header_timeout, self._on_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_slow(self) -> None:
        self._timer = None
        if self.transport.is_closing() or any(not c.response_complete for c in self._cycles):
            return  # a pipelined request may take its time while the one before is answered
        if self._size:
            self._refuse(408, "the headers did not come in time")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        self._is_refused = True
        self._stop_timer()
        if self.transport.is_closing():
            return
        busy = [c for c in self._cycles if not c.response_complete]
        is_own = busy == [self.cycle] and self.cycle.more_body and not self.cycle.response_started
        if busy and not is_own:  # else it is the body of this very request that is broken
            self.transport.abort()  # amid another answer there is no place for this one
            return
        body = ApiError(status, message).json()
        head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
        head = head % (status, REASONS[status], len(body))
        self.transport.write(head + b"connection: close\r\n\r\n" + body)
        self.transport.close()


def make_protocol(max_headers: int, header_timeout: float) -> type[_Protocol]:
    """A protocol class for uvicorn. max_headers: bytes; header_timeout: seconds."""
    limits = {"max_headers": max_headers, "header_timeout": header_timeout}
    return type("Protocol", (_Protocol,), limits)
