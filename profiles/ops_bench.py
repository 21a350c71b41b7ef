"""Times the operators on an NVIDIA GPU beside PyTorch's, and holds them against the memory's limit measured in the same run.

    python profiles/ops_bench.py [--limits build/liblimits.so] [--only linear] [--json FILE]

Calls are queued behind a sleeping kernel, so that events around them time the GPU and not the host. Each figure is the median of
batches. Buffers are random; sets of them are rotated where they would fit in the L2 cache.
"""

import argparse
import ctypes
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bindings"), str(ROOT / "test")]

import llaisys
import torch
from test_utils import llaisys_dtype

BYTES = {"f32": 4, "f16": 2, "bf16": 2}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
API = llaisys.RuntimeAPI(llaisys.DeviceType.NVIDIA)
F = torch.nn.functional
rows = []
limits = {}


def ours(values):
    """The library's copy of a tensor."""
    names = {torch.int64: "i64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
    dtype = llaisys_dtype(names[values.dtype])
    tensor = llaisys.Tensor(tuple(values.shape), dtype=dtype, device=llaisys.DeviceType.NVIDIA)
    nbytes = values.numel() * values.element_size()
    API.memcpy_sync(
        tensor.data_ptr(), values.contiguous().data_ptr(), nbytes, llaisys.MemcpyKind.D2D
    )
    return tensor


def rand(*shape, dtype="bf16"):
    return (torch.rand(shape, device="cuda", dtype=torch.float32) * 2 - 1).to(DTYPES[dtype])


def time_us(call, batches=5):
    """Median time of a call on the GPU. call(i) uses buffer set i."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def batch(count):
        torch.cuda._sleep(3_000_000)
        start.record()
        for i in range(count):
            call(i)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3 / count

    once = batch(3)
    count = int(min(40, max(4, 4000 / once)))
    batch(count)
    return statistics.median(batch(count) for _ in range(batches))


def report(op, shape, dtype, us, torch_us, nbytes=0, flops=0, limit="copy"):
    row = {"op": op, "shape": shape, "dtype": dtype, "us": us, "torch_us": torch_us}
    if nbytes:
        row["gbs"] = nbytes / us / 1e3
        row["of_limit"] = row["gbs"] / limits[limit]
        figure = f"{row['gbs']:7.0f} GB/s {100 * row['of_limit']:5.1f}%"
    else:
        row["tflops"] = flops / us / 1e6
        figure = f"{row['tflops']:7.1f} TFLOP/s    "
    rows.append(row)
    print(
        f"{op:14s} {shape:26s} {dtype:5s} {us:9.2f} us {figure}  torch {torch_us:9.2f} us {torch_us / us:5.2f}x",
        flush=True,
    )


def measure_limits(path):
    n = 1 << 30
    a, b = (torch.randint(0, 255, (n,), dtype=torch.uint8, device="cuda") for _ in range(2))
    sink = torch.zeros(4, device="cuda")
    if path:
        lib = ctypes.CDLL(path)
        size = ctypes.c_size_t(n)
        p, q, s = (ctypes.c_void_p(x.data_ptr()) for x in (a, b, sink))
        limits["read"] = n / time_us(lambda i: lib.limit_read(p, size, s)) / 1e3
        copies = [
            2 * n / time_us(lambda i, v=v: lib.limit_copy(p, q, size, v)) / 1e3 for v in range(3)
        ]
        print("copy kernels of 1, 2, 4 packs a thread:", [round(c) for c in copies])
    else:
        copies = []
        limits["read"] = n / time_us(lambda i: torch.max(a.view(torch.int32))) / 1e3
    copies.append(2 * n / time_us(lambda i: b.copy_(a)) / 1e3)
    limits["copy"] = max(copies)
    print(
        f"limits: read {limits['read']:.0f} GB/s, copy {limits['copy']:.0f} GB/s (torch's copy {copies[-1]:.0f})",
        flush=True,
    )


def bench_add(dtype, *shape):
    a, b, c = (rand(*shape, dtype=dtype) for _ in range(3))
    a_, b_, c_ = ours(a), ours(b), ours(c)
    report("add", str(shape), dtype, time_us(lambda i: llaisys.Ops.add(c_, a_, b_)),
           time_us(lambda i: torch.add(a, b, out=c)), 3 * a.numel() * BYTES[dtype])  # fmt: skip


def bench_swiglu(dtype, *shape):
    a, b, c = (rand(*shape, dtype=dtype) for _ in range(3))
    a_, b_, c_ = ours(a), ours(b), ours(c)
    report("swiglu", str(shape), dtype, time_us(lambda i: llaisys.Ops.swiglu(c_, a_, b_)),
           time_us(lambda i: torch.mul(F.silu(a), b, out=c)), 3 * a.numel() * BYTES[dtype])  # fmt: skip


def bench_rms_norm(dtype, *shape):
    x, w, out = rand(*shape, dtype=dtype), rand(shape[-1], dtype=dtype), rand(*shape, dtype=dtype)
    x_, w_, out_ = ours(x), ours(w), ours(out)
    report("rms_norm", str(shape), dtype, time_us(lambda i: llaisys.Ops.rms_norm(out_, x_, w_, 1e-6)),
           time_us(lambda i: F.rms_norm(x, w.shape, w, 1e-6)), 2 * x.numel() * BYTES[dtype])  # fmt: skip


def bench_rope(dtype, *shape):
    x, out = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype)
    positions = torch.arange(shape[0], device="cuda")
    x_, out_, positions_ = ours(x), ours(out), ours(positions)
    half = shape[-1] // 2
    turns = positions.float()[:, None] / 10000.0 ** (
        torch.arange(half, device="cuda") * 2 / shape[-1]
    )
    cos, sin = (f(turns)[:, None].to(DTYPES[dtype]) for f in (torch.cos, torch.sin))

    def torch_rope(i):  # with its table made before
        a, b = x[..., :half], x[..., half:]
        out[..., :half] = a * cos - b * sin
        out[..., half:] = b * cos + a * sin

    report("rope", str(shape), dtype, time_us(lambda i: llaisys.Ops.rope(out_, x_, positions_, 10000.0)),
           time_us(torch_rope), 2 * x.numel() * BYTES[dtype])  # fmt: skip


def bench_embedding(dtype, n, voc, d):
    index, weight, out = (
        torch.randint(0, voc, (n,), device="cuda"),
        rand(voc, d, dtype=dtype),
        rand(n, d, dtype=dtype),
    )
    index_, weight_, out_ = ours(index), ours(weight), ours(out)
    report("embedding", f"{n} of ({voc}, {d})", dtype,
           time_us(lambda i: llaisys.Ops.embedding(out_, index_, weight_)),
           time_us(lambda i: torch.index_select(weight, 0, index, out=out)), 2 * out.numel() * BYTES[dtype])  # fmt: skip


def bench_argmax(dtype, n):
    values = rand(n, dtype=dtype)
    index, value = (
        torch.zeros(1, dtype=torch.int64, device="cuda"),
        torch.zeros(1, dtype=DTYPES[dtype], device="cuda"),
    )
    values_, index_, value_ = ours(values), ours(index), ours(value)
    report("argmax", f"({n},)", dtype, time_us(lambda i: llaisys.Ops.argmax(index_, value_, values_)),
           time_us(lambda i: torch.max(values, 0, keepdim=True, out=(value, index))),
           n * BYTES[dtype], limit="read")  # fmt: skip


def bench_rearrange(dtype, shape, order, what):
    x = rand(*shape, dtype=dtype)
    view = x.permute(order)
    out = torch.empty(view.shape, device="cuda", dtype=x.dtype)
    x_, out_ = ours(x), ours(out)
    view_ = x_.permute(*order)
    report("rearrange", f"{what} {shape}", dtype, time_us(lambda i: llaisys.Ops.rearrange(out_, view_)),
           time_us(lambda i: out.copy_(view)), 2 * x.numel() * BYTES[dtype])  # fmt: skip


def bench_slice(dtype, rows_, columns, kept):
    x, out = rand(rows_, columns, dtype=dtype), rand(rows_, kept, dtype=dtype)
    x_, out_ = ours(x), ours(out)
    view_, view = x_.slice(1, 0, kept), x[:, :kept]
    report("rearrange", f"columns {kept} of ({rows_}, {columns})", dtype,
           time_us(lambda i: llaisys.Ops.rearrange(out_, view_)), time_us(lambda i: out.copy_(view)),
           2 * out.numel() * BYTES[dtype])  # fmt: skip


def bench_linear(dtype, m, n, k):
    size = (m * k + n * k + m * n) * BYTES[dtype]
    sets = 1 if m > 64 else max(1, min(40, 200_000_000 // size))  # few rows: past the L2 cache
    x, w = rand(m, k, dtype=dtype), [rand(n, k, dtype=dtype) for _ in range(sets)]
    bias, out = rand(n, dtype=dtype), rand(m, n, dtype=dtype)
    x_, w_, bias_, out_ = ours(x), [ours(each) for each in w], ours(bias), ours(out)
    us = time_us(lambda i: llaisys.Ops.linear(out_, x_, w_[i % sets], bias_))
    torch_us = time_us(lambda i: torch.addmm(bias, x, w[i % sets].T, out=out))
    few = {"nbytes": size, "limit": "read"} if m <= 16 else {"flops": 2 * m * n * k}
    report("linear", f"{m} x {n} x {k}", dtype, us, torch_us, **few)


def bench_attention(dtype, seq, total, nh, nkvh, d):
    q, k, v = (
        rand(seq, nh, d, dtype=dtype),
        rand(total, nkvh, d, dtype=dtype),
        rand(total, nkvh, d, dtype=dtype),
    )
    q_, k_, v_, out_ = ours(q), ours(k), ours(v), ours(q)
    q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
    is_causal = seq > 1
    flops = 4 * nh * d * sum(total - seq + 1 + i for i in range(seq))
    report("self_attention", f"{seq} of {total}, {nh}/{nkvh} x {d}", dtype,
           time_us(lambda i: llaisys.Ops.self_attention(out_, q_, k_, v_, d**-0.5)),
           time_us(lambda i: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)),
           flops=flops)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limits", help="library built from profiles/limits.cu")
    parser.add_argument("--only", default="")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(0), "PyTorch", torch.__version__)
    measure_limits(args.limits)
    cases = []
    for t in ("bf16", "f16", "f32"):
        cases += [(bench_add, t, 512, 4096), (bench_add, t, 16384, 4096), (bench_swiglu, t, 512, 4096),
                  (bench_swiglu, t, 8192, 8960), (bench_rms_norm, t, 512, 4096), (bench_rms_norm, t, 16384, 4096),
                  (bench_rms_norm, t, 32768, 1536), (bench_rope, t, 512, 4, 4096), (bench_rope, t, 32768, 12, 128),
                  (bench_rope, t, 4096, 4, 4096), (bench_embedding, t, 50, 512, 4096),
                  (bench_embedding, t, 32768, 151936, 1536), (bench_argmax, t, 4096), (bench_argmax, t, 151936),
                  (bench_argmax, t, 1 << 27), (bench_rearrange, t, (512, 4096), (1, 0), "transpose"),
                  (bench_rearrange, t, (8192, 8192), (1, 0), "transpose"),
                  (bench_rearrange, t, (8192, 12, 128), (1, 0, 2), "heads first"),
                  (bench_slice, t, 32768, 2048, 1536)]  # fmt: skip
    for t in ("bf16", "f16"):
        cases += [(bench_linear, t, m, n, k) for m in (1, 8, 16, 64, 256, 1024, 2048, 4096)
                  for n, k in ((2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960))
                  if t == "bf16" or m in (1, 2048)]  # fmt: skip
        cases += [(bench_linear, t, 512, 4096, 4096), (bench_linear, t, 8192, 8192, 8192)]
        cases += [
            (bench_attention, t, *s)
            for s in ((1, 2048, 12, 2, 128), (512, 512, 12, 2, 128), (4096, 4096, 12, 2, 128))
        ]
    cases += [(bench_linear, "f32", m, 4096, 4096) for m in (1, 8, 512)]
    cases += [(bench_attention, "f32", 512, 512, 12, 2, 128)]
    for bench, *arguments in cases:
        if args.only in bench.__name__:
            bench(*arguments)
            torch.cuda.empty_cache()
    if args.json:
        Path(args.json).write_text(json.dumps({"limits": limits, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
