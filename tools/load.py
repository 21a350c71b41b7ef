#!/usr/bin/env python3
"""Loads the server, and the engine without it, with the same requests, and prints both.

    PYTHONPATH=bindings python tools/load.py                          # 64 streams at once
    PYTHONPATH=bindings python tools/load.py --rate 10 --requests 100 # arrivals at random

The engine's own run reads its events in a bare loop. The server runs in a
process of its own, as it does in earnest; clients run in another. Both get prompts of random
tokens, no end tokens, greedy, and a fresh prefix cache. Rounds alternate, so that a machine that is
busy with other things disturbs both. python_us_per_token is CPU time of the server's main thread,
where all of its Python runs, whole requests included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import re
import select
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bindings"))

from llaisys.engine import Engine, Request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "refrain-mini"))
    parser.add_argument("--streams", type=int, default=64, help="at once, without --rate")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--new", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--rate", type=float, default=0, help="requests a second, Poisson")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of the engine")
    parser.add_argument("--max-seq", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"engine": [], "server": []}
    for number in range(args.rounds):
        load = make_load(args, seed=number)
        for name, run in (("engine", run_engine), ("server", run_server)):
            result = in_process(run, args, load)
            runs[name].append(result)
            if not args.json:
                print(name.ljust(8), describe(result), flush=True)
    summary = summarize(runs)
    print(json.dumps(summary) if args.json else "\n".join(tell(summary)))


Load = list[tuple[float, list[int]]]  # when, in seconds from the start, and the prompt


def make_load(args: argparse.Namespace, seed: int) -> Load:
    rng = random.Random(seed)
    at, load = 0.0, []
    for _ in range(args.requests):
        at += rng.expovariate(args.rate) if args.rate else 0.0
        load.append((at, [rng.randrange(300) for _ in range(args.prompt)]))
    return load


def in_process(run: Any, *arguments: Any) -> Any:
    """In a fresh process, so that no memory or thread is left of the run before."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(run, arguments)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"threads": args.threads, "max_seq": args.max_seq, "max_seqs": args.streams}


# ---- the engine alone ----


def run_engine(args: argparse.Namespace, load: Load) -> dict[str, float]:
    first: list[float] = []
    gaps: list[float] = []
    last: dict[int, float] = {}
    left = len(load)

    def sink(index: int) -> Any:
        def take(event: Any) -> None:
            nonlocal left
            now = time.perf_counter()
            if index in last:
                gaps.append((now - last[index]) / max(event.ntoken, 1))
            else:
                first.append(now - begun - max(load[index][0], started[index]))
            last[index] = now
            left -= event.finish != 0

        return take

    with Engine(args.model, **engine_options(args)) as engine:
        warm_up(engine)
        before = engine.stats()
        begun = time.perf_counter()
        started: dict[int, float] = {}
        sent = 0
        while left:
            now = time.perf_counter() - begun
            while sent < len(load) and sent - (len(load) - left) < args.streams:
                at, prompt = load[sent]
                if at > now:
                    break
                started[sent] = at if args.rate else time.perf_counter() - begun
                request = Request(prompt, args.new, ignore_eos=True, cache=False)
                engine.submit(request, sink(sent))
                sent += 1
            wait = 1.0
            if args.rate and sent < len(load):
                wait = max(0.0, load[sent][0] - (time.perf_counter() - begun))
            select.select([engine.fileno()], [], [], wait)
            while engine.poll():
                pass
        seconds = time.perf_counter() - begun
        after = engine.stats()
    steps = after["steps"] - before["steps"]
    result = result_of(seconds, len(load) * args.new, first, gaps)
    result["step_ms"] = 1000 * (after["step_s"] - before["step_s"]) / steps
    result["rows_per_step"] = (after["rows"] - before["rows"]) / steps
    return result


def warm_up(engine: Engine) -> None:
    engine.generate([[1, 2, 3]] * 4, 8, ignore_eos=True, cache=False)


# ---- the server, and clients ----


def run_server(args: argparse.Namespace, load: Load) -> dict[str, float]:
    with serving(args) as (process, port):
        asyncio.run(run_clients(args, load[: args.streams], port, 8))  # warm up
        before, counted = cpu_seconds(process.pid), counts(port)
        begun = time.perf_counter()
        first, gaps, events = asyncio.run(run_clients(args, load, port, args.new))
        seconds = time.perf_counter() - begun
        after = cpu_seconds(process.pid)
        steps, rows, step_s = (b - a for a, b in zip(counted, counts(port), strict=True))
    tokens = len(load) * args.new
    result = result_of(seconds, tokens, first, gaps)
    result["python_us_per_token"] = 1e6 * (after - before) / tokens
    result["tokens_per_event"] = tokens / max(events, 1)
    result["step_ms"], result["rows_per_step"] = 1000 * step_s / steps, rows / steps
    return result


def counts(port: int) -> list[float]:
    """The engine's steps, rows and seconds in steps since it was opened."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        text = response.read().decode()
    names = ("steps", "step_rows", "step_seconds")
    return [float(re.search(rf"^llaisys:{n}_total.* (\S+)$", text, re.MULTILINE)[1]) for n in names]


@contextlib.contextmanager
def serving(args: argparse.Namespace) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {name: value for name, value in engine_options(args).items() if value is not None}
    flags = [word for k, v in options.items() for word in ("--" + k.replace("_", "-"), str(v))]
    process = subprocess.Popen(
        [sys.executable, "-m", "llaisys", "serve", args.model, "--device", "cpu"]
        + ["--port", str(port), *flags],
        env=os.environ | {"PYTHONPATH": str(ROOT / "bindings")},
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as s:
                s.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                if b" 200 " in s.recv(100):
                    break
            time.sleep(0.05)
        yield process, port
    finally:
        process.terminate()
        process.wait()


async def run_clients(
    args: argparse.Namespace, load: Load, port: int, new: int
) -> tuple[list[float], list[float], int]:
    """Sends the load over raw sockets: a client library would cost more than the server."""
    first: list[float] = []
    gaps: list[float] = []
    events = 0
    slots = asyncio.Semaphore(args.streams)
    begun = time.perf_counter()

    async def ask(at: float, prompt: list[int]) -> None:
        nonlocal events
        if at and args.rate:
            await asyncio.sleep(at - (time.perf_counter() - begun))
        async with slots:
            body = json.dumps(
                {"prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
                | {"ignore_eos": True, "cache_salt": str(random.random())}
            ).encode()
            sent = time.perf_counter()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            writer.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            last, text = 0.0, b""
            while data := await reader.read(1 << 16):
                count = data.count(b'"text":')
                text = data
                if not count:
                    continue
                now = time.perf_counter()
                events += count
                if last:
                    gaps.append(now - last)
                else:
                    first.append(now - sent)
                last = now
            writer.close()
            assert b"[DONE]" in text, text[:500]

    await asyncio.gather(*(ask(at, prompt) for at, prompt in load))
    return first, gaps, events


def cpu_seconds(pid: int) -> float:
    """CPU time of the server's main thread: all of its Python runs there."""
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- figures ----


def result_of(
    seconds: float, tokens: int, first: list[float], gaps: list[float]
) -> dict[str, float]:
    first, gaps = sorted(first), sorted(gaps)

    def at(values: list[float], share: float) -> float:
        return 1000 * values[min(int(share * len(values)), len(values) - 1)] if values else 0.0

    return {
        "tokens_per_s": tokens / seconds,
        "ttft_p50_ms": at(first, 0.5),
        "ttft_p99_ms": at(first, 0.99),
        "gap_p50_ms": at(gaps, 0.5),
        "gap_p99_ms": at(gaps, 0.99),
    }


def describe(result: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.2f}" for name, value in result.items())


def summarize(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds."""
    return {
        name: {key: statistics.median(r[key] for r in results) for key in results[0]}
        for name, results in runs.items()
    }


def tell(summary: dict[str, dict[str, float]]) -> Iterator[str]:
    engine, server = summary["engine"], summary["server"]
    lost = 1 - server["tokens_per_s"] / engine["tokens_per_s"]
    yield (
        f"medians: engine {engine['tokens_per_s']:.0f} tokens/s, server "
        f"{server['tokens_per_s']:.0f}: {100 * lost:.1f}% less"
    )
    yield (
        f"steps of {engine['step_ms']:.2f} and {server['step_ms']:.2f} ms with "
        f"{engine['rows_per_step']:.1f} and {server['rows_per_step']:.1f} rows"
    )
    yield (
        f"TTFT p50 {engine['ttft_p50_ms']:.1f} and {server['ttft_p50_ms']:.1f} ms, "
        f"p99 {engine['ttft_p99_ms']:.1f} and {server['ttft_p99_ms']:.1f} ms"
    )
    yield (
        f"server's own thread: {server['python_us_per_token']:.1f} us a token, "
        f"{server['tokens_per_event']:.1f} tokens an event"
    )


if __name__ == "__main__":
    main()
