"""Ops.rearrange: copies between any two stridings of one shape, bit by bit, any dtype."""

import itertools
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
    benchmark,
    bits,
    check_refusals,
    forall,
    random_tensor,
    script_main,
    to_llaisys,
    to_torch,
    torch_dtype,
)

SHAPES = [(2, 3), (512, 4096)]
LARGE = [(8192, 8192)]  # for --profile on a GPU
DTYPES = ("bool", "i8", "u8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64")


def any_values(shape, dtype):
    return torch.randint(0, 2 if dtype == "bool" else 127, tuple(shape)).to(torch_dtype(dtype))


def check_rearrange(shape, dtype, device, layouts):
    values = any_values(shape, dtype)
    in_ = Placed(values, device, layouts[0])
    out_ = Placed(any_values(shape, dtype), device, layouts[1])
    llaisys.Ops.rearrange(out_.tensor, in_.tensor)
    assert torch.equal(bits(out_.read()), bits(values)), f"{shape} {dtype} {layouts}"
    assert in_.is_unchanged()


def test_shapes(device):
    shapes = [(), (1,), (9,), (1, 1, 1), (4, 7), (33, 65), (3, 1, 5), (2, 3, 4, 5)]
    shapes += [(2,) * 8, (1, 3) * 4, (0,), (3, 0, 2)]
    for shape in shapes:
        for layouts in itertools.product(LAYOUTS, LAYOUTS):
            check_rearrange(shape, "bf16", device, layouts)


def test_dtypes(device):
    for dtype in DTYPES:
        for layouts in itertools.product(LAYOUTS, LAYOUTS):
            check_rearrange((5, 3, 4), dtype, device, layouts)


def test_large(device):
    for dtype in FLOATS:
        check_rearrange((512, 1031), dtype, device, ("permuted", "dense"))
        check_rearrange((512, 1031), dtype, device, ("dense", "sliced"))


def test_every_order_of_dimensions(device):
    values = any_values((2, 3, 4, 5), "i32")
    for order in itertools.permutations(range(4)):
        view = to_llaisys(values, device).permute(*order)
        out_ = Placed(any_values(view.shape(), "i32"), device)
        llaisys.Ops.rearrange(out_.tensor, view)
        assert torch.equal(out_.read(), values.permute(order)), order


def test_random(device):
    def check(ndim, size, dtype, source, target):
        check_rearrange(
            [(size * 7 + i * 3) % 5 for i in range(ndim)], dtype, device, (source, target)
        )

    forall(
        check,
        60,
        ndim=range(9),
        size=range(20),
        dtype=DTYPES,
        source=LAYOUTS,
        target=LAYOUTS,
    )


def test_overlap_acts_as_if_the_input_was_read_first(device):
    values = any_values((37, 37), "i64")
    memory = to_llaisys(values, device)
    llaisys.Ops.rearrange(memory, memory.permute(1, 0))
    assert torch.equal(to_torch(memory), values.T), "transposed in place"

    memory = to_llaisys(values, device)
    llaisys.Ops.rearrange(memory.slice(0, 1, 37), memory.slice(0, 0, 36))
    assert torch.equal(to_torch(memory), torch.cat([values[:1], values[:36]])), "a row further"

    memory = to_llaisys(values, device)
    llaisys.Ops.rearrange(memory, memory)
    assert torch.equal(to_torch(memory), values), "to itself"


def test_columns_of_one_matrix_do_not_meet(device):
    values = any_values((8, 6), "i32")
    memory = to_llaisys(values, device)
    llaisys.Ops.rearrange(memory.slice(1, 0, 3), memory.slice(1, 3, 6))
    assert torch.equal(to_torch(memory), torch.cat([values[:, 3:], values[:, 3:]], dim=1))


def test_refusals(device):
    check_refusals(
        device,
        llaisys.Ops.rearrange,
        {"out": ((2, 3), "f32"), "in": ((2, 3), "f32")},
        outputs=["out"],
        bad=[
            ({"out": ((3, 2), "f32")}, ["llaisysRearrange: out", "[2, 3]", "[3, 2]"]),
            ({"out": ((6,), "f32")}, ["llaisysRearrange: out", "[6]"]),
            ({"in": ((2, 3), "u8")}, ["llaisysRearrange: out", "u8", "f32"]),
        ],
    )


def profile(device):
    for shape in [*SHAPES, *(LARGE if device == "nvidia" else [])]:
        for dtype in FLOATS:
            print(f"   transpose of {shape} dtype <{dtype}>")
            x, x_ = random_tensor(shape, dtype, device)
            out, out_ = random_tensor(shape[::-1], dtype, device)
            view_ = x_.permute(1, 0)
            benchmark(
                lambda o=out, x=x: o.copy_(x.T),
                lambda o=out_, x=view_: llaisys.Ops.rearrange(o, x),
                device,
            )


if __name__ == "__main__":
    script_main(globals(), profile, "Ops.rearrange")
