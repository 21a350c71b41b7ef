"""Refrain: inference of Qwen2-architecture language models, with the LLAISYS Python interface."""

from . import models
from .libllaisys import DataType, DeviceType, LlaisysError, MemcpyKind
from .libllaisys import llaisysStream_t as Stream
from .models import Qwen2
from .ops import Ops
from .runtime import RuntimeAPI
from .tensor import Tensor

__all__ = [
    "DataType",
    "DeviceType",
    "LlaisysError",
    "MemcpyKind",
    "Ops",
    "Qwen2",
    "RuntimeAPI",
    "Stream",
    "Tensor",
    "models",
]
