"""llaisys-bench serve: workloads replayed through the engine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bindings")]

import llaisys

MINI = ROOT / "models" / "refrain-mini"
SMALL = ("--requests", 12, "--input", 40, "--output", 10, "--max-seqs", 4)


def bench(*arguments, status=0):
    program = Path(llaisys.libllaisys.__file__).with_name("llaisys-bench")
    if not os.access(program, os.X_OK):
        pytest.skip(f"{program} is missing: run make")
    command = [program, "serve", "--model", MINI, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def report(*arguments):
    return json.loads(bench(*arguments, "--json"))


@pytest.mark.parametrize("workload", ["fixed", "poisson", "shared-prefix", "nano-vllm"])
def test_workloads(workload):
    options = {"nano-vllm": ("--requests", 12, "--shrink", 20), "poisson": (*SMALL, "--rate", 300)}
    arguments = ("--workload", workload, *options.get(workload, SMALL))
    found = report(*arguments)
    assert found["workload"] == workload
    assert found["requests"] == 12
    if workload != "nano-vllm":
        assert found["output_tokens"] == 120
    for name in ("ttft_ms", "inter_token_ms", "request_ms"):
        spread = found[name]
        assert 0 <= spread["p50"] <= spread["p90"] <= spread["p99"] <= spread["max"]
    assert found["output_tokens_per_s"] == pytest.approx(
        found["output_tokens"] / found["wall_s"], rel=1e-3
    )
    assert 0 <= found["idle_share"] < 1
    assert found["steps"] > 0
    if workload == "shared-prefix":
        assert found["cache_hit_rate"] > 0.5
    else:
        assert found["cache_hit_rate"] < 0.1


def test_answers_do_not_depend_on_how_they_are_served():
    workload = ("--workload", "shared-prefix", "--prefix", 70, "--temperature", 1.5, *SMALL[:6])
    hashes = {
        report(*workload, *options)["hash"]
        for options in (
            (),
            ("--no-cache",),
            ("--max-seqs", 1),
            ("--max-seqs", 3, "--prefill-chunk", 7, "--kv-block", 4),
            ("--kv-tokens", 140, "--max-seqs", 6),
            ("--rate", 200, "--threads", 1),
        )
    }
    assert len(hashes) == 1
    assert report(*workload, "--seed", 2)["hash"] not in hashes


def test_text_and_picture(tmp_path):
    picture = tmp_path / "run.svg"
    text = bench(*SMALL, "--svg", picture)
    for word in ("output tokens/s", "TTFT", "host", "cache"):
        assert word in text
    bars = ElementTree.parse(picture).getroot().iter("{http://www.w3.org/2000/svg}rect")
    assert len(list(bars)) > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nonsense",), "unknown option --nonsense"),
        (("--requests", "-1"), "--requests -1: expected a positive number"),
        (("--rate", "x"), "--rate x: expected a number"),
        (("--workload", "x"), "--workload x: expected fixed, poisson"),
        (("--input", 1020, "--output", 5), "1025 tokens.* 1024"),
        (("--input",), "--input needs a value"),
    ],
)
def test_refusals(arguments, message):
    assert re.search(message, bench(*arguments, status=1))
