"""ctypes declarations of libllaisys.so, as the headers under include/ state them.

``LIB_LLAISYS`` is the loaded library. Calls of its fallible functions raise :class:`LlaisysError`.
"""

import ctypes
from pathlib import Path

from .engine import load_engine
from .errors import LlaisysError, check_error, load_errors
from .llaisys_types import (
    DataType,
    DeviceType,
    MemcpyKind,
    llaisysDataType_t,
    llaisysDeviceType_t,
    llaisysMemcpyKind_t,
    llaisysStream_t,
)
from .models import (
    LlaisysQwen2Meta,
    LlaisysQwen2Options,
    LlaisysQwen2Weights,
    LlaisysSampling,
    llaisysQwen2Model_t,
    load_models,
)
from .ops import load_ops
from .runtime import LlaisysRuntimeAPI, load_runtime
from .tensor import llaisysTensor_t, load_tensor


def load_shared_library() -> ctypes.CDLL:
    """Loads libllaisys.so from this folder, where the build puts it."""
    path = Path(__file__).with_name("libllaisys.so")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: build it with `make` in the repository's root folder"
        )
    lib = ctypes.CDLL(str(path))
    load_errors(lib)
    load_runtime(lib)
    load_tensor(lib)
    load_ops(lib)
    load_models(lib)
    load_engine(lib)
    return lib


LIB_LLAISYS = load_shared_library()

__all__ = [
    "LIB_LLAISYS",
    "DataType",
    "DeviceType",
    "LlaisysError",
    "LlaisysQwen2Meta",
    "LlaisysQwen2Options",
    "LlaisysQwen2Weights",
    "LlaisysRuntimeAPI",
    "LlaisysSampling",
    "MemcpyKind",
    "check_error",
    "llaisysDataType_t",
    "llaisysDeviceType_t",
    "llaisysMemcpyKind_t",
    "llaisysQwen2Model_t",
    "llaisysStream_t",
    "llaisysTensor_t",
]
