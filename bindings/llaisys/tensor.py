"""Strided tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import Array, c_size_t, c_ssize_t, c_void_p
from operator import index

from .libllaisys import LIB_LLAISYS, DataType, DeviceType, llaisysTensor_t


def _sizes(values: Sequence[int]) -> Array[c_size_t]:
    sizes = [index(value) for value in values]
    if any(size < 0 for size in sizes):  # ctypes would wrap them around
        raise ValueError(f"expected numbers of 0 or more, found {tuple(sizes)}")
    return (c_size_t * len(sizes))(*sizes)


class Tensor:
    """A tensor, or a view of one; views share storage, which lives as long as any of them.

    Shapes and strides count elements. The contents of a new tensor are undefined.
    """

    _tensor: llaisysTensor_t | None = None  # so that __del__ finds one after a failed __init__

    def __init__(
        self,
        shape: Sequence[int] | None = None,
        dtype: DataType = DataType.F32,
        device: DeviceType = DeviceType.CPU,
        device_id: int = 0,
        tensor: llaisysTensor_t | None = None,
    ) -> None:
        """A new tensor, a scalar if ``shape`` is None; or the owner of the handle ``tensor``."""
        if tensor:
            self._tensor = tensor
        else:
            sizes = _sizes(shape or ())
            self._tensor = LIB_LLAISYS.tensorCreate(sizes, len(sizes), dtype, device, device_id)

    # The function is a default argument because modules may be empty when the interpreter ends.
    def __del__(self, _destroy: Callable[..., None] = LIB_LLAISYS.tensorDestroy) -> None:
        if self._tensor is not None:
            _destroy(self._tensor)
            self._tensor = None

    def __repr__(self) -> str:
        return (
            f"<Tensor shape={self.shape()}, dtype={self.dtype().name}, "
            f"device={self.device_type().name}:{self.device_id()}>"
        )

    def shape(self) -> tuple[int, ...]:
        """Elements of each dimension."""
        sizes = (c_size_t * self.ndim())()
        LIB_LLAISYS.tensorGetShape(self._tensor, sizes)
        return tuple(sizes)

    def strides(self) -> tuple[int, ...]:
        """Elements from one index to the next, for each dimension."""
        strides = (c_ssize_t * self.ndim())()
        LIB_LLAISYS.tensorGetStrides(self._tensor, strides)
        return tuple(strides)

    def ndim(self) -> int:
        return LIB_LLAISYS.tensorGetNdim(self._tensor)

    def dtype(self) -> DataType:
        return DataType(LIB_LLAISYS.tensorGetDataType(self._tensor))

    def device_type(self) -> DeviceType:
        return DeviceType(LIB_LLAISYS.tensorGetDeviceType(self._tensor))

    def device_id(self) -> int:
        return LIB_LLAISYS.tensorGetDeviceId(self._tensor)

    def data_ptr(self) -> int:
        """Address of the first element, on the tensor's device."""
        return LIB_LLAISYS.tensorGetData(self._tensor)

    def lib_tensor(self) -> llaisysTensor_t:
        """The handle, for calls of the library; it remains this object's."""
        return self._tensor

    def debug(self) -> None:
        """Prints shape, strides, dtype, device and values to standard output."""
        LIB_LLAISYS.tensorDebug(self._tensor)

    def load(self, data: int | c_void_p) -> None:
        """Copies all elements from the host address ``data``, packed in row-major order."""
        LIB_LLAISYS.tensorLoad(self._tensor, data)

    def is_contiguous(self) -> bool:
        """Whether the elements lie packed in row-major order."""
        return bool(LIB_LLAISYS.tensorIsContiguous(self._tensor))

    def view(self, *shape: int) -> Tensor:
        """The same elements in another shape; raises where the strides do not allow it."""
        sizes = _sizes(shape)
        return Tensor(tensor=LIB_LLAISYS.tensorView(self._tensor, sizes, len(sizes)))

    def permute(self, *perm: int) -> Tensor:
        """Dimension ``i`` of the result is dimension ``perm[i]`` of this tensor."""
        if len(perm) != self.ndim():
            raise ValueError(f"expected {self.ndim()} dimensions, found {perm}")
        return Tensor(tensor=LIB_LLAISYS.tensorPermute(self._tensor, _sizes(perm)))

    def slice(self, dim: int, start: int, end: int) -> Tensor:
        """Elements ``start`` to ``end - 1`` of dimension ``dim``."""
        return Tensor(tensor=LIB_LLAISYS.tensorSlice(self._tensor, *_sizes((dim, start, end))))
