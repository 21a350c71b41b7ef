"""Enums of llaisys.h."""

import ctypes
from enum import IntEnum


class DeviceType(IntEnum):
    """A kind of device; devices of one kind are numbered from 0."""

    CPU = 0
    NVIDIA = 1
    COUNT = 2


class DataType(IntEnum):
    """Type of a tensor's elements."""

    INVALID = 0
    BYTE = 1
    BOOL = 2
    I8 = 3
    I16 = 4
    I32 = 5
    I64 = 6
    U8 = 7
    U16 = 8
    U32 = 9
    U64 = 10
    F8 = 11
    F16 = 12
    F32 = 13
    F64 = 14
    C16 = 15
    C32 = 16
    C64 = 17
    C128 = 18
    BF16 = 19


class MemcpyKind(IntEnum):
    """Where a copy goes from and to: host (H) or device (D)."""

    H2H = 0
    H2D = 1
    D2H = 2
    D2D = 3


llaisysDeviceType_t = ctypes.c_int
llaisysDataType_t = ctypes.c_int
llaisysMemcpyKind_t = ctypes.c_int
llaisysStream_t = ctypes.c_void_p
"""An opaque stream; None is the device's default stream."""

__all__ = [
    "DataType",
    "DeviceType",
    "MemcpyKind",
    "llaisysDataType_t",
    "llaisysDeviceType_t",
    "llaisysMemcpyKind_t",
    "llaisysStream_t",
]
