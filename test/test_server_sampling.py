"""Sampling parameters and log-probabilities over HTTP, as far as the engine has them."""

import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bindings"), str(ROOT / "test")]

pytest.importorskip("uvicorn")
from llaisys.server.prepare import ENGINE
from llaisys.tokenizer import Tokenizer
from server_utils import MINI, Served, chat_body

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
pytestmark = pytest.mark.skipif(
    not {"min_p", "logit_bias", "logprobs"} <= ENGINE,
    reason="the engine has no penalties, logit bias and log-probabilities yet",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Served(tmp_path_factory.mktemp("server") / "log") as served:
        yield served


def text_of(server, **options):
    body = server.ask(
        COMPLETIONS, {"prompt": "Hello", "max_tokens": 60, "ignore_eos": True} | options
    )[2]
    return body["choices"][0]["text"]


def test_parameters_arrive(server):
    """Each makes a difference, and none at its neutral value."""
    noisy = {"temperature": 2, "seed": 1}
    plain, noise = text_of(server, temperature=0), text_of(server, **noisy)
    assert plain != noise
    for name, value in (
        ("presence_penalty", 2),
        ("frequency_penalty", 2),
        ("repetition_penalty", 2),
    ):
        assert text_of(server, **noisy, **{name: value}) != noise, name
    assert text_of(server, min_p=1, **noisy) == plain  # the likeliest token alone
    neutral = {"min_p": 0, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}
    assert text_of(server, **noisy, **neutral, logit_bias={}) == noise


def test_logit_bias(server):
    tokenizer = Tokenizer(MINI)
    (token,) = tokenizer.encode("x", add_special_tokens=False)
    assert text_of(server, temperature=0, logit_bias={str(token): 100}) == "x" * 60
    first = tokenizer.encode(text_of(server, temperature=0), add_special_tokens=False)[0]
    banned = text_of(server, temperature=0, max_tokens=1, logit_bias={str(first): -100})
    assert tokenizer.encode(banned, add_special_tokens=False) != [first]


def test_logprobs_of_chat(server):
    options = {"logprobs": True, "top_logprobs": 3}
    (choice,) = server.chat("What is 12 + 30?", **options)["choices"]
    entries = choice["logprobs"]["content"]
    assert b"".join(bytes(e["bytes"]) for e in entries).decode() == choice["message"]["content"]
    for entry in entries:
        top = [item["logprob"] for item in entry["top_logprobs"]]
        assert len(top) == 3
        assert top == sorted(top, reverse=True)
        assert entry["logprob"] == top[0] <= 0  # greedy
        assert sum(map(math.exp, top)) <= 1.0001
    events = server.events(CHAT, chat_body("What is 12 + 30?", **options))
    choices = [c for e in events for c in e["choices"] if c["logprobs"]]
    assert [entry for c in choices for entry in c["logprobs"]["content"]] == entries
    assert server.chat("What is 12 + 30?")["choices"][0]["logprobs"] is None
    alone = server.chat("What is 12 + 30?", logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [e["logprob"] for e in alone] == [e["logprob"] for e in entries]
    assert all(e["top_logprobs"] == [] for e in alone)


def test_logprobs_up_to_a_stop_string(server):
    (choice,) = server.chat("Count from 3 to 9.", logprobs=True, stop=", 5")["choices"]
    spelled = b"".join(bytes(e["bytes"]) for e in choice["logprobs"]["content"]).decode()
    assert spelled == choice["message"]["content"] + ", 5"


def test_logprobs_of_completions(server):
    body = {"prompt": "Hello", "max_tokens": 8, "temperature": 0, "logprobs": 2, "ignore_eos": True}
    (choice,) = server.ask(COMPLETIONS, body)[2]["choices"]
    told = choice["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"]) == 8
    assert told["text_offset"][0] == 0
    for token, value, top in zip(
        told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True
    ):
        assert top[token] == value
        assert len(top) == 2


def test_offsets_of_completions(server):
    """Where a token's text is, also behind tokens that are parts of characters or not in it."""
    body = {"prompt": "Hello", "max_tokens": 300, "temperature": 2, "seed": 3, "ignore_eos": True}
    (choice,) = server.ask(COMPLETIONS, {**body, "logprobs": 0})[2]["choices"]
    told, text, before, parts = choice["logprobs"], choice["text"], "", 0
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        is_part = token.startswith("bytes:")
        if not is_part and not token.startswith("<|") and not before.startswith("bytes:"):
            assert text[offset:].startswith(token)
        parts += is_part
        before = token
    assert parts > 1


def test_top_logprobs_need_logprobs(server):
    status, _, body = server.ask(CHAT, chat_body("Hi", top_logprobs=2))
    assert (status, body["error"]["param"]) == (400, "top_logprobs")
