"""Penalties, logit bias, min_p and log-probabilities through llaisys.Engine, against transformers' processors."""

import asyncio
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bindings"), str(ROOT / "test")]

import llaisys
from llaisys.engine import Engine, Request, RequestError
from test_utils import absence

MINI = ROOT / "models" / "refrain-mini"
DEVICES = {"cpu": llaisys.DeviceType.CPU, "nvidia": llaisys.DeviceType.NVIDIA}
PROMPTS = [[7, 300, 7, 42, 300, 1], [65, 79, 275], list(range(40, 90))]
TIED = [
    1029,
    1921,
    1984,
    868,
    1043,
    1703,
    1868,
    1376,
]  # the tokens 903 and 1368 are equals behind it, and top_p 0.7 keeps one


@pytest.fixture(scope="module", params=DEVICES)
def device_type(request):
    if reason := absence(request.param):
        pytest.skip(reason)
    return DEVICES[request.param]


@pytest.fixture(scope="module")
def engine(device_type):
    with Engine(MINI, device_type, max_seq=128, max_seqs=4, kv_tokens=256, kv_block=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(device_type):
    with llaisys.models.Sequence(MINI, device_type, max_seq=128) as sequence:
        yield sequence


def logits_behind(sequence, ids):
    sequence.reset()
    sequence.step(ids)
    return torch.frombuffer(bytearray(sequence.logits().tobytes()), dtype=torch.float32)[None]


def processed(request, prompt, answer, scores):
    """The request's logits, by transformers' processors where it has them, in the engine's order."""
    ids = torch.tensor([prompt + answer])
    if request.logit_bias:
        bias = {(token,): value for token, value in request.logit_bias.items()}
        scores = SequenceBiasLogitsProcessor(bias)(ids, scores)
    if request.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(request.repetition_penalty)(ids, scores)
    counts = torch.bincount(torch.tensor(answer, dtype=torch.int64), minlength=scores.shape[1])
    scores = scores - request.frequency_penalty * counts
    scores = scores - request.presence_penalty * (counts > 0)
    if request.temperature == 0:
        return scores
    scores = TemperatureLogitsWarper(request.temperature)(ids, scores)
    if request.top_k:
        scores = TopKLogitsWarper(request.top_k)(ids, scores)
    if request.top_p < 1:
        scores = TopPLogitsWarper(request.top_p)(ids, scores)
    return MinPLogitsWarper(request.min_p)(ids, scores) if request.min_p else scores


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.8},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.25},
        {"presence_penalty": -0.5, "frequency_penalty": -0.25, "repetition_penalty": 1.3},
        {"logit_bias": {275: -math.inf, 65: -3.0, 13: 2.0}},
        {"logit_bias": {1234: 100.0}, "frequency_penalty": 2.0},
    ],
)
def test_greedy_as_transformers(engine, alone, options):
    """Token for token: the engine's choice has the largest processed logit."""
    requests = [Request(p, 24, ignore_eos=True, **options) for p in PROMPTS]
    plain = engine.generate([Request(p, 24, ignore_eos=True) for p in PROMPTS])
    answers = engine.generate(requests)
    for request, answer in zip(requests, answers, strict=True):
        prompt = list(request.prompt)
        assert len(answer.tokens) == 24
        for i, token in enumerate(answer.tokens):
            before = answer.tokens[:i]
            scores = processed(request, prompt, before, logits_behind(alone, prompt + before))[0]
            assert scores[token] >= scores.max() - 1e-5
    assert [a.tokens for a in answers] != [a.tokens for a in plain]


@pytest.mark.parametrize(
    "options",
    [
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"min_p": 0.05, "top_k": 10, "top_p": 0.9, "repetition_penalty": 1.2},
        {"top_p": 0.7, "presence_penalty": 2.0, "logit_bias": {275: 1.5, 65: -math.inf}},
    ],
)
@pytest.mark.parametrize("prompt", [PROMPTS[0], TIED])
def test_supports_as_transformers(engine, alone, options, prompt):
    """Every token that is drawn has probability left, and the likeliest ones are all drawn.

    bf16 logits are often equal. Where only some of the equals at the end of top_p's set belong to it, the engine takes
    the first by token; transformers those that an unstable sort happens to leave last.
    """
    seeds = [Request(prompt, 1, temperature=1.3, seed=seed, **options) for seed in range(400)]
    drawn = {answer.tokens[0] for answer in engine.generate(seeds)}
    logits = logits_behind(alone, prompt)
    odds = processed(seeds[0], prompt, [], logits).softmax(-1)[0]
    kept = {t for t in range(len(odds)) if odds[t] > 0}
    whole = replace(seeds[0], top_k=0, top_p=1.0, min_p=0.0)
    scores = processed(whole, prompt, [], logits)[0]
    equals = [t for t in range(len(odds)) if scores[t] == min(scores[t] for t in kept)]
    kept = (kept - set(equals)) | set(equals[: len(kept & set(equals))])
    assert drawn <= kept
    assert {t for t in kept if odds[t] > 0.04} <= drawn


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.2, "top_k": 12},
        {"temperature": 2.0, "top_p": 0.6},
        {"temperature": 1.5, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.3},
        {"temperature": 1.0, "top_k": 9, "logit_bias": {275: 2.0, 65: -math.inf}},
    ],
)
def test_frequencies(engine, alone, options):
    """Chi-square: a correct draw exceeds the limit for one choice of seeds in a million."""
    prompt, draws = PROMPTS[0], 4000
    requests = [Request(prompt, 1, seed=7 * seed, **options) for seed in range(draws)]
    counts = [0] * engine.meta.voc
    for first in range(0, draws, 200):
        for answer in engine.generate(requests[first : first + 200]):
            counts[answer.tokens[0]] += 1
    odds = processed(requests[0], prompt, [], logits_behind(alone, prompt)).softmax(-1)[0].double()
    likely = [t for t in range(len(odds)) if odds[t] * draws >= 5]
    rest, chi = draws - sum(counts[t] for t in likely), 0.0
    for t in likely:
        chi += (counts[t] - draws * odds[t].item()) ** 2 / (draws * odds[t].item())
    expected = draws * (1 - sum(odds[t].item() for t in likely))
    freedom = len(likely) - 1
    if expected >= 5:  # the unlikely ones together
        chi, freedom = chi + (rest - expected) ** 2 / expected, freedom + 1
    # Wilson and Hilferty's approximation at 4.75 standard deviations
    c = 2 / (9 * freedom)
    assert freedom >= 3 and chi < freedom * (1 - c + 4.75 * math.sqrt(c)) ** 3


def test_logprobs(engine, alone):
    """Of the model itself, whatever bends the choice."""
    for options in ({}, {"temperature": 1.5, "top_k": 30, "seed": 5, "repetition_penalty": 1.5}):
        for prompt, answer in zip(
            PROMPTS, engine.generate(PROMPTS, 16, logprobs=20, **options), strict=True
        ):
            assert len(answer.logprobs) == len(answer.tokens) > 0
            for i, (token, told) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
                scores = (
                    logits_behind(alone, prompt + answer.tokens[:i])[0].double().log_softmax(-1)
                )
                assert told.logprob == pytest.approx(scores[token].item(), abs=2e-5)
                values = [value for _, value in told.top]
                assert len({t for t, _ in told.top}) == len(told.top) == 20
                assert values == sorted(values, reverse=True)
                assert values == pytest.approx(scores.topk(20).values.tolist(), abs=2e-5)
                for t, value in told.top:
                    assert value == pytest.approx(scores[t].item(), abs=2e-5)
    only_own = engine.generate(PROMPTS[:1], 4, logprobs=0)[0]
    assert all(told.top == [] and told.logprob < 0 for told in only_own.logprobs)
    assert engine.generate(PROMPTS[:1], 4)[0].logprobs == []


def test_streams_tell_logprobs(engine):
    request = Request(PROMPTS[1], 20, temperature=0.9, seed=3, logprobs=2, frequency_penalty=0.5)
    (expected,) = engine.generate([request])

    async def main():
        tokens = []
        async with engine.stream(request) as stream:
            async for token in stream:
                tokens.append(token)
                assert len(stream.answer.logprobs) >= len(tokens)
        assert (tokens, stream.answer.logprobs) == (expected.tokens, expected.logprobs)

    asyncio.run(main())


def test_same_in_company(engine):
    """A seeded request with everything set: alone, beside others, and from the cache."""
    request = Request(
        PROMPTS[2],
        40,
        temperature=1.1,
        top_k=200,
        top_p=0.97,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={5: 1.0, 6: -2.0},
        seed=11,
        logprobs=5,
        ignore_eos=True,
    )
    first = engine.generate([request])[0]
    others = [Request(p, 60, temperature=2.0, seed=9, ignore_eos=True) for p in PROMPTS * 3]
    answers = engine.generate([*others[:4], request, *others[4:], request])
    for answer in (answers[4], answers[-1]):
        assert (answer.tokens, answer.logprobs) == (first.tokens, first.logprobs)
    assert engine.stats()["preemptions"] > 0


def test_bad_arguments(engine):
    vocabulary, nan = engine.meta.voc, math.nan
    for name, values in {
        "min_p": (-0.1, 1.1, nan),
        "repetition_penalty": (0.0, -1.0, math.inf, nan),
        "presence_penalty": (-2.1, 2.1, nan),
        "frequency_penalty": (-math.inf, 3.0, nan),
        "logit_bias": (
            {1: 101.0},
            {1: nan},
            {-1: 1.0},
            {vocabulary: 1.0},
            {2**64: 1.0},
            {1: math.inf},
        ),
        "logprobs": (-1, 21, 2**31),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                engine.generate([Request([1, 2], 1, **{name: value})])
    many = dict.fromkeys(range(1025), 1.0)
    with pytest.raises(RequestError, match="1025 tokens with a logit_bias, expected at most 1024"):
        engine.generate([Request([1, 2], 1, logit_bias=many)])
    del many[0]
    assert engine.generate([Request([1, 2], 1, logit_bias=many)])[0].tokens
    with pytest.raises(TypeError):
        engine.generate([Request([1, 2], 1, logit_bias={1: "2"})])


def test_bound_of_logprobs():
    for most in (-1, 21):
        with pytest.raises(ValueError, match="max_logprobs"):
            Engine(MINI, max_logprobs=most)
    with Engine(MINI, max_seq=32, max_seqs=1, max_logprobs=0) as engine:
        assert engine.generate([[1]], 2, logprobs=0)[0].logprobs
        with pytest.raises(RequestError, match="top_logprobs is 1, expected 0 to 0"):
            engine.generate([[1]], 2, logprobs=1)
