"""Ops.rms_norm: out = weight * in / sqrt(mean(in^2) + eps) over the last dimension."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bindings"))

import llaisys
import torch
from test_utils import (
    FLOATS,
    LAYOUTS,
    PRECISION,
    Placed,
    assert_close,
    benchmark,
    check_refusals,
    dtype_name,
    expect_error,
    forall,
    random_tensor,
    random_values,
    script_main,
    to_llaisys,
    to_torch,
    torch_device,
    torch_dtype,
)

SHAPES = [(1, 4), (512, 4096)]
LARGE = [(16384, 4096), (32768, 1536)]  # for --profile on a GPU


def reference(x, w, eps):
    """f64, of the inputs as they are."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w.double()


def check_rms_norm(x, w, eps, device, layouts=("dense", "dense", "dense")):
    x_, w_ = Placed(x, device, layouts[0]), Placed(w, device, layouts[1])
    out_ = Placed(torch.full_like(x, 9), device, layouts[2])
    llaisys.Ops.rms_norm(out_.tensor, x_.tensor, w_.tensor, eps)
    where = torch_device(device)
    what = f"rms_norm {tuple(x.shape)} {x.dtype} eps {eps} {layouts}"
    expected = reference(x.to(where), w.to(where), eps)
    assert_close(out_.read(), expected, *PRECISION[dtype_name(x.dtype)], what)
    assert x_.is_unchanged() and w_.is_unchanged()


def test_shapes(device):
    odd = [(1,), (9,), (1, 1), (3, 1), (7, 13), (2, 3, 5), (2, 1, 3, 4), (5, 1536), (3, 8961)]
    empty = [(0, 4), (4, 0), (2, 0, 3)]
    for dtype in FLOATS:
        for shape in SHAPES + odd + empty:
            x, w = random_values(shape, dtype), random_values(shape[-1:], dtype)
            check_rms_norm(x, w, 1e-5, device)


def test_layouts(device):
    for x in LAYOUTS:
        for w in LAYOUTS:
            for out in LAYOUTS:
                for shape in [(5,), (4, 7), (3, 2, 5)]:
                    values, weight = random_values(shape, "f16"), random_values(shape[-1:], "f16")
                    check_rms_norm(values, weight, 1e-6, device, (x, w, out))


def test_random(device):
    def check(rows, d, dtype, eps, layout):
        x, w = random_values((rows, d), dtype, -4, 4), random_values((d,), dtype, -2, 2)
        check_rms_norm(x, w, eps, device, (layout, "dense", layout))

    forall(
        check,
        60,
        rows=range(12),
        d=range(1, 200),
        dtype=FLOATS,
        eps=[1e-6, 1e-5, 1e-2, 1.0],
        layout=LAYOUTS,
    )


def test_magnitudes(device):
    """Squares are summed in f32: they overflow f16 and vanish in it."""
    for dtype in FLOATS:
        w = random_values((64,), dtype)
        for scale in (30000.0, 1e-4, 300.0):
            x = (random_values((4, 64), "f32") * scale).to(torch_dtype(dtype))
            check_rms_norm(x, w, 1e-6, device)
        check_rms_norm(torch.zeros(3, 64, dtype=w.dtype), w, 1e-6, device)


def test_rounds_as_transformers_does(device):
    """The normalised value is rounded before the weight multiplies it, as in Qwen2RMSNorm."""
    for dtype in ("f16", "bf16"):
        x, w = random_values((64, 1536), dtype, -3, 3), random_values((1536,), dtype, 0.5, 2)
        out_ = to_llaisys(torch.zeros_like(x), device)
        llaisys.Ops.rms_norm(out_, to_llaisys(x, device), to_llaisys(w, device), 1e-6)
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        expected = w * (x.float() * scale).to(x.dtype)
        differ = (to_torch(out_) != expected).float().mean()
        assert differ < 1e-3, f"{dtype}: {differ:.2%} of elements differ"


def test_overlap_acts_as_if_inputs_were_read_first(device):
    x, w = random_values((6, 33), "f32"), random_values((33,), "f32")
    x_ = to_llaisys(x, device)
    llaisys.Ops.rms_norm(x_, x_, to_llaisys(w, device), 1e-6)
    assert_close(to_torch(x_), reference(x, w, 1e-6), 1e-5, 1e-5, "in place")


def test_refusals(device):
    matrix, vector = ((2, 3), "f32"), ((3,), "f32")
    check_refusals(
        device,
        llaisys.Ops.rms_norm,
        {"out": matrix, "in": matrix, "weight": vector},
        outputs=["out"],
        scalars=[1e-6],
        bad=[
            ({"weight": ((2,), "f32")}, ["llaisysRmsNorm: weight", "d = 3", "[2]"]),
            ({"in": ((), "f32")}, ["llaisysRmsNorm: in", "[]"]),
            ({"out": ((3, 3), "f32")}, ["llaisysRmsNorm: out", "[2, d = 3]", "[3, 3]"]),
            ({"out": ((2, 4), "f32")}, ["llaisysRmsNorm: out", "[2, 4]"]),
        ],
    )
    x_, w_ = to_llaisys(torch.ones(2, 3), device), to_llaisys(torch.ones(3), device)
    for eps in (-1e-3, float("nan"), float("inf")):
        out_ = Placed(torch.ones(2, 3), device)
        expect_error(lambda o=out_, e=eps: llaisys.Ops.rms_norm(o.tensor, x_, w_, e), "eps")
        assert out_.is_unchanged()


def profile(device):
    for shape in [*SHAPES, *(LARGE if device == "nvidia" else [])]:
        for dtype in FLOATS:
            print(f"   shape {shape} dtype <{dtype}>")
            x, x_ = random_tensor(shape, dtype, device)
            w, w_ = random_tensor(shape[-1:], dtype, device)
            _, out_ = random_tensor(shape, dtype, device)
            benchmark(
                lambda x=x, w=w: torch.nn.functional.rms_norm(x, w.shape, w, 1e-5),
                lambda o=out_, x=x_, w=w_: llaisys.Ops.rms_norm(o, x, w, 1e-5),
                device,
            )


if __name__ == "__main__":
    script_main(globals(), profile, "Ops.rms_norm")
