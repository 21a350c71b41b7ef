"""Qwen2.generate and stream, and Sequence: sampling, ends, limits, errors and memory."""

import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("bindings", "tools", "test")]

import llaisys
from make_checkpoint import make_checkpoint
from test_utils import absence, step_by_step

Qwen2, Sequence = llaisys.models.Qwen2, llaisys.models.Sequence
DEVICES = {"cpu": llaisys.DeviceType.CPU, "nvidia": llaisys.DeviceType.NVIDIA}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
TINY_VOCAB, MAX_SEQ = 23, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small vocabulary, so that a distribution is soon sampled; no end token, see `ending`."""
    path = tmp_path_factory.mktemp("tiny")
    make_checkpoint(
        path,
        hidden=32,
        heads=4,
        kv_heads=2,
        layers=2,
        ffn=48,
        vocab=TINY_VOCAB,
        tied=True,
        dtype="f32",
        max_positions=2048,
        seed=5,
    )
    set_end_tokens(path, None)
    return path


@pytest.fixture(scope="module", params=DEVICES)
def device_type(request):
    if reason := absence(request.param):
        pytest.skip(reason)
    return DEVICES[request.param]


@pytest.fixture(scope="module")
def model(device_type, folder):
    with Qwen2(folder, device_type, max_seq=MAX_SEQ) as model:
        yield model


@pytest.fixture(scope="module")
def sequence(device_type, folder):
    """The same model on the same device, step by step."""
    with Sequence(folder, device_type, max_seq=MAX_SEQ) as sequence:
        yield sequence


def set_end_tokens(path, tokens):
    for name in ("config.json", "generation_config.json"):
        content = json.loads((path / name).read_text())
        content["eos_token_id"] = tokens
        (path / name).write_text(json.dumps(content))


# ---- greedy ----


def test_returns_prompt_and_answer(model):
    ids = model.generate(PROMPT, 5)
    assert ids[: len(PROMPT)] == PROMPT
    assert len(ids) == len(PROMPT) + 5
    assert all(type(token) is int and 0 <= token < TINY_VOCAB for token in ids)
    seen = []
    assert model.generate(PROMPT, 5, on_token=seen.append) == ids
    assert seen == ids[len(PROMPT) :] == list(model.stream(PROMPT, 5))
    assert model.generate(np.array(PROMPT), 5) == ids
    assert model.generate(iter(PROMPT), 5) == ids


def test_greedy_is_the_largest_logit(model, sequence):
    ids = model.generate(PROMPT, 6)
    sequence.reset()
    for start in range(len(PROMPT), len(ids)):
        following = sequence.step(ids[sequence.length : start])
        assert following == ids[start] == int(np.argmax(sequence.logits()))


def test_ways_to_be_greedy(model):
    greedy = model.generate(PROMPT, 20)
    for seed in range(3):
        assert model.generate(PROMPT, 20, top_k=1, temperature=5.0, seed=seed) == greedy
        assert model.generate(PROMPT, 20, top_k=0, temperature=0.0, seed=seed) == greedy
        assert model.generate(PROMPT, 20, top_k=0, temperature=1e-30, seed=seed) == greedy
        for top_p in (1e-6, 1e-300):  # the latter is 0 as f32
            assert model.generate(PROMPT, 20, top_k=0, top_p=top_p, seed=seed) == greedy


def test_same_answer_after_another(model):
    """Nothing of a sequence is left over in the next."""
    first = model.generate(PROMPT, 20)
    model.generate([7] * 40, 20, top_k=0, temperature=2.0)
    assert model.generate(PROMPT, 20) == first


def test_follow_up_turn_computes_what_is_new(model):
    """Whole KV blocks of the last turns are found again, and change nothing."""
    block = model.stats()["kv_block"]
    first = model.generate([2] * block, 9)
    before = model.stats()
    turn = [*first, 5, 3]
    second = model.generate(turn, 9)
    after = model.stats()
    assert after["prompt_tokens"] - before["prompt_tokens"] == len(turn)
    assert after["cached_tokens"] - before["cached_tokens"] == block
    assert after["rows"] - before["rows"] < len(turn)  # the answer's included
    model.generate([9] * (MAX_SEQ - 1))  # takes all blocks
    assert model.generate(turn, 9) == second


# ---- sampling ----


def test_sampling_follows_the_seed(model):
    def sample(seed):
        return tuple(model.generate(PROMPT, 40, top_k=0, top_p=1.0, temperature=1.0, seed=seed))

    assert sample(1) == sample(1)
    assert sample(2**64 - 1) == sample(2**64 - 1)
    # High bits count too: seeds are 64 bits wide.
    assert len({sample(seed) for seed in (0, 1, 2, 2**32, 2**63)}) == 5


def test_sampling_does_not_depend_on_the_path(model, folder):
    """The random number belongs to a position: prompt and answer in one step or in many."""
    options = {"top_k": 0, "top_p": 0.9, "temperature": 1.5, "seed": 11}
    ids = model.generate(PROMPT, 20, **options)
    with Qwen2(folder, max_seq=MAX_SEQ, prefill_chunk=3, threads=1) as other:
        assert other.generate(PROMPT, 20, **options) == ids
    assert model.generate(ids[:15], 13, **options) == ids


def test_sampling_is_that_of_single_steps(model, sequence):
    """Engine and sequence draw alike: the same text for a seed, whatever computes it."""
    for seed in (*range(20), 2**32, 2**63, 2**64 - 1):
        for options in ((0, 1.0, 1.0), (0, 0.9, 1.5), (5, 0.95, 0.8), (None, None, None)):
            expected = step_by_step(sequence, PROMPT, MAX_SEQ, *options, seed=seed)
            assert list(model.stream(PROMPT, None, *options, seed=seed)) == expected


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.7, 0, 1.0),
        (2.5, 0, 1.0),
        (1.0, 5, 1.0),
        (1.5, 0, 0.8),
        (1.2, 9, 0.7),
        (3.0, 2, 1.0),
        (1.0, TINY_VOCAB, 0.999),
        (1.0, 10**6, 1.0),
    ],
)
def test_distribution(model, sequence, temperature, top_k, top_p):
    """Counts of the first token over seeds against the softmax of transformers' filtered logits.

    The seeds are fixed, so the outcome is too. Chi-square with bins of at least five expected; a
    correct sampler exceeds the limit for one in a million choices of seeds.
    """
    sequence.reset()
    sequence.step(PROMPT)
    scores = torch.tensor(sequence.logits())[None]
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = torch.softmax(scores.double(), -1)[0].numpy()
    draws = 3000
    counts = np.zeros(TINY_VOCAB)
    for seed in range(draws):
        token = model.generate(PROMPT, 1, top_k, top_p, temperature, seed=seed)[-1]
        counts[token] += 1
    assert counts[expected == 0].sum() == 0  # filtered tokens never come
    check_chi_square(counts, expected * draws)


def test_positions_are_independent(model):
    """Nearly uniform draws along one sequence: each token, and each pair of neighbours."""
    drawn = []
    for seed in range(60):
        ids = model.generate(PROMPT, MAX_SEQ, 0, 1.0, 1e6, seed=seed)
        drawn.append(ids[len(PROMPT) :])
    tokens = np.array(drawn)
    assert tokens.shape == (60, MAX_SEQ - len(PROMPT))
    uniform = np.full(TINY_VOCAB, tokens.size / TINY_VOCAB)
    check_chi_square(np.bincount(tokens.ravel(), minlength=TINY_VOCAB), uniform)
    pairs = (tokens[:, :-1] * TINY_VOCAB + tokens[:, 1:]).ravel()
    uniform = np.full(TINY_VOCAB**2, pairs.size / TINY_VOCAB**2)
    check_chi_square(np.bincount(pairs, minlength=TINY_VOCAB**2), uniform)


def check_chi_square(counts, expected):
    large = expected >= 5
    observed = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    assert freedom > 0
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    # Wilson and Hilferty: (X / n)^(1/3) is nearly normal; 4.75 standard deviations are 1e-6.
    spread = 2 / (9 * freedom)
    assert statistic <= freedom * (1 - spread + 4.75 * spread**0.5) ** 3


# ---- ends and limits ----


def test_ends(folder, tmp_path):
    """The answer stops with the first of several end tokens, from either configuration file."""
    for source in folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    with Qwen2(tmp_path) as model:
        assert model.meta.end_token == -1
        answer = model.generate(PROMPT, 30)[len(PROMPT) :]
    others = [token for token in range(TINY_VOCAB) if token not in answer]
    third = answer[2]
    stop = answer.index(third) + 1
    for tokens in (third, [third], [*others[:2], third, answer[-1]]):
        set_end_tokens(tmp_path, tokens)
        with Qwen2(tmp_path) as model:
            assert model.is_end(third)
            assert not model.is_end(others[-1])
            assert model.generate(PROMPT, 30)[len(PROMPT) :] == answer[:stop]
            assert model.generate(PROMPT, stop)[len(PROMPT) :] == answer[:stop]
    # config.json and generation_config.json disagree: each of their tokens is an end.
    config = json.loads((tmp_path / "config.json").read_text()) | {"eos_token_id": others[0]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with Qwen2(tmp_path) as model:
        assert model.is_end(others[0])
        assert model.is_end(third)
        assert not model.is_end(-1)
        assert not model.is_end(10**12)


def test_fills_the_sequence(model):
    assert len(model.generate(PROMPT, 2**64)) == MAX_SEQ
    """Without a limit, or with one beyond it, the answer goes on to max_seq tokens in all."""
    for limit in (None, MAX_SEQ - len(PROMPT), 10**9):
        assert len(model.generate(PROMPT, limit)) == MAX_SEQ
    assert len(model.generate([1] * (MAX_SEQ - 1))) == MAX_SEQ


def test_bad_arguments(model, sequence):
    expected = model.generate(PROMPT, 8)
    with pytest.raises(ValueError, match="empty"):
        model.generate([], 4)
    with pytest.raises(ValueError, match=f"{MAX_SEQ + 5} tokens.* {MAX_SEQ}"):
        model.generate([1] * (MAX_SEQ + 5), 4)
    with pytest.raises(ValueError, match=f"{MAX_SEQ} tokens"):
        model.stream([1] * MAX_SEQ)
    for token in (TINY_VOCAB, -1, 2**40):
        with pytest.raises(ValueError, match=f"token 1 of 3 is {token}, .*{TINY_VOCAB - 1}"):
            model.generate([1, token, 2], 4)
        with pytest.raises(ValueError, match=f"token 0 of 1: .*{TINY_VOCAB - 1}, found {token}"):
            sequence.step([token])
    with pytest.raises(ValueError, match="64 bits"):
        model.generate([1, 2**64, 2], 4)
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"max_new_tokens: .* {limit}"):
            model.generate(PROMPT, limit)
    for name, value in (
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("top_k", 2**31),
        ("seed", -1),
        ("seed", 2**64),
    ):
        with pytest.raises(ValueError, match=f"{name}: .*{value}"):
            model.generate(PROMPT, 4, **{name: value})
        with pytest.raises(ValueError, match=f"{name}: .*{value}"):
            sequence.step(PROMPT, **{name: value})
    with pytest.raises(TypeError):
        model.generate(["1"], 4)
    with pytest.raises(TypeError):
        model.generate([1.5], 4)
    assert model.generate(PROMPT, 8) == expected


def test_failed_step_leaves_the_sequence(sequence):
    sequence.reset()
    assert sequence.length == 0
    sequence.step(PROMPT)
    logits, following = sequence.logits(), sequence.step([1])
    sequence.reset()
    sequence.step(PROMPT)
    for tokens in ([], [1] * MAX_SEQ):
        with pytest.raises(llaisys.LlaisysError):
            sequence.step(tokens)
    assert sequence.length == len(PROMPT)
    assert sequence.logits() == logits
    assert sequence.step([1]) == following


def test_logits_need_a_step(folder):
    with Sequence(folder) as sequence, pytest.raises(llaisys.LlaisysError):
        sequence.logits()


# ---- streams ----


def idle(model):
    """Waits until nothing is computed, and checks that every KV block has come back."""
    for _ in range(1000):
        stats = model.stats()
        if not stats["running"] and not stats["waiting"]:
            break
        time.sleep(0.005)
    assert stats["running"] == stats["waiting"] == stats["kv_active"] == 0


def test_another_answer_ends_a_stream(model):
    expected = model.generate(PROMPT, 3)
    for read in [0, 1] * 20:
        stream = model.stream(PROMPT)
        for _ in range(read):
            next(stream)
        assert model.generate(PROMPT, 3) == expected
        with pytest.raises(RuntimeError, match="another answer"):
            next(stream)
        assert list(stream) == []
    whole = model.stream(PROMPT, 3)
    tokens = [next(whole) for _ in range(3)]
    assert PROMPT + tokens == model.generate(PROMPT, 3)
    assert list(whole) == []  # it had nothing left to lose


def test_bad_arguments_do_not_end_a_stream(model):
    stream = model.stream(PROMPT, 10)
    first = next(stream)
    with pytest.raises(ValueError, match="empty"):
        model.stream([])
    assert PROMPT + [first, *stream] == model.generate(PROMPT, 10)


def test_abandoned_streams_are_cancelled(folder):
    """Closed or dropped, read or not, and more of them than there are places."""
    with Qwen2(folder, threads=1) as model:  # 2048 tokens take a while
        expected = model.generate(PROMPT, 3)
        model.generate(PROMPT)
        ended = model.stats()["finished"]["cancelled"]
        for turn in range(30):
            stream = model.stream([turn % TINY_VOCAB])
            if turn % 2:
                next(stream)
            if turn % 3:
                stream.close()
            del stream
        gc.collect()
        idle(model)
        # A machine with much else to do may have ended one before it was dropped.
        assert 20 <= model.stats()["finished"]["cancelled"] - ended <= 30
        assert model.generate(PROMPT, 3) == expected


def run_python(code, **environment):
    """A process of its own, since what is tested here may take it along."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'bindings')!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def test_model_and_stream_are_collected_together(folder):
    done = run_python(
        f"""
import gc
from llaisys.models import Qwen2
class Chat: pass
for _ in range(10):
    chat = Chat()
    chat.itself, chat.model = chat, Qwen2({str(folder)!r}, max_seq=64, threads=1)
    chat.stream = chat.model.stream({PROMPT})
    next(chat.stream)
    del chat
    gc.collect()
""",
        MALLOC_PERTURB_="170",  # what is freed is unlike what it was
    )
    assert done.returncode == 0, done.stderr


def test_forked_child_ends(folder):
    done = run_python(
        f"""
import os
from llaisys.models import Qwen2
model = Qwen2({str(folder)!r}, max_seq=64, threads=1)
stream = model.stream({PROMPT})
next(stream)
child = os.fork()
if not child:
    del stream, model
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert len(list(stream)) > 1
"""
    )
    assert done.returncode == 0, done.stderr


def test_interrupts(folder, monkeypatch):
    with Qwen2(folder, max_seq=MAX_SEQ) as model:
        expected = model.generate(PROMPT, 4)

        def interrupted(answer, event):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:  # while an event is handed out, which is then lost
            patch.setattr(llaisys.engine.Answer, "take", interrupted)
            with pytest.raises(KeyboardInterrupt):
                model.generate(PROMPT, 1)
        assert model.generate(PROMPT, 4) == expected
        stream = model.stream(PROMPT)
        model._engine._sinks.clear()  # as between a submission and its note
        assert model.generate(PROMPT, 4) == expected
        stream.close()


def test_close(folder):
    model, sequence = Qwen2(folder), Sequence(folder)
    read, unread = model.stream(PROMPT, 1), model.stream(PROMPT)
    for opened in (model, sequence):
        opened.close()
        opened.close()
    with pytest.raises(RuntimeError, match="another answer"):
        next(read)
    with pytest.raises(ValueError, match="closed"):
        list(unread)
    for use in (
        lambda: model.generate(PROMPT),
        lambda: model.stream(PROMPT),
        lambda: model.is_end(1),
        model.stats,
        lambda: sequence.step(PROMPT),
        lambda: sequence.is_end(1),
        sequence.logits,
        sequence.reset,
    ):
        with pytest.raises(ValueError, match="closed"):
            use()
    assert model.meta.voc == sequence.meta.voc == TINY_VOCAB


def test_threads(folder, model):
    """A model may pass from thread to thread, and models run side by side in several."""
    expected = model.generate(PROMPT, 40)
    found = []

    def answer(mine):
        found.append(mine.generate(PROMPT, 40))

    def run(*threads):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    run(threading.Thread(target=answer, args=[model]))
    with Qwen2(folder, threads=1) as one, Qwen2(folder, threads=1) as two:
        run(*(threading.Thread(target=answer, args=[mine]) for mine in (one, two)))
    assert found == [expected] * 3


@pytest.mark.parametrize("name", ["max_seq", "prefill_chunk", "threads"])
def test_bad_options(folder, name):
    for value in (0, -1, 2**31, 2**64):
        with pytest.raises(ValueError, match=f"{name}: .*{value}"):
            Qwen2(folder, **{name: value})
        with pytest.raises(ValueError, match=f"{name}: .*{value}"):
            Sequence(folder, **{name: value})
    with pytest.raises(ValueError, match="device_ids"):
        Qwen2(folder, device_ids=[])


def test_context_is_a_limit(folder):
    with pytest.raises(llaisys.LlaisysError, match=r"2049.*2048"):
        Qwen2(folder, max_seq=2049)


@pytest.mark.parametrize("max_seq", [9, 31, 32, 33, 63, 65])
def test_limits_that_are_no_multiple_of_anything(folder, model, max_seq):
    """The answer is the same as far as it goes."""
    expected = model.generate(PROMPT, MAX_SEQ)
    with Qwen2(folder, max_seq=max_seq, prefill_chunk=3) as other:
        assert other.meta.maxseq == max_seq
        ids = other.generate(PROMPT)
        assert len(ids) == max_seq
        assert ids[:MAX_SEQ] == expected[:max_seq]
        assert other.generate(ids[: max_seq - 1]) == ids  # the prefixes fill the KV cache


def test_missing_device(folder):
    count = llaisys.RuntimeAPI(llaisys.DeviceType.NVIDIA).get_device_count()
    with pytest.raises(llaisys.LlaisysError):
        Qwen2(folder, llaisys.DeviceType.NVIDIA, device_ids=[count])


def test_models_are_independent(folder):
    with Qwen2(folder, max_seq=32) as one, Qwen2(folder, max_seq=48) as two:
        alone = list(one.stream(PROMPT, 10))
        mixed = list(zip(one.stream(PROMPT, 10), two.stream(PROMPT[::-1], 10)))
        assert [a for a, _ in mixed] == alone
        assert [b for _, b in mixed] == list(two.stream(PROMPT[::-1], 10))


# ---- memory ----


def resident() -> int:
    """Bytes of memory that the process has in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_generate_does_not_leak(model):
    for _ in range(20):
        model.generate(PROMPT, 20)
    before = resident()
    for seed in range(200):
        model.generate(PROMPT, 20, top_k=0, seed=seed)
    assert resident() - before < 1 << 20


def test_open_and_close_do_not_leak(folder):
    def use():
        with Qwen2(folder, max_seq=256) as model:
            model.generate(PROMPT, 2)

    for _ in range(10):
        use()
    before = resident()
    for _ in range(40):
        use()
    assert resident() - before < 2 << 20
