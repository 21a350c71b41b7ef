"""The endpoints. Each reads its request, prepares it, and hands it to the hub."""

from __future__ import annotations

import html
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from ..engine import EngineBusy, EngineClosed, RequestError
from ..libllaisys import LlaisysError
from .answer import Answer
from .config import Config
from .errors import ApiError
from .gate import Gate, read_body
from .hub import Hub
from .metrics import Metrics
from .prepare import Model, Prepared
from .schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, parse

__all__ = ["Server", "make_app"]

PAGE = Path(__file__).with_name("page")
# The page may load and call this server alone, and nobody may frame it.
PAGE_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
SCHEMAS: tuple[type[BaseModel], ...] = (
    ChatRequest,
    CompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
)


class Server:
    """What the endpoints share. hub and model are there once the event loop runs."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.created = int(time.time())
        self.metrics = Metrics("")
        self.hub: Hub | None = None
        self.model: Model | None = None

    @property
    def state(self) -> str:
        return "loading" if self.hub is None else self.hub.state

    def ready(self) -> Model:
        if self.state == "ready":
            return self.model
        message = {
            "loading": "the model is loading",
            "failed": "the engine has failed",
        }.get(self.state, "the server is shutting down")
        raise ApiError(503, message, code=self.state, retry_after=5, close=self.state != "loading")

    async def read(self, request: Request, kind: type[Any]) -> Any:
        config = self.config
        body = await read_body(request.scope, request.receive, config.max_body, config.body_timeout)
        return parse(kind, body)

    def start(self, prepared: Prepared, *, is_chat: bool) -> Answer:
        model = self.ready()  # again: preparing may have taken a while
        try:
            generation = self.hub.submit(prepared.requests, prepared.constrain)
        except EngineBusy as error:
            raise ApiError(429, str(error), code="queue_full", retry_after=1) from error
        except EngineClosed as error:
            raise ApiError(503, str(error), code="draining", retry_after=5) from error
        except RequestError as error:
            raise ApiError(400, str(error)) from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        except LlaisysError as error:
            self.hub.state = "failed"
            raise ApiError(500, str(error), code="engine_error") from error
        return Answer(self.hub, model, generation, prepared, is_chat=is_chat)


def make_app(server: Server) -> ASGIApp:
    app = FastAPI(
        title="Refrain", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_failure)
    _add_openai(app, server)
    _add_tools(app, server)
    _add_pages(app)
    gated: ASGIApp = Gate(app, server.config, server.metrics)
    if server.config.cors_origins:  # outside, so that pages can read errors, too
        return CORSMiddleware(
            gated,
            allow_origins=server.config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-ignored-parameters"],
        )
    return gated


async def _on_api_error(_request: Request, error: Exception) -> Response:
    return Response(
        error.json(), error.status, headers=error.headers, media_type="application/json"
    )


async def _on_failure(request: Request, _error: Exception) -> Response:
    """The gate logs what it was."""
    return await _on_api_error(request, ApiError(500, "the server failed", code="internal_error"))


async def _on_http_error(request: Request, error: Exception) -> Response:
    message = {
        404: f"there is no {request.url.path[:200]}",
        405: f"{request.method} is not allowed here",
    }.get(error.status_code, str(error.detail))
    answer = await _on_api_error(request, ApiError(error.status_code, message))
    answer.headers.update(error.headers or {})
    return answer


def _body(kind: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


ERROR = {"description": "What is wrong", "content": {"application/json": {"schema": {
    "type": "object", "required": ["error"], "properties": {"error": {
        "type": "object", "required": ["message", "type", "param", "code"], "properties": {
            "message": {"type": "string"}, "type": {"type": "string"},
            "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}}}}}}}  # fmt: skip
ERRORS: dict[int | str, Any] = {
    status: ERROR for status in (400, 401, 404, 408, 413, 429, 500, 503, 504)
}


def _add_openai(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions", openapi_extra=_body(ChatRequest), responses=ERRORS)
    async def chat_completions(request: Request) -> Response:
        """Answers a chat, in one object or, with stream, as server-sent events."""
        model = server.ready()
        prepared = await model.chat(await server.read(request, ChatRequest))
        return server.start(prepared, is_chat=True)

    @app.post("/v1/completions", openapi_extra=_body(CompletionRequest), responses=ERRORS)
    async def completions(request: Request) -> Response:
        """Continues one text or several."""
        model = server.ready()
        prepared = await model.completion(await server.read(request, CompletionRequest))
        return server.start(prepared, is_chat=False)

    def describe(model: Model) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": server.created,
            "owned_by": "refrain",
            "max_model_len": model.max_seq,
        }

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> Response:
        """The model served."""
        return JSONResponse({"object": "list", "data": [describe(server.ready())]})

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def model(name: str) -> Response:
        """The model, if it has this name."""
        found = server.ready()
        found.check_model(name)
        return JSONResponse(describe(found))


def _add_tools(app: FastAPI, server: Server) -> None:
    @app.get("/health", responses={503: {"description": "Loading, draining or failed"}})
    async def health() -> Response:
        """Whether requests are taken."""
        if server.state == "ready":
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": server.state}, 503, headers={"retry-after": "5"})

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counts and times for Prometheus."""
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.post("/tokenize", openapi_extra=_body(TokenizeRequest), responses=ERRORS)
    async def tokenize(request: Request) -> Response:
        """Token ids of a text or of a chat."""
        model = server.ready()
        asked = await server.read(request, TokenizeRequest)
        model.check_model(asked.model)
        tokens = await model.tokenize(asked)
        return JSONResponse(
            {"tokens": tokens, "count": len(tokens), "max_model_len": model.max_seq}
        )

    @app.post("/detokenize", openapi_extra=_body(DetokenizeRequest), responses=ERRORS)
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special ones included."""
        model = server.ready()
        asked = await server.read(request, DetokenizeRequest)
        model.check_model(asked.model)
        text = await model.detokenize(asked.tokens)
        return JSONResponse({"prompt": text, "content": text})  # vLLM's and llama.cpp's name


def _add_pages(app: FastAPI) -> None:
    description: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not description:
            description.update(
                get_openapi(title="Refrain", version="1", routes=app.routes, description="")
            )
            template = "#/components/schemas/{model}"
            kinds = [(kind, "validation") for kind in SCHEMAS]
            _, schemas = models_json_schema(kinds, ref_template=template)
            components = description.setdefault("components", {}).setdefault("schemas", {})
            components.update(schemas["$defs"])
        return description

    app.openapi = openapi

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi_json() -> Response:
        return JSONResponse(openapi())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(_docs(openapi()), headers=DOCS_HEADERS)

    if (PAGE / "index.html").exists():
        files = _with_headers(StaticFiles(directory=PAGE, html=True))

        @app.get("/", include_in_schema=False)
        async def page() -> Response:
            text = (PAGE / "index.html").read_bytes()
            return Response(text, media_type="text/html", headers=PAGE_HEADERS)

        app.mount("/page", files)
    else:

        @app.get("/", include_in_schema=False)
        async def no_page() -> Response:
            return RedirectResponse("/docs")


def _with_headers(files: ASGIApp) -> ASGIApp:
    extra = [(name.encode(), value.encode()) for name, value in PAGE_HEADERS.items()]

    async def serve(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        async def add(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        await files(scope, receive, add)

    return serve


DOCS_HEADERS = PAGE_HEADERS | {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"
}
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;"
    "color-scheme:light dark}code,td{font-family:monospace}td,th{text-align:left;"
    "padding:.1em 1em .1em 0;vertical-align:top}"
)


def _docs(description: dict[str, Any]) -> str:
    """The description for people: a page without scripts, and nothing from other hosts."""
    out = [f"<!doctype html><meta charset=utf-8><title>Refrain</title><style>{STYLE}</style>"]
    out.append('<h1>Refrain</h1><p>For programs: <a href="/openapi.json">openapi.json</a></p>')
    for path, methods in description["paths"].items():
        for method, entry in methods.items():
            out.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            out.append(f"<p>{html.escape(entry.get('description', ''))}</p>")
            body = entry.get("requestBody")
            if body:
                name = body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
                out.append(_fields(description["components"]["schemas"][name]))
    return "".join(out)


def _fields(schema: dict[str, Any]) -> str:
    rows = []
    for name, entry in schema["properties"].items():
        needed = "required" if name in schema.get("required", ()) else ""
        rows.append(f"<tr><td>{name}<td>{html.escape(_kind(entry))}<td>{needed}")
    return f"<table>{''.join(rows)}</table>"


def _kind(entry: dict[str, Any]) -> str:
    if "anyOf" in entry:
        return " | ".join(k for e in entry["anyOf"] if (k := _kind(e)) != "null")
    if "$ref" in entry:
        return entry["$ref"].rsplit("/", 1)[1]
    kind = str(entry.get("type", "any"))
    if kind == "array":
        return f"list of {_kind(entry.get('items', {}))}"
    least = entry.get("minimum", entry.get("exclusiveMinimum"))
    return kind if least is None else f"{kind}, {least} to {entry.get('maximum', '')}"
