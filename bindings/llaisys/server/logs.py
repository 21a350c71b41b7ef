"""Log lines for people or for machines; one a request, with its id, and no content of any."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

__all__ = ["log", "set_up"]

_logger = logging.getLogger("llaisys.server")


class _Format(logging.Formatter):
    def __init__(self, is_json: bool) -> None:
        super().__init__()
        self.is_json = is_json

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = dict(getattr(record, "fields", {}))
        message = record.getMessage()
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        stamp = f"{moment}.{int(record.msecs):03d}Z"
        if self.is_json:
            entry = {"time": stamp, "level": record.levelname.lower(), "event": message, **fields}
            return json.dumps(entry, default=str)
        trace = fields.pop("trace", None)
        parts = [f"{name}={_plain(value)}" for name, value in fields.items()]
        line = " ".join([stamp, record.levelname.lower(), message, *parts])
        return f"{line}\n{trace}" if trace else line


def _plain(value: Any) -> str:
    text = str(value)
    # what a client has sent must not look like lines of the log
    return text if text.isprintable() and " " not in text else json.dumps(text)


def set_up(log_format: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Format(log_format == "json"))
    for name in ("llaisys.server", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO if name == "llaisys.server" else logging.ERROR)


def log(event: str, level: int = logging.INFO, /, *, trace: bool = False, **fields: Any) -> None:
    _logger.log(level, event, exc_info=trace, extra={"fields": fields})
