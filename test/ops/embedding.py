"""Ops.embedding: rows of a table, bit by bit."""

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
    expect_error,
    forall,
    random_int_tensor,
    random_tensor,
    random_values,
    script_main,
    to_llaisys,
)

SHAPES = [((1,), (2, 3)), ((50,), (512, 4096))]  # index, weight
LARGE = [((32768,), (151936, 1536))]  # for --profile on a GPU


def check_embedding(index, weight, device, layouts=("dense", "dense", "dense")):
    index_, weight_ = Placed(index, device, layouts[0]), Placed(weight, device, layouts[1])
    out = torch.zeros(len(index), weight.shape[1], dtype=weight.dtype)
    out_ = Placed(out, device, layouts[2])
    llaisys.Ops.embedding(out_.tensor, index_.tensor, weight_.tensor)
    what = f"embedding {tuple(index.shape)} {tuple(weight.shape)} {weight.dtype} {layouts}"
    assert torch.equal(bits(out_.read()), bits(weight[index])), what
    assert index_.is_unchanged() and weight_.is_unchanged()


def random_index(n, voc):
    return torch.randint(0, voc, (n,))


def test_shapes(device):
    odd = [((1,), (1, 1)), ((3,), (7, 5)), ((200,), (2, 1)), ((17,), (999, 129))]
    empty = [((0,), (5, 3)), ((0,), (0, 3)), ((4,), (5, 0)), ((0,), (0, 0))]
    for dtype in FLOATS:
        for (n,), (voc, d) in SHAPES + odd + empty:
            check_embedding(random_index(n, voc) if voc else torch.zeros(0, dtype=torch.int64),
                            random_values((voc, d), dtype), device)  # fmt: skip


def test_ends_and_repeats(device):
    weight = random_values((11, 6), "bf16")
    check_embedding(torch.tensor([10, 0, 10, 10, 0, 5]), weight, device)


def test_bits_are_kept(device):
    """NaN payloads, infinities and subnormals pass."""
    weight = torch.randint(0, 2**16, (64, 33)).to(torch.int32).to(torch.int16).view(torch.bfloat16)
    check_embedding(random_index(100, 64), weight, device)
    check_embedding(random_index(100, 64), weight.view(torch.float16), device)


def test_random(device):
    def check(n, voc, d, dtype, index, weight, out):
        values = random_values((voc, d), dtype)
        check_embedding(random_index(n, voc), values, device, (index, weight, out))

    forall(
        check,
        40,
        n=range(20),
        voc=range(1, 30),
        d=range(20),
        dtype=FLOATS,
        index=LAYOUTS,
        weight=LAYOUTS,
        out=LAYOUTS,
    )


def test_index_out_of_range(device):
    weight_ = to_llaisys(random_values((8, 5), "f32"), device)
    for bad in (-1, 8, 2**40, -(2**63)):
        index_ = to_llaisys(torch.tensor([0, 7, bad, 1]), device)
        for layout in LAYOUTS:
            out_ = Placed(random_values((4, 5), "f32"), device, layout)
            expect_error(
                lambda o=out_, i=index_: llaisys.Ops.embedding(o.tensor, i, weight_),
                "llaisysEmbedding",
                str(bad),
            )
            assert out_.is_unchanged()


def test_index_out_of_range_among_many(device):
    """The first of several is named wherever it stands, nothing is written, and the next call works."""
    n, voc, d = 70001, 300, 24
    weight = random_values((voc, d), "bf16")
    weight_ = to_llaisys(weight, device)
    for places in ((0,), (n - 1,), (50123, 50124), (69000, 3333, 40000)):
        index = random_index(n, voc)
        check_embedding(index, weight, device)
        for i, place in enumerate(places):
            index[place] = voc + i
        out_ = Placed(random_values((n, d), "bf16"), device)
        first = min(places)
        expect_error(
            lambda o=out_, i=index: llaisys.Ops.embedding(o.tensor, to_llaisys(i, device), weight_),
            f"index[{first}] is {index[first]}",
        )
        assert out_.is_unchanged()


def test_refusals(device):
    check_refusals(
        device,
        llaisys.Ops.embedding,
        {"out": ((2, 3), "f32"), "index": ((2,), "i64"), "weight": ((5, 3), "f32")},
        outputs=["out"],
        bad=[
            ({"out": ((3, 3), "f32")}, ["llaisysEmbedding: out", "n = 2", "d = 3", "[3, 3]"]),
            ({"out": ((2, 4), "f32")}, ["llaisysEmbedding: out", "[2, 4]"]),
            ({"weight": ((3,), "f32")}, ["llaisysEmbedding: weight", "[voc, d]", "[3]"]),
            ({"index": ((), "i64")}, ["llaisysEmbedding: index", "[n]", "[]"]),
        ],
    )


def profile(device):
    for index_shape, weight_shape in [*SHAPES, *(LARGE if device == "nvidia" else [])]:
        for dtype in FLOATS:
            print(f"   index {index_shape} weight {weight_shape} dtype <{dtype}>")
            weight, weight_ = random_tensor(weight_shape, dtype, device)
            index, index_ = random_int_tensor(index_shape, device, high=weight_shape[0])
            out, out_ = random_tensor((*index_shape, weight_shape[1]), dtype, device)
            benchmark(
                lambda o=out, i=index, w=weight: torch.index_select(w, 0, i, out=o),
                lambda o=out_, i=index_, w=weight_: llaisys.Ops.embedding(o, i, w),
                device,
            )


if __name__ == "__main__":
    script_main(globals(), profile, "Ops.embedding")
