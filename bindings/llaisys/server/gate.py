"""What every request passes: an id, the key, a line in the log, errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError
from .logs import log

if TYPE_CHECKING:
    from .config import Config
    from .metrics import Metrics

__all__ = ["Gate", "read_body"]

# The chat page holds nothing secret, and asks for the key itself.
OPEN = ("/health", "/")
OPEN_UNDER = "/page/"
QUIET = {"/health", "/metrics"}  # asked every few seconds
ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
LINGER_BYTES, LINGER_SECONDS = 64 << 20, 5.0


class Gate:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, config: Config, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics
        self._keys = [key.encode() for key in config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.monotonic()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = 0

        async def tell(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                identity = (b"x-request-id", request_id.encode())
                message["headers"] = [*message.get("headers", ()), identity]
            await send(message)

        try:
            if self._keys and not self._may_enter(scope, headers):
                await send_error(tell, ApiError(401, "no valid API key", code="invalid_api_key"))
            else:
                await self.app(scope, receive, tell)
        except ApiError as error:
            await send_error(tell, error)
        except Exception:
            log("failure", logging.ERROR, trace=True, id=request_id, path=scope["path"])
            if status != 500:  # amid an answer: uvicorn cuts the connection, so that nobody
                raise  # takes it for a whole one. Before it, FastAPI has answered
        finally:
            self._note(scope, status, request_id, time.monotonic() - begun)

    def _may_enter(self, scope: Scope, headers: dict[bytes, bytes]) -> bool:
        path = scope["path"]
        if path in OPEN or path.startswith(OPEN_UNDER):
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        key = key.strip()
        # all are compared, so that time tells nothing of which one
        return sum([hmac.compare_digest(key, known) for known in self._keys]) > 0

    def _note(self, scope: Scope, status: int, request_id: str, seconds: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", None) or "other"
        self.metrics.requests[path, status] += 1
        if path in QUIET and status == 200:
            return
        client = scope.get("client")
        fields: dict[str, Any] = {
            "id": request_id,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "ms": round(1000 * seconds, 1),
            "client": client[0] if client else None,
        }
        answer = scope["state"].get("generation")
        if answer is not None:
            fields |= answer.summary()
        log("request", **fields)


async def send_error(send: Send, error: ApiError) -> None:
    body = error.json()
    fields = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    headers = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read_body(scope: Scope, receive: Receive, limit: int, timeout: float) -> bytes:
    """The body of a request, of at most limit bytes within timeout seconds."""
    try:
        return await asyncio.wait_for(_read(receive, limit), timeout)
    except asyncio.TimeoutError:
        raise ApiError(408, "the body did not come in time", close=True) from None


async def _read(receive: Receive, limit: int) -> bytes:
    chunks, size = [], 0
    until = 0.0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client has gone")
        size += len(message["body"])
        if size <= limit:
            chunks.append(message["body"])
        else:
            # Who still writes does not read yet: an answer now would be lost with the connection.
            chunks.clear()
            until = until or time.monotonic() + LINGER_SECONDS
            if size > limit + LINGER_BYTES or time.monotonic() > until:
                break
        if not message["more_body"]:
            break
    if size > limit:
        raise ApiError(413, f"the body is longer than {limit} bytes", close=True)
    return b"".join(chunks)
