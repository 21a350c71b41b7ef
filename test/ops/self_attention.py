"""Ops.self_attention: causal softmax(scale q k^T) v with grouped heads, aligned at the end."""

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
    bits,
    check_refusals,
    dtype_name,
    expect_error,
    forall,
    random_tensor,
    random_values,
    script_main,
    to_llaisys,
    torch_device,
)

# seq, total, nh, nkvh, d
SHAPES = [(2, 2, 1, 1, 4), (5, 11, 4, 2, 8)]


def reference(q, k, v, scale):
    """f64 [seq, nh, dv], of the inputs as they are."""
    seq, total = len(q), len(k)
    group = q.shape[1] // max(k.shape[1], 1)
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.transpose(1, 2) * scale
    seen = torch.ones(seq, total, dtype=torch.bool, device=q.device).tril(total - seq)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def check_values(q, k, v, scale, device, layouts=("dense",) * 4, what=""):
    q_, k_, v_ = (Placed(x, device, layout) for x, layout in zip((q, k, v), layouts, strict=False))
    out = torch.full((*q.shape[:2], v.shape[2]), 9, dtype=q.dtype)
    out_ = Placed(out, device, layouts[3])
    llaisys.Ops.self_attention(out_.tensor, q_.tensor, k_.tensor, v_.tensor, scale)
    where = torch_device(device)
    expected = reference(q.to(where), k.to(where), v.to(where), scale)
    dtype = dtype_name(q.dtype)
    what = f"attention q {tuple(q.shape)} k {tuple(k.shape)} {dtype} {layouts} {what}"
    assert_close(out_.read(), expected, *PRECISION[dtype], what)
    assert q_.is_unchanged() and k_.is_unchanged() and v_.is_unchanged()


def check_attention(seq, total, nh, nkvh, d, dtype, device, dv=None, layouts=("dense",) * 4):
    q = random_values((seq, nh, d), dtype)
    k = random_values((total, nkvh, d), dtype)
    v = random_values((total, nkvh, d if dv is None else dv), dtype)
    check_values(q, k, v, 1 / max(d, 1) ** 0.5, device, layouts)


def test_shapes(device):
    odd = [(1, 1, 1, 1, 1), (3, 3, 2, 1, 5), (33, 33, 3, 3, 16), (17, 64, 6, 2, 24)]
    odd += [(65, 130, 2, 1, 64), (130, 130, 2, 2, 40)]
    empty = [(0, 0, 2, 1, 4), (0, 5, 2, 1, 4), (3, 5, 0, 0, 4), (3, 5, 2, 1, 0), (0, 0, 0, 0, 0)]
    for dtype in FLOATS:
        for shape in SHAPES + odd + empty:
            check_attention(*shape, dtype, device)


def test_group_sizes(device):
    for group in range(1, 15):
        for nkvh in (1, 2, 3):
            check_attention(4, 19, group * nkvh, nkvh, 32, "bf16", device)
        check_attention(1, 33, group * 2, 2, 16, "f32", device)


def test_head_dims(device):
    for d in [*range(1, 20), 31, 32, 33, 63, 64, 65, 80, 96, 127, 128, 129, 200, 255, 256]:
        for dtype in FLOATS:
            check_attention(3, 21, 2, 1, d, dtype, device)


def test_values_of_another_size(device):
    for d, dv in [(1, 256), (256, 1), (64, 128), (33, 7), (8, 0)]:
        for dtype in FLOATS:
            check_attention(5, 12, 4, 2, d, dtype, device, dv)


def test_long_caches(device):
    for seq, total in [(1, 4097), (3, 1000), (16, 2048), (1, 16384)]:
        for dtype in FLOATS:
            check_attention(seq, total, 4, 2, 32, dtype, device)


def test_layouts(device):
    for q in LAYOUTS:
        for kv in LAYOUTS:
            for out in LAYOUTS:
                check_attention(4, 9, 4, 2, 8, "f16", device, layouts=(q, kv, kv, out))


def test_heads_of_a_fused_projection(device):
    """q, k and v as slices of one [seq, nh + 2 nkvh, d]."""
    fused = random_values((7, 8, 16), "f32")
    fused_ = to_llaisys(fused, device)
    out_ = Placed(torch.zeros(7, 4, 16), device)
    parts = (fused_.slice(1, 0, 4), fused_.slice(1, 4, 6), fused_.slice(1, 6, 8))
    llaisys.Ops.self_attention(out_.tensor, *parts, 0.25)
    expected = reference(fused[:, :4], fused[:, 4:6], fused[:, 6:], 0.25)
    assert_close(out_.read(), expected, 1e-5, 1e-5, "fused projection")


def test_later_tokens_are_not_seen(device):
    """What a query may not see does not change a bit of its result."""
    for dtype in FLOATS:
        q, k, v = (random_values((33, 2, 32), dtype) for _ in range(3))
        results = []
        for later_k, later_v in [(0.0, 1.0), (float("nan"), -1.0), (float("inf"), 30000.0)]:
            k[20:], v[20:] = later_k, later_v
            out_ = Placed(torch.zeros_like(q), device)
            parts = (to_llaisys(x, device) for x in (q, k, v))
            llaisys.Ops.self_attention(out_.tensor, *parts, 0.2)
            results.append(out_.read()[:20])
        expected = reference(q[:20], k[:20], v[:20], 0.2)
        assert_close(results[0], expected, *PRECISION[dtype], f"rows before {dtype}")
        for result in results:
            assert torch.equal(bits(result), bits(results[0])), dtype


def test_sharp_and_flat_scores(device):
    for dtype in FLOATS:
        q, k, v = (random_values((40, 2, 16), dtype) for _ in range(3))
        check_values(q, k, v, 0.0, device, what="all equal")
        check_values(q * 0, k, v, 1.0, device, what="all zero")
        # one-hot: scores far apart, and far beyond the range of exp
        q, k = torch.ones_like(q), torch.ones_like(k)
        k *= torch.arange(40).to(k.dtype)[:, None, None]
        check_values(q, k, v, 100.0, device, what="rising to 62400")
        check_values(q, k, v, -100.0, device, what="falling to -62400")


def test_random(device):
    def check(seq, past, group, nkvh, d, dv, dtype, layout):
        layouts = (layout, "dense", layout, "dense")
        check_attention(seq, seq + past, group * nkvh, nkvh, d, dtype, device, dv, layouts)

    forall(
        check,
        60,
        seq=range(20),
        past=range(50),
        group=range(1, 8),
        nkvh=range(1, 4),
        d=range(1, 70),
        dv=range(1, 70),
        dtype=FLOATS,
        layout=LAYOUTS,
    )


def test_refusals(device):
    q, kv = ((2, 4, 8), "f32"), ((5, 2, 8), "f32")
    check_refusals(
        device,
        llaisys.Ops.self_attention,
        {"attn_val": q, "q": q, "k": kv, "v": kv},
        outputs=["attn_val"],
        scalars=[0.5],
        bad=[
            ({"q": ((6, 4, 8), "f32"), "attn_val": ((6, 4, 8), "f32")}, ["q", "at most", "5", "6"]),
            (
                {"q": ((2, 3, 8), "f32"), "attn_val": ((2, 3, 8), "f32")},
                ["q", "multiple", "2", "3"],
            ),
            ({"k": ((5, 0, 8), "f32"), "v": ((5, 0, 8), "f32")}, ["q", "multiple", "0"]),
            ({"k": ((5, 2, 9), "f32")}, ["llaisysSelfAttention: k", "d = 8", "[5, 2, 9]"]),
            ({"v": ((4, 2, 8), "f32")}, ["llaisysSelfAttention: v", "total = 5", "[4, 2, 8]"]),
            ({"v": ((5, 1, 8), "f32")}, ["llaisysSelfAttention: v", "nkvh = 2", "[5, 1, 8]"]),
            ({"attn_val": ((2, 4, 9), "f32")}, ["llaisysSelfAttention: attn_val", "dv = 8"]),
        ],
    )
    out_ = Placed(torch.ones(2, 1, 4), device)
    x_ = to_llaisys(torch.ones(2, 1, 4), device)
    expect_error(
        lambda: llaisys.Ops.self_attention(out_.tensor, x_, x_, x_, float("nan")), "scale", "nan"
    )
    assert out_.is_unchanged()


def profile(device):
    for seq, total, nh, nkvh, d in [*SHAPES, (1, 2048, 12, 2, 128), (512, 512, 12, 2, 128)]:
        for dtype in FLOATS:
            print(f"   seq={seq} total={total} nh={nh} nkvh={nkvh} d={d} dtype <{dtype}>")
            q, q_ = random_tensor((seq, nh, d), dtype, device)
            k, k_ = random_tensor((total, nkvh, d), dtype, device)
            v, v_ = random_tensor((total, nkvh, d), dtype, device)
            _, out_ = random_tensor((seq, nh, d), dtype, device)
            mask = torch.ones(seq, total, dtype=torch.bool, device=q.device).tril(total - seq)

            def torch_attention(q=q, k=k, v=v, mask=mask):
                q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, mask, enable_gqa=True
                )

            benchmark(
                torch_attention,
                lambda o=out_, q=q_, k=k_, v=v_: llaisys.Ops.self_attention(o, q, k, v, 0.1),
                device,
            )


if __name__ == "__main__":
    script_main(globals(), profile, "Ops.self_attention")
