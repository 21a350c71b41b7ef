"""Ops.rope: halves of the last dimension rotate together, by pos / theta^(2j/d)."""

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
    arrange_tensor,
    assert_close,
    benchmark,
    bits,
    check_refusals,
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

SHAPES = [((2, 1, 4), (0, 2)), ((512, 4, 4096), (512, 1024))]  # [seq, heads, d], positions
LARGE = [((32768, 12, 128), (0, 32768))]  # for --profile on a GPU
# Of one rounding of values up to 2; the reference is exact, so f32 needs no relative part.
PRECISION = {"f32": (5e-5, 0.0), "f16": (1e-3, 1e-3), "bf16": (1e-2, 1e-2)}


def angles(positions, d, theta):
    """f64 [seq, d/2]."""
    exponents = torch.arange(0, d, 2, dtype=torch.float64, device=positions.device) / d
    return positions.double()[:, None] / theta**exponents


def reference(x, positions, theta):
    """f64, of the inputs as they are."""
    cos, sin = (f(angles(positions, x.shape[-1], theta))[:, None] for f in (torch.cos, torch.sin))
    a, b = x.double().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def check_rope(shape, positions, dtype, device, theta=10000.0, layouts=("dense",) * 3):
    x = random_values(shape, dtype)
    where = torch_device(device)
    expected = reference(x.to(where), positions.to(where), theta)
    check_values(x, positions, dtype, device, theta, layouts, expected)


def check_values(x, positions, dtype, device, theta, layouts, expected):
    shape = tuple(x.shape)
    x_, positions_ = Placed(x, device, layouts[0]), Placed(positions, device, layouts[1])
    out_ = Placed(random_values(shape, dtype), device, layouts[2])
    llaisys.Ops.rope(out_.tensor, x_.tensor, positions_.tensor, theta)
    what = f"rope {shape} {dtype} theta {theta} {layouts}"
    assert_close(out_.read(), expected, *PRECISION[dtype], what)
    assert x_.is_unchanged() and positions_.is_unchanged()


def test_upstream_shapes(device):
    for shape, (start, end) in SHAPES:
        x, positions = torch.randint(-127, 128, shape) / 128, torch.arange(start, end)
        where = torch_device(device)
        expected = reference(x.to(where), positions.to(where), 10000.0)
        for dtype in FLOATS:  # all have these values
            values = x.to(torch_dtype(dtype))
            check_values(values, positions, dtype, device, 10000.0, ("dense",) * 3, expected)


def test_against_f32_angles(device):
    """As LLAISYS's own test: angles in f32, as PyTorch computes them on the device, and its tolerance."""
    where = torch_device(device)
    for shape, (start, end) in SHAPES:
        half = shape[-1] // 2
        x, positions = torch.rand(shape), torch.arange(start, end)
        exponents = 2 * torch.arange(half, dtype=torch.float32, device=where) / shape[-1]
        turned = positions.to(where).float()[:, None] / 10000.0**exponents
        cos, sin = turned.cos()[:, None], turned.sin()[:, None]
        a, b = x.to(where).split(half, dim=-1)
        expected = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        out_ = to_llaisys(torch.zeros_like(x), device)
        x_, positions_ = to_llaisys(x, device), to_llaisys(positions, device)
        llaisys.Ops.rope(out_, x_, positions_, 10000.0)
        assert_close(to_torch(out_), expected.cpu(), 1e-4, 1e-4, f"rope {shape}, angles in f32")


def test_angles_are_the_cpus(device):
    """Angles below 1024 are rounded to f32 once on every device: what is left are roundings of cos, sin and products."""
    positions = torch.tensor([0, 1, 2, 511, 777, 1000, 1022, 1023, 1024, 1025, 4095, 99991, 131071])
    for d, theta in ((4096, 10000.0), (128, 1000000.0), (64, 2.0)):
        x = random_values((len(positions), 2, d), "f32")
        found = {}
        for name in {"cpu", device}:
            out_ = to_llaisys(torch.zeros_like(x), name)
            llaisys.Ops.rope(out_, to_llaisys(x, name), to_llaisys(positions, name), theta)
            found[name] = to_torch(out_)
        assert_close(found[device], found["cpu"].double(), 3e-6, 0.0, f"rope {d} {theta}")


def test_shapes(device):
    odd = [(1, 1, 2), (1, 3, 6), (5, 1, 10), (7, 2, 64), (3, 12, 128), (2, 5, 254), (9, 7, 34)]
    empty = [(0, 2, 4), (2, 0, 4), (2, 3, 0)]
    for dtype in FLOATS:
        for shape in odd + empty:
            check_rope(shape, torch.arange(100, 100 + shape[0]), dtype, device)


def test_long_positions(device):
    """f32 angles would be off by 1e-3 and more at the end of a context of 128 K."""
    last = 131071
    positions = torch.tensor([0, 1, 4095, 32767, 32768, 65535, 99991, last - 1, last])
    for theta in (10000.0, 1000000.0, 500000.0, 2.0):
        for d in (2, 64, 128, 256):
            for dtype in FLOATS:
                check_rope((len(positions), 2, d), positions, dtype, device, theta)
    check_rope((4096, 1, 8), torch.arange(last - 4095, last + 1), "f32", device, 1000000.0)


def test_positions_in_any_order(device):
    for positions in ([5, 5, 5, 5], [9, 3, 131071, 0], [-1, -131071, -3, 2]):
        check_rope((4, 3, 16), torch.tensor(positions), "f32", device)


def test_position_0_changes_nothing(device):
    for dtype in FLOATS:
        x = random_values((3, 4, 64), dtype)
        out_ = Placed(torch.zeros_like(x), device)
        zeros = to_llaisys(torch.zeros(3, dtype=torch.int64), device)
        llaisys.Ops.rope(out_.tensor, to_llaisys(x, device), zeros, 10000.0)
        assert torch.equal(out_.read(), x)


def test_layouts(device):
    for x in LAYOUTS:
        for positions in LAYOUTS:
            for out in LAYOUTS:
                layouts = (x, positions, out)
                check_rope((5, 3, 8), torch.arange(70, 75), "bf16", device, layouts=layouts)


def test_random(device):
    def check(seq, heads, half, dtype, theta, start, layout):
        positions = (
            torch.randint(0, 131072, (seq,)) if start < 0 else torch.arange(start, start + seq)
        )
        check_rope(
            (seq, heads, half * 2), positions, dtype, device, theta, (layout, "dense", layout)
        )

    forall(
        check,
        60,
        seq=range(12),
        heads=range(1, 8),
        half=range(1, 70),
        dtype=FLOATS,
        theta=[10000.0, 1000000.0, 3.0],
        start=[-1, 0, 1000, 131000],
        layout=LAYOUTS,
    )


def test_in_place(device):
    for dtype in FLOATS:
        x, positions = random_values((9, 5, 64), dtype), torch.arange(3, 12)
        x_, positions_ = to_llaisys(x, device), to_llaisys(positions, device)
        out_ = to_llaisys(torch.zeros_like(x), device)
        llaisys.Ops.rope(out_, x_, positions_, 10000.0)
        llaisys.Ops.rope(x_, x_, positions_, 10000.0)
        assert torch.equal(bits(to_torch(x_)), bits(to_torch(out_))), dtype


def test_heads_of_a_fused_projection(device):
    """q and k as slices of [seq, nh + 2 nkvh, d], rotated where they are."""
    x, positions = random_values((6, 8, 16), "f32"), torch.arange(50, 56)
    fused = to_llaisys(x, device)
    q_and_k = fused.slice(1, 0, 6)
    llaisys.Ops.rope(q_and_k, q_and_k, to_llaisys(positions, device), 10000.0)
    expected = torch.cat([reference(x[:, :6], positions, 10000.0), x[:, 6:].double()], dim=1)
    assert_close(to_torch(fused), expected, 5e-5, 0.0, "fused projection")


def test_refusals(device):
    x = ((2, 3, 4), "f32")
    check_refusals(
        device,
        llaisys.Ops.rope,
        {"out": x, "in": x, "pos_ids": ((2,), "i64")},
        outputs=["out"],
        scalars=[10000.0],
        bad=[
            ({"in": ((2, 3, 5), "f32"), "out": ((2, 3, 5), "f32")}, ["in", "even", "5"]),
            ({"in": ((2, 12), "f32")}, ["llaisysROPE: in", "[seq, heads, d]", "[2, 12]"]),
            ({"pos_ids": ((3,), "i64")}, ["llaisysROPE: pos_ids", "seq = 2", "[3]"]),
            ({"out": ((2, 3, 6), "f32")}, ["llaisysROPE: out", "d = 4", "[2, 3, 6]"]),
        ],
    )
    x_, positions_ = to_llaisys(torch.ones(2, 3, 4), device), to_llaisys(torch.arange(2), device)
    for theta in (0.0, -1.0, float("nan"), float("inf")):
        out_ = Placed(torch.ones(2, 3, 4), device)
        expect_error(
            lambda o=out_, t=theta: llaisys.Ops.rope(o.tensor, x_, positions_, t),
            "llaisysROPE: theta",
        )
        assert out_.is_unchanged()


def torch_rope(out, x, positions, theta):
    half = x.shape[-1] // 2
    exponents = torch.arange(0, half, dtype=torch.float32, device=x.device) * 2 / x.shape[-1]
    turns = (positions.float()[:, None] / theta**exponents)[:, None]
    cos, sin = turns.cos(), turns.sin()
    a, b = x[..., :half], x[..., half:]
    out[..., :half] = a * cos - b * sin
    out[..., half:] = b * cos + a * sin


def profile(device):
    for shape, (start, end) in [*SHAPES, *(LARGE if device == "nvidia" else [])]:
        for dtype in FLOATS:
            print(f"   shape {shape} range {start, end} dtype <{dtype}>")
            x, x_ = random_tensor(shape, dtype, device)
            out, out_ = random_tensor(shape, dtype, device)
            positions, positions_ = arrange_tensor(start, end, device)
            benchmark(
                lambda o=out, x=x, p=positions: torch_rope(o, x, p, 10000.0),
                lambda o=out_, x=x_, p=positions_: llaisys.Ops.rope(o, x, p, 10000.0),
                device,
            )


if __name__ == "__main__":
    script_main(globals(), profile, "Ops.rope")
