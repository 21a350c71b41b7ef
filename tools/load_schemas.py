#!/usr/bin/env python3
"""What masks cost: the streams that follow a schema, and the others beside them.

    PYTHONPATH=bindings python tools/load_schemas.py --threads 1

First at the engine's own API: a token that waits for nobody, one whose mask is set by the thread
that polls, and one whose mask a worker sets, as in the server. All masks allow everything, so that
only the way of a mask is measured. Then whole answers of the server, in milliseconds a token. All
free streams do the same work in each line; they should not notice the ones that follow a schema.
"""

from __future__ import annotations

import argparse
import json
import select
import statistics
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bindings"), str(Path(__file__).parent)]

from llaisys.engine import Engine, Request
from load import serving

SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string", "minLength": 100_000}},
    "required": ["text"],
    "additionalProperties": False,
}
FREE = {"ignore_eos": True}
MASKED = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "long", "schema": SCHEMA}}
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "refrain-mini"))
    parser.add_argument("--streams", type=int, default=32, help="free ones")
    parser.add_argument("--masked", type=int, default=8, help="that follow a schema beside them")
    parser.add_argument("--new", type=int, default=400, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of the engine")
    parser.add_argument("--max-seq", type=int)
    args = parser.parse_args()
    hops(args)
    room = argparse.Namespace(**vars(args) | {"streams": args.streams + args.masked})
    with serving(room) as (_, port):
        ask(port, [("free", FREE), ("masked", MASKED)], args.new)  # warm up
        for _ in range(args.rounds):
            n, m = args.streams, args.masked
            for title, jobs in (
                ("1 alone", [("free", FREE)]),
                ("1 alone", [("masked", MASKED)]),
                (f"{n}", [("free", FREE)] * n),
                (f"{n} + {m} free", [("free", FREE)] * n + [("others", FREE)] * m),
                (f"{n} + {m} masked", [("free", FREE)] * n + [("masked", MASKED)] * m),
            ):
                found = ask(port, jobs, args.new)
                times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in found.items())
                print(f"server, {title}: {times} a token")


def hops(args: argparse.Namespace) -> None:
    options: dict[str, Any] = {"threads": args.threads, "max_seq": args.max_seq, "max_seqs": 4}
    with Engine(args.model, **options) as engine, ThreadPoolExecutor(2) as pool:
        everything = b"\xff" * ((engine.meta.voc + 31) // 32 * 4)

        def run(way: str) -> float:
            """Microseconds a token."""
            number, count, moments = 0, 0, []

            def allow(index: int) -> None:
                engine.set_mask(number, index, everything)

            def take(event: Any) -> None:
                nonlocal count
                count += event.ntoken
                moments.append(time.perf_counter())
                if way == "inline" and not event.finish:
                    allow(count)
                elif way == "worker" and not event.finish:
                    pool.submit(allow, count)

            request = Request([1, 2, 3], args.new, constrained=way != "free", ignore_eos=True)
            number = engine.submit(request, take)
            if way != "free":
                allow(0)
            while count < args.new:
                select.select([engine.fileno()], [], [], 1)
                engine.poll()
            return 1e6 * (moments[-1] - moments[0]) / (args.new - 1)

        run("free")
        for _ in range(args.rounds):
            times = ", ".join(f"{way} {run(way):.0f}" for way in ("free", "inline", "worker"))
            print(f"engine, one stream, us a token: {times}")


def ask(port: int, jobs: list[tuple[str, dict[str, Any]]], new: int) -> dict[str, float]:
    """Answers all jobs at once; milliseconds a token, by name."""
    found: dict[str, list[float]] = {name: [] for name, _ in jobs}

    def one(name: str, options: dict[str, Any]) -> None:
        body = {"prompt": "Hello", "max_tokens": new, "temperature": 0} | options
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            timings = json.load(response)["timings"]
        found[name].append(timings["predicted_ms"] / (timings["predicted_n"] - 1))

    threads = [threading.Thread(target=one, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: statistics.mean(times) for name, times in found.items()}


if __name__ == "__main__":
    main()
