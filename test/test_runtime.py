"""The runtime API: devices, memory, copies, streams, and what it refuses."""

import ctypes
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[0]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bindings"))

import llaisys
import torch
from llaisys.libllaisys import LIB_LLAISYS, LlaisysRuntimeAPI, check_error
from test_utils import absence, expect_error, llaisys_device, script_main

KINDS = llaisys.MemcpyKind


def runtime(device):
    return llaisys.RuntimeAPI(llaisys_device(device))


def check_memcpy(api, nbytes):
    """Host to device, device to device, device to host."""
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    a, b = api.malloc_device(nbytes), api.malloc_device(nbytes)
    api.memcpy_sync(a, source.data_ptr(), nbytes, KINDS.H2D)
    api.memcpy_sync(b, a, nbytes, KINDS.D2D)
    api.memcpy_sync(target.data_ptr(), b, nbytes, KINDS.D2H)
    assert torch.equal(source, target)
    api.free_device(a)
    api.free_device(b)


def test_basic_runtime_api(device):
    api = runtime(device)
    count = api.get_device_count()
    print(f"Found {count} {device} devices")
    assert count > 0
    for i in range(count):
        api.set_device(i)
        for nbytes in (1, 3, 64, 4097, 1024 * 1024):
            check_memcpy(api, nbytes)
    api.set_device(0)
    api.device_synchronize()


def test_host_memory_and_streams(device):
    api = runtime(device)
    stream = api.create_stream()
    n = 1 << 16
    source, target = api.malloc_host(n), api.malloc_host(n)
    memory = api.malloc_device(n)
    data = bytes(i * 7 % 256 for i in range(n))
    ctypes.memmove(source, data, n)
    api.memcpy_async(memory, source, n, KINDS.H2D, stream)
    api.memcpy_async(target, memory, n, KINDS.D2H, stream)
    api.stream_synchronize(stream)
    assert ctypes.string_at(target, n) == data
    api.stream_synchronize(None)  # the default stream
    api.destroy_stream(stream)
    api.free_device(memory)
    api.free_host(source)
    api.free_host(target)


def test_allocations_are_aligned_and_distinct(device):
    api = runtime(device)
    for malloc, free in ((api.malloc_device, api.free_device), (api.malloc_host, api.free_host)):
        pointers = [malloc(n) for n in (0, 0, 1, 3, 63, 64, 65, 4096, 0)]
        assert all(pointers) and len(set(pointers)) == len(pointers)
        assert all(pointer % 64 == 0 for pointer in pointers)
        for pointer in pointers:
            free(pointer)
        free(None)


def test_copies_of_nothing(device):
    api = runtime(device)
    api.memcpy_sync(None, None, 0, KINDS.H2D)
    api.memcpy_async(None, None, 0, KINDS.D2H, None)


def test_copies_on_the_host_take_any_kind():
    api = runtime("cpu")
    for kind in KINDS:
        target = (ctypes.c_char * 8)()
        api.memcpy_sync(ctypes.addressof(target), ctypes.c_char_p(b"12345678"), 8, kind)
        assert target.raw == b"12345678"
    text = ctypes.create_string_buffer(b"abcdef", 6)
    api.memcpy_sync(ctypes.addressof(text) + 1, ctypes.addressof(text), 5, KINDS.D2D)
    assert text.raw == b"aabcde", "overlapping copies move"


def test_refusals(device):
    api = runtime(device)
    memory = api.malloc_device(16)
    for nbytes in (2**64 - 1, 2**63, 2**63 - 1, 2**62):
        expect_error(lambda n=nbytes: api.malloc_device(n), str(nbytes))
        expect_error(lambda n=nbytes: api.malloc_host(n), str(nbytes))
    expect_error(lambda: api.memcpy_sync(None, memory, 16, KINDS.D2D), "destination", "16", "NULL")
    expect_error(lambda: api.memcpy_sync(memory, None, 16, KINDS.D2D), "source", "16", "NULL")
    expect_error(lambda: api.memcpy_async(memory, None, 1, KINDS.D2D, None), "source", "NULL")
    expect_error(lambda: api.memcpy_sync(memory, memory, 16, 4), "kind", "4")
    expect_error(lambda: api.memcpy_sync(memory, memory, 16, -1), "kind", "-1")
    for device_id in (-1, api.get_device_count(), 2**31 - 1):
        expect_error(lambda i=device_id: api.set_device(i), str(device_id))
        expect_error(
            lambda i=device_id: LIB_LLAISYS.llaisysSetContextRuntime(llaisys_device(device), i),
            str(device_id),
        )
    api.device_synchronize()  # a success clears the error
    check_error(LIB_LLAISYS)
    api.free_device(memory)


def test_cpu_has_one_stream():
    api = runtime("cpu")
    assert api.create_stream() is None
    expect_error(lambda: api.stream_synchronize(64), "stream")
    expect_error(lambda: api.destroy_stream(64), "stream")
    expect_error(lambda: api.memcpy_async(None, None, 0, KINDS.H2H, 64), "stream")


def test_context(device):
    for i in range(runtime(device).get_device_count()):
        LIB_LLAISYS.llaisysSetContextRuntime(llaisys_device(device), i)
    LIB_LLAISYS.llaisysSetContextRuntime(llaisys_device(device), 0)


def test_unknown_device_types():
    for unknown in (2, -1, 1000):
        expect_error(lambda u=unknown: LIB_LLAISYS.llaisysGetRuntimeAPI(u), str(unknown))
        expect_error(lambda u=unknown: LIB_LLAISYS.llaisysSetContextRuntime(u, 0), "type")
        # C callers get a table all the same.
        prototype = ctypes.CFUNCTYPE(ctypes.POINTER(LlaisysRuntimeAPI), ctypes.c_int)
        table = prototype(("llaisysGetRuntimeAPI", LIB_LLAISYS))(unknown).contents
        assert table.get_device_count() == 0
        assert table.malloc_device(16) is None
        expect_error(lambda: check_error(LIB_LLAISYS), "type")


def test_absent_gpus():
    """With no GPU, driver or CUDA build, the NVIDIA table has no devices and says why."""
    if not absence("nvidia"):
        return
    api = runtime("nvidia")
    assert api.get_device_count() == 0
    check_error(LIB_LLAISYS)  # having none is no failure
    buffer = ctypes.create_string_buffer(16)
    for call in (
        lambda: api.set_device(0),
        api.device_synchronize,
        api.create_stream,
        lambda: api.destroy_stream(None),
        lambda: api.stream_synchronize(None),
        lambda: api.malloc_device(16),
        lambda: api.free_device(None),
        lambda: api.malloc_host(16),
        lambda: api.free_host(None),
        lambda: api.memcpy_sync(buffer, buffer, 16, KINDS.H2D),
        lambda: api.memcpy_async(buffer, buffer, 16, KINDS.H2D, None),
        lambda: llaisys.Tensor((2,), device=llaisys.DeviceType.NVIDIA),
        lambda: LIB_LLAISYS.llaisysSetContextRuntime(llaisys.DeviceType.NVIDIA, 0),
    ):
        expect_error(call)


def test_errors_belong_to_the_thread():
    expect_error(lambda: runtime("cpu").set_device(7), "7")
    seen = []
    thread = threading.Thread(target=lambda: seen.append(LIB_LLAISYS.llaisysGetLastError()))
    thread.start()
    thread.join()
    assert seen == [None]
    assert b"7" in LIB_LLAISYS.llaisysGetLastError()
    runtime("cpu").set_device(0)
    assert LIB_LLAISYS.llaisysGetLastError() is None


if __name__ == "__main__":
    script_main(globals(), title="the runtime API")
