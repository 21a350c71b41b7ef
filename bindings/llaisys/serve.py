"""The command lines of llaisys serve and llaisys chat; what they run is imported when it is run."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["add_chat", "add_serve"]

KEY_VARIABLE = "LLAISYS_API_KEY"
Options = Callable[[argparse.Namespace], Mapping[str, Any]]
ENGINE = {
    "max_seqs": "requests computed at once",
    "max_queue": "requests that may wait; more are refused with 429",
    "kv_tokens": "tokens of the KV cache over all requests",
    "kv_block": "tokens of a KV block",
    "mixed_rows": "tokens of a step in which a request decodes",
}
SECONDS = {
    "header_timeout": "the headers of a request may take, 10",
    "body_timeout": "the body of a request may take, 30",
    "request_timeout": "a whole answer may take, 600",
    "stall_timeout": "a client may leave its answer unread, 60",
    "drain_timeout": "answers under way may take once the server is told to end, 30",
}


def add_serve(parser: argparse.ArgumentParser, model: Callable[[], Path], options: Options) -> None:
    """model: the folder where none is named; options: of Engine, from the common arguments."""
    begun = time.perf_counter()
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on: this machine's")
    parser.add_argument("--port", type=int, default=8000, help="8000; 0 takes any that is free")
    parser.add_argument("--model-name", metavar="NAME", help="in the API; else the folder's name")
    parser.add_argument(
        "--api-key-file", metavar="FILE", help=f"keys, one a line; else {KEY_VARIABLE} holds one"
    )
    parser.add_argument(
        "--cors-origin", action="append", default=[], metavar="URL", help="pages that may ask, or *"
    )
    parser.add_argument(
        "--allow-chat-template", action="store_true", help="requests may bring their own"
    )
    parser.add_argument("--max-body", type=int, metavar="BYTES", help="of a request, 8388608")
    for name, text in SECONDS.items():
        parser.add_argument(_option(name), type=float, metavar="SECONDS", help=text)
    for name, text in ENGINE.items():
        parser.add_argument(_option(name), type=int, metavar="N", help=text)
    parser.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="of standard error"
    )
    parser.set_defaults(run=lambda args: _serve(args, model, options, begun))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _serve(
    args: argparse.Namespace, model: Callable[[], Path], options: Options, begun: float
) -> None:
    _require("fastapi", "uvicorn", "uvloop", "httptools", "pydantic", "prometheus_client")
    from .server import Config, serve

    given = vars(args)
    limits = {
        name: given[name]
        for name in (*SECONDS, "max_body", "model_name")
        if given[name] is not None
    }
    for name in (*SECONDS, "max_body"):
        if limits.get(name, 1) <= 0:
            raise ValueError(f"{_option(name)}: expected above 0, found {limits[name]}")
    keys = _keys(args.api_key_file)
    config = Config(
        str(args.model or model()),
        {**options(args), **{name: given[name] for name in ENGINE}},
        args.host,
        args.port,
        api_keys=keys,
        cors_origins=tuple(args.cors_origin),
        allow_chat_template=args.allow_chat_template,
        log_format=args.log_format,
        **limits,
    )
    serve(config, begun)


def _keys(file: str | None) -> tuple[str, ...]:
    if file is None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        return (key,) if key else ()
    keys = tuple(filter(None, map(str.strip, Path(file).read_text(encoding="utf-8").splitlines())))
    if not keys:
        raise ValueError(f"{file}: expected API keys, one a line, found none")
    return keys


def add_chat(parser: argparse.ArgumentParser, model: Callable[[], Path], options: Options) -> None:
    parser.add_argument("--url", help="of a server to talk to, instead of a model here")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument("--temperature", type=float, metavar="T")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer")
    parser.add_argument("--think", action="store_true", help="have the model reason first")
    parser.set_defaults(run=lambda args: _chat(args, model, options))


def _chat(args: argparse.Namespace, model: Callable[[], Path], options: Options) -> None:
    _require("rich", "prompt_toolkit", "pydantic", "fastapi")
    from .chat import Chat, Local, Remote

    if args.url and args.model:
        raise ValueError("expected either MODEL or --url, found both")
    names = ("temperature", "top_p", "top_k", "seed", "max_tokens")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.think:
        settings["think"] = True
    if args.url:
        backend = Remote(args.url, os.environ.get(KEY_VARIABLE))
    else:
        backend = Local(str(args.model or model()), options(args))
    with backend:
        Chat(backend, settings, args.system).run()


def _require(*modules: str) -> None:
    for name in modules:
        try:
            __import__(name)
        except ImportError as error:
            raise ValueError(
                f"the Python package {name} is missing: pip install -r requirements.txt"
            ) from error
