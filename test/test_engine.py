"""llaisys.Engine: many prompts at once, streams, cancellation, limits; against Sequence."""

import asyncio
import ctypes
import gc
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bindings"), str(ROOT / "test")]

import llaisys
from llaisys.engine import Engine, EngineBusy, EngineClosed, Request, RequestError
from llaisys.tokenizer import Tokenizer
from test_utils import absence, step_by_step

MINI = ROOT / "models" / "refrain-mini"
DEVICES = {"cpu": llaisys.DeviceType.CPU, "nvidia": llaisys.DeviceType.NVIDIA}
MAX_SEQ = 256
QUESTIONS = [f"What is {a} + {b}?" for a in range(3, 40, 4) for b in (5, 18)] + [
    "Who are you?",
    "What is the capital of France?",
    "Count from 3 to 9.",
]


def chat_ids(question):
    tokenizer = Tokenizer(MINI)
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}])
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def prompts():
    return [chat_ids(question) for question in QUESTIONS]


@pytest.fixture(scope="module", params=DEVICES)
def device_type(request):
    if reason := absence(request.param):
        pytest.skip(reason)
    return DEVICES[request.param]


@pytest.fixture(scope="module")
def engine(device_type):
    options = {"max_seq": MAX_SEQ, "max_seqs": 6, "max_queue": 8, "kv_tokens": 1024, "kv_block": 16}
    with Engine(MINI, device_type, **options) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(device_type):
    with llaisys.models.Sequence(MINI, device_type, max_seq=MAX_SEQ) as sequence:
        yield sequence


def idle(engine):
    """Waits until nothing runs, and checks that every block has come back."""
    for _ in range(1000):
        stats = engine.stats()
        if not stats["running"] and not stats["waiting"]:
            break
        time.sleep(0.005)
    stats = engine.stats()
    assert stats["kv_active"] == stats["running"] == stats["waiting"] == 0
    assert stats["kv_free"] + stats["kv_cached"] == stats["kv_blocks"]


# ---- generate ----


def test_same_as_alone(engine, alone, prompts):
    """More prompts than run at once or fit in the queue; the answers come in their order."""
    answers = engine.generate(prompts, 40)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == step_by_step(alone, prompt, 40)
        assert answer.finish == ("stop" if alone.is_end(answer.tokens[-1]) else "length")
        assert answer.prompt_tokens == len(prompt)
        assert 0 < answer.queued_s <= answer.first_token_s <= answer.finished_s
    idle(engine)


def test_sampled_same_as_alone(engine, alone, prompts):
    options = {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "seed": 2**64 - 1}
    for prompt, answer in zip(prompts, engine.generate(prompts, 30, **options), strict=True):
        assert answer.tokens == step_by_step(alone, prompt, 30, **options)
    seeds = [Request(prompts[0], 30, temperature=20.0, seed=seed) for seed in range(6)]
    assert len({tuple(answer.tokens) for answer in engine.generate(seeds)}) == 6


def test_text(engine):
    tokenizer = Tokenizer(MINI)
    (answer,) = engine.generate([chat_ids("What is 12 + 30?")])
    assert tokenizer.decode(answer.tokens, skip_special_tokens=True) == "12 + 30 = 42."


def test_follow_up_is_cached(engine):
    rng = random.Random(1)
    prompt = [rng.randrange(300) for _ in range(100)]
    first = engine.generate([prompt], 50, ignore_eos=True)[0]
    following = prompt + first.tokens + [1, 2, 3]
    second = engine.generate([following], 5, ignore_eos=True)[0]
    known = len(prompt) + len(first.tokens) - 1
    assert known - 16 < second.cached_tokens <= known
    for options in ({"cache": False}, {"cache_salt": 7}):
        again = engine.generate([following], 5, ignore_eos=True, **options)[0]
        assert again.tokens == second.tokens
        assert again.cached_tokens == 0


def test_ends(engine, prompts):
    full = engine.generate([prompts[0]], 20, ignore_eos=True)[0]
    assert full.finish == "length"
    assert len(full.tokens) == 20
    stop = full.tokens[3]
    short = engine.generate([prompts[0]], 20, ignore_eos=True, stop=[stop])[0]
    assert short.finish == "stop"
    assert short.tokens == full.tokens[: full.tokens.index(stop) + 1]
    for limit in (None, 10**9):  # up to max_seq
        most = engine.generate([[1] * 200], limit, ignore_eos=True)[0]
        assert len(most.tokens) == MAX_SEQ - 200
    assert len(engine.generate([[1] * (MAX_SEQ - 1)])[0].tokens) == 1


def test_on_answer(engine, prompts):
    seen = {}
    answers = engine.generate(prompts, 5, on_answer=seen.__setitem__)
    assert seen == dict(enumerate(answers))
    assert engine.generate([]) == []
    tokens = [answer.tokens for answer in engine.generate(iter(prompts), 5)]
    assert tokens == [answer.tokens for answer in answers]


def test_progress(engine, prompts, capsys):
    engine.generate(prompts, 5, progress=True)
    shown = capsys.readouterr().err
    assert f"100%|{'#' * 24}| {len(prompts)}/{len(prompts)} [" in shown
    assert "tokens/s]" in shown
    engine.generate(prompts, 5, progress=False)
    engine.generate(prompts, 5)  # no terminal
    assert capsys.readouterr().err == ""


def test_bad_arguments(engine):
    vocabulary = engine.meta.voc
    for prompt, message in (
        ([], "the prompt is empty"),
        ([1] * MAX_SEQ, f"{MAX_SEQ} tokens.* {MAX_SEQ}"),
        (
            [1, vocabulary],
            f"token 1 of 2 is {vocabulary}, expected an id from 0 to {vocabulary - 1}",
        ),
        ([-1], "token 0 of 1 is -1"),
        ([2**64], "beyond 64 bits"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.generate([prompt])
    for name, value in (
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_k", -1),
        ("seed", 2**64),
        ("max_new_tokens", 0),
        ("priority", 2**31),
        ("cache_salt", -1),
        ("stop", [vocabulary]),
        ("stop", [1] * 65),
    ):
        with pytest.raises(ValueError, match=name):
            engine.generate([Request([1, 2], **{name: value})])
    with pytest.raises(TypeError):
        engine.generate([["1"]])
    with pytest.raises(TypeError):
        engine.generate([[1]], nonsense=1)
    idle(engine)


def test_least_room(prompts):
    """One request at a time and one waiting: the others wait in Python."""
    with Engine(MINI, max_seq=64, max_seqs=1, max_queue=1) as engine:
        expected = [engine.generate([prompt], 1)[0].tokens for prompt in prompts]
        for _ in range(10):
            assert [answer.tokens for answer in engine.generate(prompts, 1)] == expected

        async def main():
            for prompt, tokens in zip(prompts, expected, strict=True):
                assert [token async for token in engine.stream(prompt, 1)] == tokens

        asyncio.run(main())


def test_one_bad_prompt_of_many(engine, prompts):
    """The others are cancelled, and the engine is free again."""
    with pytest.raises(RequestError):
        engine.generate([*prompts[:3], [-1]], 200)
    idle(engine)
    assert engine.generate(prompts[:1], 3)[0].finish


def test_interrupt(engine, prompts):
    def interrupt(_index, _answer):
        signal.raise_signal(signal.SIGINT)

    for _ in range(20):
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompts, 20, on_answer=interrupt)
        idle(engine)
    assert engine.generate(prompts[:1], 3)[0].finish


# ---- streams ----


def test_streams(engine, prompts):
    expected = [answer.tokens for answer in engine.generate(prompts[:10], 30)]

    async def read(prompt):
        stream = engine.stream(prompt, 30)
        tokens = [token async for token in stream]
        assert stream.answer.tokens == tokens
        assert stream.answer.finish in ("stop", "length")
        return tokens

    async def main():
        return await asyncio.gather(*map(read, prompts[:10]))

    for _ in range(2):  # another loop
        assert asyncio.run(main()) == expected
    idle(engine)


def test_leaving_a_stream_cancels_it(engine):
    async def main():
        async with engine.stream([5, 6, 7], ignore_eos=True) as stream:
            async for _ in stream:
                break
        tokens = [token async for token in stream]  # what had come by then
        assert stream.answer.finish == "cancelled"
        assert len(tokens) + 1 == len(stream.answer.tokens) < MAX_SEQ - 3
        stream.cancel()  # no more than a no-op

    asyncio.run(main())
    idle(engine)


def test_cancelled_task(engine):
    async def read():
        async with engine.stream([5, 6, 7], ignore_eos=True) as stream:
            async for _ in stream:
                pass

    async def main():
        tasks = [asyncio.create_task(read()) for _ in range(6)]
        await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(r is None or isinstance(r, asyncio.CancelledError) for r in results)

    for _ in range(20):
        asyncio.run(main())
        idle(engine)
    assert engine.generate([[1, 2, 3]], 2)[0].tokens


def test_full_queue(engine):
    async def main():
        streams = []
        with pytest.raises(
            EngineBusy, match="the queue is full: 14 requests are running or waiting"
        ):
            for _ in range(1000):
                streams.append(engine.stream([5, 6, 7], ignore_eos=True))
        assert len(streams) >= 14
        for stream in streams:
            stream.cancel()
        for stream in streams:
            [_ async for _ in stream]
            assert stream.answer.finish in ("cancelled", "length")

    asyncio.run(main())
    assert engine.stats()["refused"] > 0
    idle(engine)


def test_not_both_at_once(engine):
    async def main():
        async with engine.stream([5, 6, 7], ignore_eos=True):
            with pytest.raises(RuntimeError, match="answering streams"):
                engine.generate([[1]])

    asyncio.run(main())
    idle(engine)


def test_other_threads_run_meanwhile(engine, prompts):
    """Waiting for the engine lets go of Python's lock."""
    ticks = 0
    over = threading.Event()

    def tick():
        nonlocal ticks
        while not over.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    engine.generate([[1, 2, 3]] * 30, ignore_eos=True)
    over.set()
    thread.join()
    assert ticks > 3


# ---- ends ----


def test_close_tells_streams():
    async def main():
        async with Engine(MINI, max_seq=MAX_SEQ, max_seqs=2) as engine:
            streams = [engine.stream([1, 2, 3], ignore_eos=True) for _ in range(5)]
            async for _ in streams[0]:
                break
        for stream in streams:
            [_ async for _ in stream]
            assert stream.answer.finish in ("closed", "length")
        assert streams[-1].answer.finish == "closed"
        for use in (engine.stats, lambda: engine.generate([[1]]), lambda: engine.stream([1])):
            with pytest.raises(ValueError, match="closed"):
                use()
        engine.close()

    asyncio.run(main())


def test_drain_and_stop():
    with Engine(MINI, max_seq=MAX_SEQ) as engine:
        assert engine.generate([[1, 2]], 3)[0].tokens
        engine.drain()
        with pytest.raises(EngineClosed, match="shutting down"):
            engine.generate([[1, 2]], 3)
        engine.stop()
        engine.stop()


def test_dropped():
    engine = Engine(MINI, max_seq=64)
    del engine
    gc.collect()


def test_descriptors_and_memory_do_not_leak():
    def use():
        with Engine(MINI, max_seq=64, max_seqs=2) as engine:
            engine.generate([[1, 2, 3]] * 3, 5)

    for _ in range(5):
        use()
    descriptors = len(os.listdir("/proc/self/fd"))
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    for _ in range(10):
        use()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert int(Path("/proc/self/statm").read_text().split()[1]) - resident < (4 << 20) // 4096


def test_bad_options():
    for name in ("max_seqs", "kv_tokens", "kv_block", "max_queue", "mixed_rows", "max_seq"):
        for value in (0, -1, 2**31):
            with pytest.raises(ValueError, match=f"{name}: .*{value}"):
                Engine(MINI, **{name: value})
    with pytest.raises(llaisys.LlaisysError, match="kv_block is 3"):
        Engine(MINI, kv_block=3)
    with pytest.raises(llaisys.LlaisysError, match="kv_tokens is 32, which does not hold"):
        Engine(MINI, max_seq=64, kv_tokens=32)
    with pytest.raises(llaisys.LlaisysError, match="mixed_rows is 1, expected max_seqs = 4"):
        Engine(MINI, max_seqs=4, mixed_rows=1)
    with pytest.raises(llaisys.LlaisysError, match="nowhere"):
        Engine(ROOT / "nowhere")


def test_plan():
    """The plan is that of the engine which is opened, and larger for more requests."""
    totals = []
    for options in ({"max_seqs": 2}, {"max_seqs": 8}, {"max_seqs": 8, "kv_tokens": 5000}):
        text = llaisys.engine.plan(MINI, format="json", max_seq=256, **options)
        totals.append(json.loads(text)["totals"]["total"])
    assert totals == sorted(set(totals))
    command = [sys.executable, "-m", "llaisys", "plan", MINI, "--device", "cpu", "--max-seq", "256"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "bindings")}
    for extra, total in ((["--max-seqs", "2"], totals[0]), (["--max-seqs", "8"], totals[1])):
        done = subprocess.run(
            [*command, "--json", *extra], env=environment, capture_output=True, check=True
        )
        assert json.loads(done.stdout)["totals"]["total"] == total
    # The model for one request at a time takes what a sequence takes.
    lib, options = llaisys.libllaisys.LIB_LLAISYS, llaisys.options.model_options(max_seq=256)
    text = lib.llaisysQwen2Plan(os.fsencode(MINI), ctypes.byref(options), b"text")
    assert ctypes.string_at(text).decode() == llaisys.models.plan(MINI, max_seq=256)
    lib.llaisysFreeString(text)
    with pytest.raises(llaisys.LlaisysError, match="plan format 'x'"):
        llaisys.engine.plan(MINI, format="x")
    with pytest.raises(ValueError, match="max_seqs"):
        llaisys.engine.plan(MINI, max_seqs=0)


def test_readme():
    """The README's program runs and says what it should."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (program,) = (program for program in programs if "llaisys.Engine" in program)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "bindings")}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert "10 + 5 = 15. stop" in done.stdout
    assert "19 + 7 = 26. stop" in done.stdout


def test_header_example():
    """The example at the end of the header is a whole program in C11."""
    program = "#define LLAISYS_ENGINE_EXAMPLE\n#include <llaisys/engine.h>\n"
    flags = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only")
    command = ["cc", *flags, "-I", ROOT / "include", "-x", "c", "-"]
    subprocess.run(command, input=program, text=True, check=True)
