"""Ops.argmax: the largest element and its index; the first of equals, NaN above all."""

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
    expect_error,
    forall,
    random_tensor,
    random_values,
    script_main,
    to_llaisys,
    to_torch,
    torch_dtype,
    zero_tensor,
)

SIZES = [4, 4096]
LARGE = [151936, 1 << 27]  # for --profile on a GPU


def first_of_largest(values):
    """torch.max does not say which of equals it takes."""
    hits = values.isnan() if values.isnan().any() else values == values.max()
    return int(hits.nonzero()[0, 0])


def check_argmax(values, device, layout="dense", what=""):
    values_ = Placed(values, device, layout)
    index_ = Placed(torch.full((1,), -7), device)
    value_ = Placed(torch.full((1,), 99, dtype=values.dtype), device)
    llaisys.Ops.argmax(index_.tensor, value_.tensor, values_.tensor)
    index = first_of_largest(values)
    assert int(index_.read()) == index, f"{what}: index {int(index_.read())}, not {index}"
    assert_close(value_.read(), values[index : index + 1], what=what)
    assert values_.is_unchanged()


def test_sizes(device):
    for dtype in FLOATS:
        for n in [*SIZES, 1, 2, 3, 7, 8, 9, 31, 33, 255, 257, 1025, 151936, 1000003]:
            check_argmax(random_values((n,), dtype), device, what=f"{n} {dtype}")


def test_every_position(device):
    for dtype in FLOATS:
        for n in (1, 5, 16, 37, 64):
            for position in range(n):
                values = -random_values((n,), dtype, 1.0, 2.0)
                values[position] = -0.5
                check_argmax(values, device, what=f"largest at {position} of {n}")


def test_ties_take_the_first(device):
    for dtype in FLOATS:
        check_argmax(torch.zeros(100, dtype=torch_dtype(dtype)), device, what="all equal")
        for n in (10, 1000, 70000):
            values = random_values((n,), dtype)
            values[torch.tensor([n // 3, n // 2, n - 1])] = 2.0
            check_argmax(values, device, what=f"three equals of {n}")
        zeros = torch.tensor([-1.0, -0.0, 0.0, -0.0], dtype=torch_dtype(dtype))
        check_argmax(zeros, device, what="zeros of both signs are equal")


def test_nan_and_infinities(device):
    inf, nan = float("inf"), float("nan")
    lists = [
        [nan],
        [-inf],
        [-inf] * 40,
        [nan] * 40,
        [1.0, nan, inf, nan],
        [inf, 1.0, nan],
        [-inf, -inf, -3.0, -inf],
        [1.0, inf, 2.0, inf],
        [0.0] * 39 + [nan],
        [nan] + [inf] * 39,
    ]
    for dtype in FLOATS:
        for numbers in lists:
            values = torch.tensor(numbers, dtype=torch_dtype(dtype))
            check_argmax(values, device, what=f"{numbers} {dtype}")


def test_random(device):
    def check(n, levels, dtype, layout, nan):
        values = torch.randint(0, levels, (n,)).to(torch_dtype(dtype))  # few levels: many ties
        if nan:
            values[torch.rand(n) < 0.1] = float("nan")
        check_argmax(values, device, layout, f"{n} {dtype} {layout}")

    forall(
        check,
        60,
        n=range(1, 300),
        levels=[1, 2, 3, 1000],
        dtype=FLOATS,
        layout=LAYOUTS,
        nan=[False, True],
    )


def test_a_column(device):
    values = random_values((64, 5), "f32")
    column_ = to_llaisys(values, device).slice(1, 3, 4).view(64)
    index_, value_ = zero_tensor((1,), "i64", device)[1], zero_tensor((1,), "f32", device)[1]
    llaisys.Ops.argmax(index_, value_, column_)
    assert int(to_torch(index_)) == int(values[:, 3].argmax())


def test_scalar_outputs(device):
    values = random_values((50,), "f32")
    index_, value_ = zero_tensor((), "i64", device)[1], zero_tensor((), "f32", device)[1]
    llaisys.Ops.argmax(index_, value_, to_llaisys(values, device))
    assert int(to_torch(index_)) == int(values.argmax())
    assert float(to_torch(value_)) == float(values.max())


def test_refusals(device):
    check_refusals(
        device,
        llaisys.Ops.argmax,
        {"max_idx": ((1,), "i64"), "max_val": ((1,), "f32"), "vals": ((4,), "f32")},
        outputs=["max_idx", "max_val"],
        bad=[
            ({"vals": ((0,), "f32")}, ["llaisysArgmax: vals", "at least 1", "0"]),
            ({"vals": ((), "f32")}, ["llaisysArgmax: vals", "[n]", "[]"]),
            ({"max_idx": ((2,), "i64")}, ["llaisysArgmax: max_idx", "[2]"]),
            ({"max_idx": ((0,), "i64")}, ["llaisysArgmax: max_idx", "[0]"]),
            ({"max_val": ((1, 1), "f32")}, ["llaisysArgmax: max_val", "[1, 1]"]),
        ],
    )
    expect_error(lambda: llaisys.Ops.argmax(None, None, None), "llaisysArgmax")


def profile(device):
    for n in [*SIZES, *(LARGE if device == "nvidia" else [])]:
        for dtype in FLOATS:
            print(f"   shape ({n},) dtype <{dtype}>")
            values, values_ = random_tensor((n,), dtype, device)
            index, index_ = zero_tensor((1,), "i64", device)
            value, value_ = zero_tensor((1,), dtype, device)
            benchmark(
                lambda v=values, m=value, i=index: torch.max(v, keepdim=True, dim=-1, out=(m, i)),
                lambda v=values_, m=value_, i=index_: llaisys.Ops.argmax(i, m, v),
                device,
            )


if __name__ == "__main__":
    script_main(globals(), profile, "Ops.argmax")
