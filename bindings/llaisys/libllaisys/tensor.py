"""Prototypes of llaisys/tensor.h."""

from ctypes import CDLL, POINTER, c_int, c_size_t, c_ssize_t, c_uint8, c_void_p

from .errors import declare
from .llaisys_types import llaisysDataType_t, llaisysDeviceType_t

llaisysTensor_t = c_void_p
"""A handle; one that tensorCreate or a view function returned is ended with tensorDestroy."""

_SIZES = POINTER(c_size_t)


def load_tensor(lib: CDLL) -> None:
    handle = llaisysTensor_t
    declare(
        lib,
        "tensorCreate",
        handle,
        _SIZES,  # shape [ndim]
        c_size_t,  # ndim
        llaisysDataType_t,
        llaisysDeviceType_t,
        c_int,  # device id
    )
    declare(lib, "tensorDestroy", None, handle, fallible=False)
    declare(lib, "tensorGetData", c_void_p, handle)
    declare(lib, "tensorGetNdim", c_size_t, handle)
    declare(lib, "tensorGetShape", None, handle, _SIZES)
    declare(lib, "tensorGetStrides", None, handle, POINTER(c_ssize_t))
    declare(lib, "tensorGetDataType", llaisysDataType_t, handle)
    declare(lib, "tensorGetDeviceType", llaisysDeviceType_t, handle)
    declare(lib, "tensorGetDeviceId", c_int, handle)
    declare(lib, "tensorDebug", None, handle)
    declare(lib, "tensorIsContiguous", c_uint8, handle)
    declare(lib, "tensorLoad", None, handle, c_void_p)
    declare(lib, "tensorView", handle, handle, _SIZES, c_size_t)
    declare(lib, "tensorPermute", handle, handle, _SIZES)
    declare(lib, "tensorSlice", handle, handle, c_size_t, c_size_t, c_size_t)
