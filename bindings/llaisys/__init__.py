"""Refrain: inference of Qwen2-architecture language models, with the LLAISYS Python interface."""

from . import models
from .engine import Engine, EngineBusy, EngineClosed, RequestError
from .libllaisys import DataType, DeviceType, LlaisysError, MemcpyKind
from .libllaisys import llaisysStream_t as Stream
from .models import Qwen2
from .ops import Ops
from .runtime import RuntimeAPI
from .tensor import Tensor

__all__ = [
    "DataType",
    "DeviceType",
    "Engine",
    "EngineBusy",
    "EngineClosed",
    "LlaisysError",
    "MemcpyKind",
    "Ops",
    "Qwen2",
    "RequestError",
    "RuntimeAPI",
    "Stream",
    "Tensor",
    "models",
]
