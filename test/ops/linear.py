"""Ops.linear: out = in weight^T + bias, summed in f32, rounded once."""

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
    forall,
    random_tensor,
    random_values,
    script_main,
    to_llaisys,
    to_torch,
    torch_device,
    torch_dtype,
)

# m, n, k
SHAPES = [(2, 3, 4), (512, 4096, 4096)]
# for --profile on a GPU
LARGE = [
    (m, n, k)
    for m in (1, 1024, 2048, 4096)
    for n, k in ((2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960))
]


def reference(x, w, bias):
    """f64, of the inputs as they are."""
    out = x.double() @ w.double().T
    return out if bias is None else out + bias.double()


def check_linear(m, n, k, dtype, device, with_bias=True, layouts=("dense",) * 4, low=0.0):
    """Values as upstream's: products of [0, 0.1) and [0, 0.01); of both signs with low -1."""
    x = random_values((m, k), dtype, low * 0.1, 0.1)
    w = random_values((n, k), dtype, low * 0.01, 0.01)
    bias = random_values((n,), dtype, low) if with_bias else None
    check_values(x, w, bias, device, layouts, reference_on(device, x, w, bias))


def reference_on(device, x, w, bias):
    where = torch_device(device)
    return reference(x.to(where), w.to(where), None if bias is None else bias.to(where))


def check_values(x, w, bias, device, layouts, expected):
    x_, w_ = Placed(x, device, layouts[0]), Placed(w, device, layouts[1])
    bias_ = None if bias is None else Placed(bias, device, layouts[2])
    out_ = Placed(torch.full((len(x), len(w)), 9, dtype=x.dtype), device, layouts[3])
    llaisys.Ops.linear(out_.tensor, x_.tensor, w_.tensor, bias_.tensor if bias_ else None)
    dtype = dtype_name(x.dtype)
    what = f"linear {tuple(x.shape)} {tuple(w.shape)} {dtype} bias {bias is not None} {layouts}"
    assert_close(out_.read(), expected, *PRECISION[dtype], what)
    assert x_.is_unchanged() and w_.is_unchanged() and (bias_ is None or bias_.is_unchanged())


def test_shapes(device):
    odd = [(1, 1, 1), (1, 7, 3), (5, 3, 1), (17, 33, 65), (129, 127, 131), (3, 1, 999)]
    odd += [(1, 1536, 1536), (2, 257, 96), (8, 64, 8960), (16, 16, 16), (31, 130, 72)]
    for dtype in FLOATS:
        for m, n, k in odd:
            check_linear(m, n, k, dtype, device)
            check_linear(m, n, k, dtype, device, with_bias=False, low=-1.0)


def test_upstream_shapes(device):
    for m, n, k in SHAPES:
        x, w = torch.randint(0, 256, (m, k)) / 2048, torch.randint(0, 256, (n, k)) / 32768
        bias = torch.randint(0, 256, (n,)) / 256
        expected = reference_on(device, x, w, bias)
        for dtype in FLOATS:  # all have these values
            parts = (values.to(torch_dtype(dtype)) for values in (x, w, bias))
            check_values(*parts, device, ("dense",) * 4, expected)


def test_empty(device):
    for dtype in FLOATS:
        for m, n, k in [(0, 4, 5), (4, 0, 5), (0, 0, 0), (0, 0, 3)]:
            check_linear(m, n, k, dtype, device)
        check_linear(3, 5, 0, dtype, device)  # the bias alone
        check_linear(3, 5, 0, dtype, device, with_bias=False)  # zeros


def test_layouts(device):
    for x in LAYOUTS:
        for w in LAYOUTS:
            for out in LAYOUTS:
                check_linear(5, 9, 13, "bf16", device, layouts=(x, w, "dense", out))
                check_linear(5, 9, 13, "f32", device, layouts=(x, w, "sliced", out))


def test_random(device):
    def check(m, n, k, dtype, with_bias, layout):
        check_linear(m, n, k, dtype, device, with_bias, (layout, "dense", "dense", layout), -1.0)

    forall(
        check,
        60,
        m=range(20),
        n=range(40),
        k=range(100),
        dtype=FLOATS,
        with_bias=[False, True],
        layout=LAYOUTS,
    )


def test_long_sums(device):
    """f32 sums of many products stay within a few roundings of the magnitudes that were summed."""
    for k in (10007, 65536, 262144):
        x, w = random_values((3, k), "f32"), random_values((5, k), "f32")
        out_ = Placed(torch.zeros(3, 5), device)
        llaisys.Ops.linear(out_.tensor, to_llaisys(x, device), to_llaisys(w, device), None)
        error = (out_.read().double() - reference(x, w, None)).abs()
        bound = x.double().abs() @ w.double().abs().T * 2e-6
        assert (error <= bound).all(), f"k={k}: error {error.max():.3g}"
        for dtype in ("f16", "bf16"):
            x16, w16 = random_values((3, k), dtype), random_values((5, k), dtype)
            out_ = Placed(random_values((3, 5), dtype), device)
            llaisys.Ops.linear(out_.tensor, to_llaisys(x16, device), to_llaisys(w16, device), None)
            assert_close(
                out_.read(), reference(x16, w16, None), 2e-3, PRECISION[dtype][1], f"k={k} {dtype}"
            )


def test_accumulates_in_f32(device):
    """4096 + 1 + ... + 1 would stay 4096 in f16 or bf16."""
    for dtype in ("f16", "bf16"):
        x = torch.ones(1, 4097, dtype=torch.float32).to(random_values((1,), dtype).dtype)
        w = torch.ones_like(x)
        w[0, 0] = 4096
        out_ = Placed(torch.zeros(1, 1, dtype=x.dtype), device)
        llaisys.Ops.linear(out_.tensor, to_llaisys(x, device), to_llaisys(w, device), None)
        assert float(out_.read()) == 8192.0


def test_infinities_and_nan(device):
    for dtype in FLOATS:
        x, w = random_values((3, 40), dtype), random_values((4, 40), dtype)
        x[0, 7], x[1, 39], w[2, 0] = float("inf"), float("nan"), float("-inf")
        out_ = Placed(random_values((3, 4), dtype), device)
        llaisys.Ops.linear(out_.tensor, to_llaisys(x, device), to_llaisys(w, device), None)
        atol, rtol = PRECISION[dtype]
        assert_close(out_.read(), reference(x, w, None), atol * 4, rtol, f"inf and NaN {dtype}")


def test_overlap_acts_as_if_inputs_were_read_first(device):
    x, w = random_values((6, 6), "f32"), random_values((6, 6), "f32")
    x_, w_ = to_llaisys(x, device), to_llaisys(w, device)
    llaisys.Ops.linear(x_, x_, w_, None)
    assert_close(to_torch(x_), reference(x, w, None), 1e-5, 1e-5, "out is in")


def test_refusals(device):
    check_refusals(
        device,
        llaisys.Ops.linear,
        {
            "out": ((2, 3), "f32"),
            "in": ((2, 4), "f32"),
            "weight": ((3, 4), "f32"),
            "bias": ((3,), "f32"),
        },
        outputs=["out"],
        optional=["bias"],
        bad=[
            ({"weight": ((4, 3), "f32")}, ["llaisysLinear: weight", "k = 4", "[4, 3]"]),
            ({"weight": ((12,), "f32")}, ["llaisysLinear: weight", "[12]"]),
            ({"in": ((1, 2, 4), "f32")}, ["llaisysLinear: in", "[1, 2, 4]"]),
            ({"bias": ((2,), "f32")}, ["llaisysLinear: bias", "n = 3", "[2]"]),
            ({"out": ((3, 2), "f32")}, ["llaisysLinear: out", "m = 2", "n = 3", "[3, 2]"]),
        ],
    )


def profile(device):
    for m, n, k in [*SHAPES, *(LARGE if device == "nvidia" else [])]:
        for dtype in FLOATS:
            print(f"   out ({m}, {n}), in ({m}, {k}), weight ({n}, {k}), dtype <{dtype}>")
            x, x_ = random_tensor((m, k), dtype, device, scale=0.1)
            w, w_ = random_tensor((n, k), dtype, device, scale=0.01)
            bias, bias_ = random_tensor((n,), dtype, device)
            _, out_ = random_tensor((m, n), dtype, device)
            benchmark(
                lambda x=x, w=w, b=bias: torch.nn.functional.linear(x, w, b),
                lambda o=out_, x=x_, w=w_, b=bias_: llaisys.Ops.linear(o, x, w, b),
                device,
            )


if __name__ == "__main__":
    script_main(globals(), profile, "Ops.linear")
