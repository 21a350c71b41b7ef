"""Tensors: creation, views, slices, loading, printing, lifetimes, and what they refuse."""

import ctypes
import gc
import itertools
import subprocess
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[0]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bindings"))

import llaisys
import torch
from llaisys.libllaisys import LIB_LLAISYS
from test_utils import (
    captured_stdout,
    check_equal,
    expect_error,
    forall,
    llaisys_device,
    llaisys_dtype,
    script_main,
    to_llaisys,
    to_torch,
    torch_dtype,
)


def numbered(shape, dtype="i64"):
    count = torch.Size(shape).numel()
    return torch.arange(count).to(torch_dtype(dtype)).reshape(shape)


def check_same(tensor, expected):
    """Shape, strides, contiguity and values."""
    assert tensor.shape() == tuple(expected.shape)
    assert tensor.strides() == expected.stride(), (tensor.shape(), tensor.strides())
    assert tensor.is_contiguous() == expected.is_contiguous()
    assert check_equal(tensor, expected, strict=True)


def test_tensor(device):
    """As upstream: load, view, permute, slice."""
    expected = numbered((3, 4, 5))
    tensor = llaisys.Tensor((3, 4, 5), dtype=llaisys_dtype("i64"), device=llaisys_device(device))
    tensor.load(expected.data_ptr())
    tensor.debug()
    check_same(tensor, expected)
    check_same(tensor.view(6, 10), expected.view(6, 10))
    check_same(tensor.permute(2, 0, 1), expected.permute(2, 0, 1))
    check_same(tensor.slice(2, 1, 4), expected[:, :, 1:4])


def test_metadata(device):
    for dtype in ("bool", "i8", "i16", "i32", "i64", "u8", "f16", "bf16", "f32", "f64"):
        for shape in [(), (1,), (0,), (3,), (2, 0, 3), (4, 5), (1,) * 8, (2, 3, 1, 2)]:
            tensor = llaisys.Tensor(shape, llaisys_dtype(dtype), llaisys_device(device), 0)
            expected = torch.empty(shape)
            assert tensor.shape() == shape and tensor.strides() == expected.stride()
            assert tensor.ndim() == len(shape)
            assert tensor.dtype() == llaisys_dtype(dtype)
            assert tensor.device_type() == llaisys_device(device) and tensor.device_id() == 0
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % 64 == 0 and tensor.data_ptr() > 0
    assert llaisys.Tensor(None).shape() == ()
    assert llaisys.Tensor().shape() == ()
    text = repr(llaisys.Tensor((2, 3), device=llaisys_device(device)))
    assert "(2, 3)" in text and "F32" in text and device.upper() in text


def torch_view(values, shape):
    try:
        return values.view(shape)
    except RuntimeError:
        return None


def check_view(tensor, values, shape):
    """The library's view exists where torch's does, and is the same."""
    expected = torch_view(values, shape)
    if expected is None:
        expect_error(lambda: tensor.view(*shape), "tensorView")
    else:
        check_same(tensor.view(*shape), expected)


def test_view_rules(device):
    """Every factorisation of 24 elements over strided variants of one tensor, as torch.view."""
    numbers = (1, 2, 3, 4, 6, 8, 12, 24)
    shapes = [()] + [(n,) for n in numbers]
    for ndim in (2, 3, 4):
        shapes += [
            s for s in itertools.product(numbers, repeat=ndim) if torch.Size(s).numel() == 24
        ]
    base, base_ = numbered((4, 3, 2, 4)), to_llaisys(numbered((4, 3, 2, 4)), device)
    for dim, start, end in [(0, 1, 2), (1, 0, 1), (2, 1, 2), (3, 1, 2), (3, 0, 1)]:
        values, tensor = base.narrow(dim, start, end - start), base_.slice(dim, start, end)
        for order in itertools.permutations(range(4)):
            permuted, permuted_ = values.permute(order), tensor.permute(*order)
            for shape in shapes:
                check_view(permuted_, permuted, shape)


def test_views_of_scalars_ones_and_nothing(device):
    scalar = torch.tensor(7)
    for shape in [(), (1,), (1, 1, 1), (0,), (2,)]:
        check_view(to_llaisys(scalar, device), scalar, shape)
    ones = numbered((5, 7)).narrow(0, 2, 1).narrow(1, 3, 1)
    ones_ = to_llaisys(numbered((5, 7)), device).slice(0, 2, 3).slice(1, 3, 4)
    for shape in [(), (1,), (1, 1), (1, 1, 1)]:
        check_view(ones_, ones, shape)
    for start in [(0,), (2, 0), (3, 0, 5), (0, 0)]:
        empty = torch.empty(start, dtype=torch.int64)
        for shape in [(0,), (5, 0), (0, 5), (3, 0, 5), (1,), (), (2, 0), (0, 0)]:
            check_view(to_llaisys(empty, device), empty, shape)
    empty, empty_ = numbered((3, 4)).T[:, :0], to_llaisys(numbered((3, 4)), device).permute(1, 0)
    for shape in [(4, 0), (0,), (0, 7)]:
        check_view(empty_.slice(1, 0, 0), empty, shape)


def test_random_views(device):
    """Chains of permute, slice and view over shapes with ones and zeros."""

    def check(a, b, c, d, order, dim, cut, target):
        values = numbered((a, b, c, d))
        tensor = to_llaisys(values, device)
        values, tensor = values.permute(order), tensor.permute(*order)
        size = values.shape[dim]
        start, end = min(cut, size), max(size - cut, min(cut, size))
        values, tensor = values.narrow(dim, start, end - start), tensor.slice(dim, start, end)
        check_same(tensor, values)
        a, b, c, d = values.shape
        targets = [(a * b, c, d), (a, b * c, d), (a, b, c * d), (a * b * c * d,), (a, 1, b, c, d)]
        targets += [
            (a * b, c * d),
            (b, a, c, d),
            (a, b, 1, c, 1, d),
            (a * b, c // 2, 2, d),
            (d, c, b, a),
        ]
        check_view(tensor, values, targets[target])

    small = [1, 2, 3, 4, 0]
    orders = list(itertools.permutations(range(4)))
    forall(
        check,
        200,
        a=small,
        b=small,
        c=small,
        d=small,
        order=orders,
        dim=range(4),
        cut=range(3),
        target=range(10),
    )


def test_views_of_views(device):
    values = numbered((4, 6, 10))
    tensor = to_llaisys(values, device)
    check_same(
        tensor.permute(2, 0, 1).slice(0, 2, 9).slice(2, 1, 5).permute(2, 1, 0).slice(0, 0, 2),
        values.permute(2, 0, 1)[2:9][:, :, 1:5].permute(2, 1, 0)[:2],
    )
    check_same(tensor.slice(0, 1, 3).view(12, 10).view(2, 60), values[1:3].view(2, 60))
    check_same(tensor.slice(1, 3, 3), values[:, 3:3])
    check_same(tensor.slice(2, 10, 10), values[:, :, 10:10])
    check_same(tensor.slice(0, 0, 4), values)


def test_load(device):
    """Dense and strided tensors take packed values; what lies between stays."""
    for dtype in ("u8", "i16", "bf16", "f32", "i64"):
        base = numbered((6, 8), dtype)
        fresh = (numbered((3, 4), dtype) + 100).contiguous()
        tensor = to_llaisys(base, device)
        tensor.slice(0, 1, 4).slice(1, 2, 6).load(fresh.data_ptr())
        base[1:4, 2:6] = fresh
        assert check_equal(tensor, base, strict=True)
        transposed = (numbered((8, 6), dtype) + 7).contiguous()
        tensor.permute(1, 0).load(transposed.data_ptr())
        assert check_equal(tensor, transposed.T, strict=True)
    llaisys.Tensor((0, 3), device=llaisys_device(device)).load(None)
    scalar = to_llaisys(torch.tensor(2.5), device)
    assert float(to_torch(scalar)) == 2.5


def test_storage_lives_as_long_as_its_views(device):
    values = numbered((1000, 10))
    tensor = to_llaisys(values, device)
    views = [tensor.slice(0, i, i + 1) for i in range(1000)]
    del tensor
    gc.collect()
    others = [to_llaisys(numbered((1000, 10)) * 0, device) for _ in range(4)]  # would reuse it
    for i, view in enumerate(views):
        assert check_equal(view, values[i : i + 1], strict=True)
    del others
    for step in (2, 1):  # in any order
        del views[::step]
        gc.collect()


def test_views_end_on_many_threads(device):
    tensor = to_llaisys(numbered((64, 64)), device)

    def work():
        for _ in range(200):
            view = tensor.permute(1, 0).slice(0, 3, 60)
            view.slice(1, 0, 5)
            del view

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert check_equal(tensor, numbered((64, 64)), strict=True)


def debug_text(tensor):
    with captured_stdout() as captured:
        tensor.debug()
    head, _, values = captured[0].partition("\n")
    return head, values


def test_debug(device):
    tensor = to_llaisys(numbered((2, 2, 3)), device)
    head, values = debug_text(tensor)
    assert head == f"Tensor: shape [2, 2, 3] strides [6, 3, 1] dtype i64 device {device}:0"
    assert values == "0 1 2\n3 4 5\n\n6 7 8\n9 10 11\n"
    assert debug_text(tensor.permute(2, 0, 1))[1] == "0 3\n6 9\n\n1 4\n7 10\n\n2 5\n8 11\n"
    assert debug_text(tensor.slice(2, 1, 2).slice(0, 1, 2))[1] == "7\n10\n"
    assert debug_text(to_llaisys(torch.tensor(3.5), device))[1] == "3.5\n"
    assert debug_text(to_llaisys(torch.zeros(2, 0), device))[1] == ""
    assert debug_text(to_llaisys(torch.tensor([1, 2]), device))[1] == "1 2\n"


def test_debug_prints_every_dtype(device):
    numbers = {
        "i8": "-3 7",
        "i16": "-3 7",
        "i32": "-3 7",
        "i64": "-3 7",
        "u8": "3 250",
        "f16": "-0.5 3.25",
        "bf16": "-0.5 3.25",
        "f32": "-0.5 3.25",
        "f64": "-0.5 3.25",
    }
    for dtype, text in numbers.items():
        values = torch.tensor([float(x) for x in text.split()], dtype=torch_dtype(dtype))
        assert debug_text(to_llaisys(values, device))[1] == text + "\n", dtype
    assert debug_text(to_llaisys(torch.tensor([True, False]), device))[1] == "true false\n"
    special = torch.tensor([float("nan"), float("inf"), -0.0])
    for dtype in ("f16", "bf16", "f32"):
        text = debug_text(to_llaisys(special.to(torch_dtype(dtype)), device))[1]
        assert text.replace("-nan", "nan") == "nan inf -0\n"
    raw = (ctypes.c_uint8 * 32)(*range(32))
    for dtype in llaisys.DataType:
        if dtype != llaisys.DataType.INVALID:
            tensor = llaisys.Tensor((2,), dtype, llaisys_device(device))
            tensor.load(ctypes.addressof(raw))
            head, values = debug_text(tensor)
            assert f"dtype {dtype.name.lower()} " in head
            assert len(values.split()) == 2 and values.endswith("\n")


def test_refusals(device):
    kind = llaisys_device(device)
    tensor = to_llaisys(numbered((3, 4)), device)
    expect_error(lambda: llaisys.Tensor((1,) * 9, device=kind), "0 to 8", "9")
    expect_error(lambda: llaisys.Tensor((2,), dtype=0, device=kind), "dtype", "0")
    expect_error(lambda: llaisys.Tensor((2,), dtype=20, device=kind), "dtype", "20")
    expect_error(lambda: llaisys.Tensor((2,), device=2), "device", "2")
    expect_error(lambda: llaisys.Tensor((2,), device=kind, device_id=99), "99")
    expect_error(lambda: llaisys.Tensor((2,), device=kind, device_id=-1), "-1")
    for shape in [(2**62,), (2**32, 2**32), (2**63, 2), (2**21,) * 3, (0, 2**40, 2**40)]:
        expect_error(
            lambda s=shape: llaisys.Tensor(s, device=kind), "tensorCreate", str(list(shape))
        )

    expect_error(lambda: tensor.view(5, 2), "12", "[3, 4]", "[5, 2]")
    expect_error(lambda: tensor.view(2**33, 2**33), "tensorView")
    expect_error(lambda: tensor.view(*(1,) * 9), "0 to 8")
    expect_error(lambda: tensor.permute(1, 0).view(12), "[4, 3]", "[1, 4]", "[12]")
    expect_error(lambda: tensor.permute(0, 0), "permutation", "[0, 0]")
    expect_error(lambda: tensor.permute(0, 2), "permutation", "[0, 2]")
    expect_error(lambda: tensor.slice(2, 0, 1), "dimension", "2")
    expect_error(lambda: tensor.slice(1, 0, 5), "tensorSlice", "4", "end 5")
    expect_error(lambda: tensor.slice(1, 3, 2), "tensorSlice", "start 3", "end 2")
    expect_error(lambda: tensor.slice(0, 2**63, 2**64 - 1), "tensorSlice")
    expect_error(lambda: tensor.load(None), "tensorLoad", "96", "NULL")
    for call in (
        lambda: llaisys.Tensor((-1,)),
        lambda: tensor.view(-1),
        lambda: tensor.slice(0, -1, 2),
        lambda: tensor.permute(0),
    ):
        try:
            call()
        except ValueError:
            continue
        raise AssertionError("expected a ValueError")
    assert check_equal(tensor, numbered((3, 4)), strict=True)


def test_null_handles():
    """C callers may pass NULL: every function refuses it and none crashes."""
    lib, sizes = LIB_LLAISYS, (ctypes.c_size_t * 2)(1, 1)
    for call in (
        lambda: lib.tensorGetData(None),
        lambda: lib.tensorGetNdim(None),
        lambda: lib.tensorGetShape(None, sizes),
        lambda: lib.tensorGetStrides(None, (ctypes.c_ssize_t * 2)()),
        lambda: lib.tensorGetDataType(None),
        lambda: lib.tensorGetDeviceType(None),
        lambda: lib.tensorGetDeviceId(None),
        lambda: lib.tensorDebug(None),
        lambda: lib.tensorIsContiguous(None),
        lambda: lib.tensorLoad(None, 64),
        lambda: lib.tensorView(None, sizes, 2),
        lambda: lib.tensorPermute(None, sizes),
        lambda: lib.tensorSlice(None, 0, 0, 1),
        lambda: lib.tensorCreate(None, 2, llaisys.DataType.F32, 0, 0),
    ):
        expect_error(call, "NULL")
    tensor = llaisys.Tensor((2, 3))
    for call in (
        lambda: lib.tensorGetShape(tensor.lib_tensor(), None),
        lambda: lib.tensorGetStrides(tensor.lib_tensor(), None),
        lambda: lib.tensorPermute(tensor.lib_tensor(), None),
        lambda: lib.tensorView(tensor.lib_tensor(), None, 2),
    ):
        expect_error(call, "NULL")
    lib.tensorDestroy(None)


def test_destroying_keeps_the_error():
    """So that a tensor that Python collects does not hide another call's failure."""
    tensor = llaisys.Tensor((2,))
    expect_error(lambda: llaisys.Tensor((2,), dtype=0), "dtype")
    del tensor
    gc.collect()
    assert b"dtype" in LIB_LLAISYS.llaisysGetLastError()


def test_tensors_may_outlive_the_interpreter():
    """Objects still alive when Python ends are destroyed, or not, without a word."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import llaisys\n"
        "class Cycle: pass\n"
        "llaisys.keep = Cycle(); llaisys.keep.me = llaisys.keep\n"
        "llaisys.keep.tensor = llaisys.Tensor((2, 3)); view = llaisys.keep.tensor.slice(0, 0, 1)\n"
        "sys.keep = [view, llaisys.Tensor((4,))]\n"
    )
    bindings = str(Path(llaisys.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program, bindings], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


if __name__ == "__main__":
    script_main(globals(), title="tensors")
