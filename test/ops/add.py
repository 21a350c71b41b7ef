"""Ops.add: c = a + b, rounded once, so that it equals torch.add exactly."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bindings"))

import llaisys
import torch
from test_utils import (
    FLOATS,
    LAYOUTS,
    Placed,
    assert_close,
    benchmark,
    check_refusals,
    forall,
    random_tensor,
    random_values,
    script_main,
    to_llaisys,
    to_torch,
    torch_dtype,
)

SHAPES = [(2, 3), (512, 4096)]
LARGE = [(16384, 4096)]  # for --profile on a GPU


def check_add(shape, dtype, device, layouts=("dense", "dense", "dense")):
    a, b = random_values(shape, dtype), random_values(shape, dtype)
    a_, b_ = Placed(a, device, layouts[0]), Placed(b, device, layouts[1])
    c_ = Placed(random_values(shape, dtype), device, layouts[2])
    llaisys.Ops.add(c_.tensor, a_.tensor, b_.tensor)
    assert_close(c_.read(), torch.add(a, b), what=f"add {shape} {dtype} {layouts}")
    assert a_.is_unchanged() and b_.is_unchanged()


def test_shapes(device):
    odd = [(), (1,), (7,), (65537,), (2, 3, 5, 7), (1,) * 8, (1, 3, 1, 2)]
    empty = [(0,), (3, 0, 2)]
    for dtype in FLOATS:
        for shape in SHAPES + odd + empty:
            check_add(shape, dtype, device)


def test_layouts(device):
    for a in LAYOUTS:
        for b in LAYOUTS:
            for c in LAYOUTS:
                for shape in [(), (5,), (4, 7), (3, 2, 5), (2, 0)]:
                    check_add(shape, "bf16", device, (a, b, c))


def test_random(device):
    def check(rows, columns, dtype, a, b, c):
        check_add((rows, columns), dtype, device, (a, b, c))

    sizes = range(40)
    forall(check, 40, rows=sizes, columns=sizes, dtype=FLOATS, a=LAYOUTS, b=LAYOUTS, c=LAYOUTS)


def test_special_values(device):
    for dtype in FLOATS:
        largest = torch.finfo(torch_dtype(dtype)).max
        smallest = torch.finfo(torch_dtype(dtype)).smallest_normal / 2  # subnormal
        inf, nan = float("inf"), float("nan")
        a = [largest, inf, inf, nan, -0.0, smallest, 1.0, -largest]
        b = [largest, -inf, 1.0, 1.0, -0.0, smallest, smallest, largest]
        a, b = torch.tensor(a, dtype=torch_dtype(dtype)), torch.tensor(b, dtype=torch_dtype(dtype))
        c_ = Placed(torch.zeros_like(a), device)
        llaisys.Ops.add(c_.tensor, to_llaisys(a, device), to_llaisys(b, device))
        assert_close(c_.read(), a + b, what=f"special values {dtype}")


def test_in_place(device):
    for dtype in FLOATS:
        a, b = random_values((33, 65), dtype), random_values((33, 65), dtype)
        a_, b_ = to_llaisys(a, device), to_llaisys(b, device)
        llaisys.Ops.add(a_, a_, b_)
        assert_close(to_torch(a_), a + b, what="c is a")
        llaisys.Ops.add(b_, a_, b_)
        assert_close(to_torch(b_), (a + b) + b, what="c is b")
        llaisys.Ops.add(b_, b_, b_)
        assert_close(to_torch(b_), ((a + b) + b) * 2, what="c is a and b")


def test_overlap_acts_as_if_inputs_were_read_first(device):
    values = random_values((50, 50), "f32")
    memory = to_llaisys(values, device)
    llaisys.Ops.add(memory.slice(0, 1, 50), memory.slice(0, 0, 49), memory.slice(0, 0, 49))
    expected = torch.cat([values[:1], values[:49] * 2])
    assert_close(to_torch(memory), expected, what="a row further")

    memory = to_llaisys(values, device)
    llaisys.Ops.add(memory, memory, memory.permute(1, 0))
    assert_close(to_torch(memory), values + values.T, what="its own transpose")


def test_refusals(device):
    matrix = ((2, 3), "f32")
    check_refusals(
        device,
        llaisys.Ops.add,
        {"c": matrix, "a": matrix, "b": matrix},
        outputs=["c"],
        bad=[
            ({"b": ((3, 2), "f32")}, ["llaisysAdd: b", "[2, 3]", "[3, 2]"]),
            ({"b": ((3,), "f32")}, ["llaisysAdd: b", "[3]"]),
            ({"c": ((2, 4), "f32")}, ["llaisysAdd: c", "[2, 4]"]),
            ({"c": ((2, 3), "bf16")}, ["llaisysAdd: c", "f32", "bf16"]),
        ],
    )


def profile(device):
    for shape in [*SHAPES, *(LARGE if device == "nvidia" else [])]:
        for dtype in FLOATS:
            print(f"   shape {shape} dtype <{dtype}>")
            a, a_ = random_tensor(shape, dtype, device)
            b, b_ = random_tensor(shape, dtype, device)
            c, c_ = random_tensor(shape, dtype, device)
            benchmark(
                lambda a=a, b=b, c=c: torch.add(a, b, out=c),
                lambda a=a_, b=b_, c=c_: llaisys.Ops.add(c, a, b),
                device,
            )


if __name__ == "__main__":
    script_main(globals(), profile, "Ops.add")
