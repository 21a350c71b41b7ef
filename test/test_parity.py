"""Qwen2 models of many shapes with random weights: logits and greedy tokens against transformers.

The reference runs on the CPU. Every checkpoint is made by tools/make_checkpoint.py; its weights are
such that logits have a standard deviation of about two.
"""

import gc
import itertools
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM
from transformers import __version__ as transformers_version

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("bindings", "tools", "test")]

import llaisys
from make_checkpoint import make_checkpoint
from test_utils import step_by_step

Qwen2, Sequence = llaisys.models.Qwen2, llaisys.models.Sequence
CPU = llaisys.DeviceType.CPU
DEVICES = {"cpu": CPU, "nvidia": llaisys.DeviceType.NVIDIA}
TORCH_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
DTYPES = {name: llaisys.DataType[name.upper()] for name in TORCH_DTYPES}
DTYPE_ARGUMENT = "dtype" if int(transformers_version.split(".")[0]) >= 5 else "torch_dtype"

# Heads 1 to 14, KV heads 1 to all, head_dim 16 to 128, sizes that are no multiple of 32, 8 or 2.
SHAPES = {
    "one-head": {
        "hidden": 48,
        "heads": 1,
        "kv_heads": 1,
        "layers": 1,
        "ffn": 100,
        "vocab": 101,
        "tied": True,
    },
    "one-kv-head": {
        "hidden": 112,
        "heads": 7,
        "kv_heads": 1,
        "layers": 2,
        "ffn": 333,
        "vocab": 509,
        "tied": False,
        "eps": 1e-5,
    },
    "no-groups": {
        "hidden": 192,
        "heads": 3,
        "kv_heads": 3,
        "layers": 2,
        "ffn": 512,
        "vocab": 640,
        "tied": True,
        "theta": 1e6,
        "shard_size": "300KB",
    },
    "14-heads": {
        "hidden": 896,
        "heads": 14,
        "kv_heads": 2,
        "layers": 1,
        "ffn": 1216,
        "vocab": 1023,
        "tied": True,
        "theta": 1e6,
    },
    "head-dim-128": {
        "hidden": 90,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 128,
        "layers": 2,
        "ffn": 77,
        "vocab": 333,
        "tied": False,
        "eps": 1e-3,
    },
    "head-dim-96": {
        "hidden": 130,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 96,
        "layers": 3,
        "ffn": 258,
        "vocab": 402,
        "tied": True,
        "theta": 5e5,
    },
    "head-dim-80": {
        "hidden": 400,
        "heads": 5,
        "kv_heads": 5,
        "layers": 4,
        "ffn": 176,
        "vocab": 257,
        "tied": False,
        "theta": 100.0,
        "shard_size": "1MB",
    },
    "head-dim-24": {
        "hidden": 144,
        "heads": 6,
        "kv_heads": 2,
        "layers": 2,
        "ffn": 200,
        "vocab": 300,
        "tied": True,
    },
    "odd": {
        "hidden": 257,
        "heads": 12,
        "kv_heads": 4,
        "head_dim": 16,
        "layers": 2,
        "ffn": 515,
        "vocab": 769,
        "tied": False,
    },
}
# Few for f16, in which transformers is slow on a CPU.
HALF_SHAPES = {"bf16": tuple(SHAPES), "f16": ("one-head", "head-dim-128", "odd")}
# Lengths of the prefix at which logits are compared. Steps of 1, 1, 15, 47, 1, 65, 382, 1, 1 and
# 187 tokens cross KV blocks of any power of two, the default prefill chunk of 512 and its end.
PROBES = (1, 2, 17, 64, 65, 130, 512, 513, 514, 701)


class Reference(NamedTuple):
    """transformers' model in the dtype under test, and the same weights in f32."""

    model: Qwen2ForCausalLM
    exact: Qwen2ForCausalLM


def load_reference(path: Path, dtype: str) -> Reference:
    def load(name: str) -> Qwen2ForCausalLM:
        return Qwen2ForCausalLM.from_pretrained(path, **{DTYPE_ARGUMENT: TORCH_DTYPES[name]}).eval()

    model = load(dtype)
    return Reference(model, model if dtype == "f32" else load("f32"))


@torch.no_grad()
def reference_logits(model: Qwen2ForCausalLM, ids: list[int], positions: list[int]) -> np.ndarray:
    """f32 [len(positions), voc]: logits after the token at each position."""
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, positions]
    return logits.float().numpy()


def reference_greedy(model: Qwen2ForCausalLM, ids: list[int], count: int) -> list[int]:
    """The tokens that transformers' generate adds."""
    inputs = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False
        )
    return out[0, len(ids) :].tolist()


def logits_of(sequence: Sequence) -> np.ndarray:
    return np.asarray(sequence.logits())


def prompt_of(vocab: int, length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([vocab, length, seed]).integers(0, vocab, length).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Makes a checkpoint of SHAPES in a dtype, once."""

    @cache
    def make(shape: str, dtype: str) -> Path:
        path = tmp_path_factory.mktemp(f"{shape}-{dtype}")
        make_checkpoint(path, dtype=dtype, max_positions=1024, **SHAPES[shape])
        return path

    return make


@pytest.fixture
def kind(device: str) -> llaisys.DeviceType:
    """The type of the device that conftest.py has found."""
    return DEVICES[device]


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread():
    """The models are so small that threads are only in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def free_models():
    yield
    gc.collect()


# ---- against transformers ----


def probe(sequence: Sequence, ids: list[int]) -> np.ndarray:
    """f32 [len(PROBES), voc]: logits after each prefix, of one sequence fed piece by piece."""
    rows, start = [], 0
    for end in PROBES:
        sequence.step(ids[start:end])
        rows.append(logits_of(sequence))
        start = end
    assert sequence.length == len(ids)
    return np.stack(rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_f32_logits(checkpoint, kind, shape):
    path = checkpoint(shape, "f32")
    ids = prompt_of(SHAPES[shape]["vocab"], PROBES[-1])
    expected = reference_logits(load_reference(path, "f32").model, ids, [n - 1 for n in PROBES])
    with Sequence(path, kind) as sequence:
        found = probe(sequence, ids)
        # The whole prompt at once must agree as well, crossing the prefill chunk on its way.
        sequence.reset()
        sequence.step(ids)
        found = np.concatenate((found, logits_of(sequence)[None]))
    expected = np.concatenate((expected, expected[-1:]))
    scale = np.abs(expected).max()
    assert 3 < scale < 30  # or the bound below would mean little
    # Both sum in f32, in different orders: about 1e-6 of the scale is what is found.
    assert np.abs(found - expected).max() <= 1e-5 * scale


@pytest.mark.parametrize(
    ("dtype", "shape"), [(dtype, shape) for dtype in HALF_SHAPES for shape in HALF_SHAPES[dtype]]
)
def test_half_logits(checkpoint, kind, dtype, shape):
    """Rounding must not cost more than it costs transformers.

    Both sides round to 16 bits after each operation. How far that moves logits depends on the
    shape, so the yardstick is transformers' own distance from the same weights in f32. Ours may be
    at most 1.25 times as large in the root mean square over all probes and tokens, which are
    thousands of values, and twice as large in the maximum, plus one unit in the last place of the
    largest logit. (transformers' two attention kernels differ by 0.95 to 1.13, and up to 1.5.)
    """
    path = checkpoint(shape, dtype)
    ids = prompt_of(SHAPES[shape]["vocab"], PROBES[-1])
    reference = load_reference(path, dtype)
    positions = [n - 1 for n in PROBES]
    exact = reference_logits(reference.exact, ids, positions)
    theirs = reference_logits(reference.model, ids, positions) - exact
    with Sequence(path, kind) as sequence:
        assert sequence.meta.dtype == DTYPES[dtype]
        ours = probe(sequence, ids) - exact
    # Rounding is there at all: a reference that computed in f32 would make the test meaningless.
    assert np.abs(theirs).max() > 1e-4
    assert rms(ours) <= 1.25 * rms(theirs)
    assert np.abs(ours).max() <= 2 * np.abs(theirs).max() + ulp(exact.max(), dtype)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def ulp(value: float, dtype: str) -> float:
    """The distance between neighbouring numbers of a dtype at a value."""
    bits = {"bf16": 7, "f16": 10, "f32": 23}[dtype]
    return 2.0 ** (np.floor(np.log2(abs(value))) - bits)


@pytest.mark.parametrize("shape", SHAPES)
def test_f32_greedy_tokens(checkpoint, kind, shape):
    """Token for token, from prompts of several lengths."""
    path = checkpoint(shape, "f32")
    reference = load_reference(path, "f32").model
    with Qwen2(path, kind, threads=1) as model:
        for length in (1, 5, 70):
            ids = prompt_of(SHAPES[shape]["vocab"], length)
            assert model.generate(ids, 24) == ids + reference_greedy(reference, ids, 24)


@pytest.mark.parametrize("dtype", HALF_SHAPES)
def test_half_greedy_tokens(checkpoint, kind, dtype):
    """Equal, but where transformers' own logits are too close to call.

    We follow transformers' answers, so that every step is compared and not only those before the
    first difference. Where tokens differ, transformers' logits of the two may be apart by no more
    than rounding explains: twice its own error at this step, for each of the logits is off by as
    much on either side, and a unit in the last place. At most one step in 25 may differ.
    """
    steps, differing = 0, 0
    for shape in HALF_SHAPES[dtype]:
        path = checkpoint(shape, dtype)
        reference = load_reference(path, dtype)
        ids = prompt_of(SHAPES[shape]["vocab"], 40)
        answer = reference_greedy(reference.model, ids, 32)
        positions = list(range(len(ids) - 1, len(ids) + len(answer) - 1))
        logits = reference_logits(reference.model, ids + answer, positions)
        error = np.abs(logits - reference_logits(reference.exact, ids + answer, positions))
        with Sequence(path, kind, threads=1) as sequence:
            found = [sequence.step(ids), *(sequence.step([token]) for token in answer[:-1])]
        with Qwen2(path, kind, threads=1) as model:
            # On its own, the model says the same up to the first difference.
            alone = model.generate(ids, len(answer))[len(ids) :]
        same = next((i for i, (a, b) in enumerate(zip(found, answer)) if a != b), len(answer))
        assert alone[: same + 1] == found[: same + 1]
        for i, (token, wanted) in enumerate(zip(found, answer)):
            steps += 1
            if token != wanted:
                differing += 1
                margin = logits[i, wanted] - logits[i, token]
                assert margin <= 4 * error[i].max() + ulp(logits[i, wanted], dtype)
    assert steps >= 24 * len(HALF_SHAPES[dtype])  # end tokens have not eaten the test
    assert differing <= steps / 25, f"{differing} of {steps}"


@pytest.mark.parametrize(("stored", "asked"), [("f32", "bf16"), ("bf16", "f32"), ("f16", "bf16")])
def test_other_dtype_than_stored(checkpoint, kind, stored, asked):
    """dtype= converts the weights, rounding to nearest, as transformers does."""
    path = checkpoint("one-kv-head", stored)
    ids = prompt_of(509, 33)
    reference = load_reference(path, asked)
    expected = reference_logits(reference.model, ids, [32])[0]
    exact = reference_logits(reference.exact, ids, [32])[0]
    with Sequence(path, kind, dtype=DTYPES[asked]) as sequence:
        assert sequence.meta.dtype == DTYPES[asked]
        sequence.step(ids)
        found = logits_of(sequence)
    if asked == "f32":
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    else:
        assert rms(found - exact) <= 1.5 * rms(expected - exact)


def test_tensors_of_several_dtypes(checkpoint, kind, tmp_path):
    """Each is converted from what it is stored as."""
    source = checkpoint("one-kv-head", "f32")
    tensors = load_file(source / "model.safetensors")
    dtypes = itertools.cycle(TORCH_DTYPES.values())
    save_file(
        {name: tensor.to(next(dtypes)) for name, tensor in tensors.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    ids = prompt_of(509, 20)
    expected = reference_logits(load_reference(tmp_path, "f32").model, ids, [19])[0]
    with Sequence(tmp_path, kind) as sequence:
        sequence.step(ids)
        assert np.abs(logits_of(sequence) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_meta(checkpoint, kind):
    with Qwen2(checkpoint("head-dim-96", "bf16"), kind, max_seq=300) as model:
        meta = model.meta
        sizes = (meta.nlayer, meta.hs, meta.nh, meta.nkvh, meta.dh, meta.di, meta.voc, meta.maxseq)
        assert sizes == (3, 130, 4, 2, 96, 258, 402, 300)
        assert (meta.epsilon, meta.theta) == (np.float32(1e-6), np.float32(5e5))
        assert meta.end_token == 401
    with Qwen2(checkpoint("head-dim-96", "bf16"), kind) as model:
        assert model.meta.maxseq == 1024  # the model's context, being smaller than 4096


# ---- against itself: bit for bit, on the CPU ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["one-kv-head", "head-dim-128", "odd"])
def test_bits_do_not_depend_on_chunks_or_threads(checkpoint, shape, dtype):
    path = checkpoint(shape, dtype)
    ids = prompt_of(SHAPES[shape]["vocab"], 150)
    seen = set()
    for chunk in (1, 7, 64, 512):
        for threads in (1, 2):
            options = {"prefill_chunk": chunk, "threads": threads, "max_seq": 200}
            with Sequence(path, CPU, **options) as sequence:
                sequence.step(ids)
                prefill = logits_of(sequence)
                answer = step_by_step(sequence, ids, 12)
                seen.add((prefill.tobytes(), logits_of(sequence).tobytes(), tuple(answer)))
            with Qwen2(path, CPU, **options) as model:
                assert list(model.stream(ids, 12)) == answer
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["one-head", "no-groups", "14-heads", "odd"])
def test_decode_equals_prefill(checkpoint, shape, dtype):
    """A token's logits do not depend on whether the tokens before it came one by one."""
    ids = prompt_of(SHAPES[shape]["vocab"], 97)
    with Sequence(checkpoint(shape, dtype), CPU, threads=1) as sequence:
        one_by_one = []
        for token in ids:
            following = sequence.step([token])
            one_by_one.append((following, logits_of(sequence)))
        for length in (1, 2, 16, 63, 64, 65, 97):
            sequence.reset()
            following = sequence.step(ids[:length])
            assert following == one_by_one[length - 1][0]
            np.testing.assert_array_equal(logits_of(sequence), one_by_one[length - 1][1])
            assert following == int(np.argmax(logits_of(sequence)))
