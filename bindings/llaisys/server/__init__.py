"""An OpenAI-compatible HTTP server over one llaisys.Engine, in one process and one event loop.

    from llaisys.server import Config, serve
    serve(Config("models/refrain-mini", port=8000))

Modules, from the outside in: protocol (HTTP with limits), gate (key, ids, log), app (endpoints),
schema (requests), prepare (requests of the engine), hub (the engine's events), answer (JSON and
streams), text (tokens to text); beside them metrics, logs, errors and config.
"""

from .config import Config
from .run import ServeError, serve

__all__ = ["Config", "ServeError", "serve"]
