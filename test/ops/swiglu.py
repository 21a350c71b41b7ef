"""Ops.swiglu: out = up * gate / (1 + e^-gate)."""

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
    torch_dtype,
)

SHAPES = [(2, 3), (512, 4096)]
LARGE = [(8192, 8960)]  # for --profile on a GPU


def reference(gate, up):
    """f64, of the inputs as they are."""
    return torch.nn.functional.silu(gate.double()) * up.double()


def check_swiglu(gate, up, device, layouts=("dense", "dense", "dense")):
    gate_, up_ = Placed(gate, device, layouts[0]), Placed(up, device, layouts[1])
    out_ = Placed(torch.full_like(gate, 9), device, layouts[2])
    llaisys.Ops.swiglu(out_.tensor, gate_.tensor, up_.tensor)
    dtype = dtype_name(gate.dtype)
    what = f"swiglu {tuple(gate.shape)} {dtype} {layouts}"
    assert_close(out_.read(), reference(gate, up), *PRECISION[dtype], what)
    assert gate_.is_unchanged() and up_.is_unchanged()


def test_shapes(device):
    odd = [(), (1,), (7,), (65537,), (2, 3, 5, 7), (1,) * 8, (3, 8960)]
    empty = [(0,), (3, 0, 2)]
    for dtype in FLOATS:
        for shape in SHAPES + odd + empty:
            gate, up = random_values(shape, dtype), random_values(shape, dtype)
            check_swiglu(gate, up, device)


def test_range_of_the_gate(device):
    """Sigmoid from 0 to 1, where e^-gate over- and underflows too."""
    for dtype in FLOATS:
        gate = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([1e4, -1e4, 0.0, -0.0])])
        gate = gate.to(torch_dtype(dtype))
        check_swiglu(gate, torch.ones_like(gate), device)
        check_swiglu(gate, random_values(gate.shape, dtype, -2, 2), device)


def test_layouts(device):
    for gate in LAYOUTS:
        for up in LAYOUTS:
            for out in LAYOUTS:
                for shape in [(), (5,), (4, 7), (3, 2, 5), (2, 0)]:
                    values = random_values(shape, "f16", -5, 5), random_values(shape, "f16")
                    check_swiglu(*values, device, (gate, up, out))


def test_random(device):
    def check(rows, columns, dtype, gate, up, out):
        values = random_values((rows, columns), dtype, -8, 8), random_values((rows, columns), dtype)
        check_swiglu(*values, device, (gate, up, out))

    sizes = range(40)
    forall(
        check, 40, rows=sizes, columns=sizes, dtype=FLOATS, gate=LAYOUTS, up=LAYOUTS, out=LAYOUTS
    )


def test_in_place(device):
    for dtype in FLOATS:
        gate, up = random_values((33, 65), dtype, -4, 4), random_values((33, 65), dtype)
        gate_, up_ = to_llaisys(gate, device), to_llaisys(up, device)
        llaisys.Ops.swiglu(gate_, gate_, up_)
        assert_close(to_torch(gate_), reference(gate, up), *PRECISION[dtype], "out is gate")
        gate_ = to_llaisys(gate, device)
        llaisys.Ops.swiglu(up_, gate_, up_)
        assert_close(to_torch(up_), reference(gate, up), *PRECISION[dtype], "out is up")
        llaisys.Ops.swiglu(gate_, gate_, gate_)
        assert_close(to_torch(gate_), reference(gate, gate), *PRECISION[dtype], "all are one")


def test_halves_of_a_fused_projection(device):
    """gate and up as the columns of one matrix, the result over the gate's."""
    fused = random_values((9, 64), "f32", -3, 3)
    fused_ = to_llaisys(fused, device)
    llaisys.Ops.swiglu(fused_.slice(1, 0, 32), fused_.slice(1, 0, 32), fused_.slice(1, 32, 64))
    expected = torch.cat([reference(fused[:, :32], fused[:, 32:]), fused[:, 32:].double()], dim=1)
    assert_close(to_torch(fused_), expected, 1e-5, 1e-5, "fused projection")


def test_refusals(device):
    matrix = ((2, 3), "f32")
    check_refusals(
        device,
        llaisys.Ops.swiglu,
        {"out": matrix, "gate": matrix, "up": matrix},
        outputs=["out"],
        bad=[
            ({"up": ((3, 2), "f32")}, ["llaisysSwiGLU: up", "[2, 3]", "[3, 2]"]),
            ({"out": ((6,), "f32")}, ["llaisysSwiGLU: out", "[2, 3]", "[6]"]),
            ({"gate": ((2, 1), "f32")}, ["llaisysSwiGLU: up", "[2, 1]", "[2, 3]"]),
        ],
    )


def profile(device):
    for shape in [*SHAPES, *(LARGE if device == "nvidia" else [])]:
        for dtype in FLOATS:
            print(f"   shape {shape} dtype <{dtype}>")
            gate, gate_ = random_tensor(shape, dtype, device)
            up, up_ = random_tensor(shape, dtype, device)
            _, out_ = random_tensor(shape, dtype, device)
            benchmark(
                lambda g=gate, u=up: torch.nn.functional.silu(g) * u,
                lambda o=out_, g=gate_, u=up_: llaisys.Ops.swiglu(o, g, u),
                device,
            )


if __name__ == "__main__":
    script_main(globals(), profile, "Ops.swiglu")
