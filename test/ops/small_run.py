"""Every kernel of the operators once, on small shapes: for sanitizers, under which the tests would take hours.

compute-sanitizer --tool memcheck python test/ops/small_run.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[0]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bindings"))

import add
import argmax
import embedding
import linear
import rearrange
import rms_norm
import rope
import self_attention
import swiglu
import torch
from test_utils import FLOATS, absence, random_values

# m, n, k: few rows; tiles of every size with ragged ends; rows that are not aligned
LINEAR = [
    (1, 7, 3),
    (1, 40, 200),
    (3, 65, 72),
    (16, 33, 64),
    (17, 33, 65),
    (129, 127, 136),
    (300, 200, 200),
    (31, 130, 72),
]
# seq, total, nh, nkvh, d
ATTENTION = [(5, 11, 4, 2, 8), (65, 130, 2, 1, 64), (130, 130, 2, 2, 40), (3, 300, 4, 2, 128), (70, 200, 12, 2, 128),
             (3, 21, 2, 1, 255), (9, 9, 20, 20, 300)]  # fmt: skip


def main() -> None:
    device = "nvidia"
    reason = absence(device)
    if reason:
        sys.exit(f"SKIPPED: {reason}")
    torch.manual_seed(0)
    for dtype in FLOATS:
        for shape in LINEAR:
            linear.check_linear(*shape, dtype, device)
        for shape in ATTENTION:
            self_attention.check_attention(*shape, dtype, device)
        for n in (1000, 70001):
            argmax.check_argmax(random_values((n,), dtype), device)
        for shape in ((5, 1536), (5, 13), (2, 9000)):
            x, w = random_values(shape, dtype), random_values(shape[-1:], dtype)
            rms_norm.check_rms_norm(x, w, 1e-6, device)
        for shape in ((5, 3, 64), (5, 7, 34)):
            rope.check_rope(shape, torch.arange(shape[0]), dtype, device)
        for voc, d in ((50, 40), (50, 3)):
            embedding.check_embedding(
                torch.randint(0, voc, (77,)), random_values((voc, d), dtype), device
            )
        for shape in ((33, 65), (7,)):
            add.check_add(shape, dtype, device)
            swiglu.check_swiglu(random_values(shape, dtype), random_values(shape, dtype), device)
    embedding.test_index_out_of_range(device)
    rearrange.test_dtypes(device)
    rearrange.test_every_order_of_dimensions(device)
    print("small run: done")


if __name__ == "__main__":
    main()
