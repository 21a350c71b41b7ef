"""Prototypes of llaisys/runtime.h."""

from ctypes import CDLL, CFUNCTYPE, POINTER, Structure, c_int, c_size_t, c_void_p

from .errors import declare
from .llaisys_types import llaisysDeviceType_t, llaisysMemcpyKind_t, llaisysStream_t

_COPY = (c_void_p, c_void_p, c_size_t, llaisysMemcpyKind_t)  # dst, src, bytes, kind


class LlaisysRuntimeAPI(Structure):
    """Functions of one device type. ctypes cannot check their errors: use llaisys.RuntimeAPI."""

    _fields_ = [
        ("get_device_count", CFUNCTYPE(c_int)),
        ("set_device", CFUNCTYPE(None, c_int)),
        ("device_synchronize", CFUNCTYPE(None)),
        ("create_stream", CFUNCTYPE(llaisysStream_t)),
        ("destroy_stream", CFUNCTYPE(None, llaisysStream_t)),
        ("stream_synchronize", CFUNCTYPE(None, llaisysStream_t)),
        ("malloc_device", CFUNCTYPE(c_void_p, c_size_t)),
        ("free_device", CFUNCTYPE(None, c_void_p)),
        ("malloc_host", CFUNCTYPE(c_void_p, c_size_t)),
        ("free_host", CFUNCTYPE(None, c_void_p)),
        ("memcpy_sync", CFUNCTYPE(None, *_COPY)),
        ("memcpy_async", CFUNCTYPE(None, *_COPY, llaisysStream_t)),
    ]


def load_runtime(lib: CDLL) -> None:
    declare(lib, "llaisysGetRuntimeAPI", POINTER(LlaisysRuntimeAPI), llaisysDeviceType_t)
    declare(lib, "llaisysSetContextRuntime", None, llaisysDeviceType_t, c_int)
