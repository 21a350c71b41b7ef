"""Devices, streams and memory."""

from ctypes import c_void_p

from .libllaisys import LIB_LLAISYS, DeviceType, MemcpyKind, check_error, llaisysStream_t

Address = int | c_void_p | None


class RuntimeAPI:
    """The runtime of one device type. Sizes are bytes, addresses are integers.

    Failures raise LlaisysError. Memory belongs to the caller until the matching free.
    """

    def __init__(self, device_type: DeviceType) -> None:
        self._api = LIB_LLAISYS.llaisysGetRuntimeAPI(device_type).contents

    def get_device_count(self) -> int:
        """Devices that can be used: 0 where there is no GPU, no driver, or no CUDA build."""
        return self._api.get_device_count()

    def set_device(self, device_id: int) -> None:
        """Makes a device the calling thread's current one."""
        self._api.set_device(device_id)
        check_error(LIB_LLAISYS)

    def device_synchronize(self) -> None:
        """Waits until the current device has done all its work."""
        self._api.device_synchronize()
        check_error(LIB_LLAISYS)

    def create_stream(self) -> llaisysStream_t:
        """A new stream of the current device; None, the default stream, on the CPU."""
        stream = self._api.create_stream()
        check_error(LIB_LLAISYS)
        return stream

    def destroy_stream(self, stream: llaisysStream_t) -> None:
        self._api.destroy_stream(stream)
        check_error(LIB_LLAISYS)

    def stream_synchronize(self, stream: llaisysStream_t) -> None:
        """Waits until a stream has done its work."""
        self._api.stream_synchronize(stream)
        check_error(LIB_LLAISYS)

    def malloc_device(self, size: int) -> int:
        """Address of ``size`` new bytes on the current device."""
        ptr = self._api.malloc_device(size)
        check_error(LIB_LLAISYS)
        return ptr

    def free_device(self, ptr: Address) -> None:
        self._api.free_device(ptr)
        check_error(LIB_LLAISYS)

    def malloc_host(self, size: int) -> int:
        """Address of ``size`` new bytes of host memory, pinned where there is a GPU."""
        ptr = self._api.malloc_host(size)
        check_error(LIB_LLAISYS)
        return ptr

    def free_host(self, ptr: Address) -> None:
        self._api.free_host(ptr)
        check_error(LIB_LLAISYS)

    def memcpy_sync(self, dst: Address, src: Address, size: int, kind: MemcpyKind) -> None:
        """Copies ``size`` bytes; returns when they are there."""
        self._api.memcpy_sync(dst, src, size, kind)
        check_error(LIB_LLAISYS)

    def memcpy_async(
        self, dst: Address, src: Address, size: int, kind: MemcpyKind, stream: llaisysStream_t
    ) -> None:
        """Copies ``size`` bytes in the order of a stream; both sides must live until then."""
        self._api.memcpy_async(dst, src, size, kind, stream)
        check_error(LIB_LLAISYS)
