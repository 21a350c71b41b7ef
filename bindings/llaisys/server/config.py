"""What a server can be told, in one place; the command line fills it in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Config"]


@dataclass
class Config:
    """How to serve a model folder. Times are seconds, sizes bytes."""

    model: str
    engine: Mapping[str, Any] = field(default_factory=dict)  # arguments of llaisys.Engine
    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None  # None: the folder's name
    api_keys: tuple[str, ...] = ()  # none: whoever connects may ask
    cors_origins: tuple[str, ...] = ()
    allow_chat_template: bool = False  # in a request; it is sandboxed and bounded in any case
    log_format: str = "text"  # or "json"
    # limits
    max_body: int = 8 << 20
    max_headers: int = 64 << 10
    max_choices: int = 64  # answers of one request: n times prompts
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    request_timeout: float = 600.0  # of a whole answer
    stall_timeout: float = 60.0  # of a client that does not read
    drain_timeout: float = 30.0  # for answers under way once the server is told to end
    max_connections: int = 4096
