"""Talks to a model for a moment: loads it, asks a few questions, streams the answers.

.venv/bin/python scripts/demo.py [--model DIR] [QUESTION ...]
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bindings"))

import llaisys
from llaisys.tokenizer import TextStream, Tokenizer

QUESTIONS = ["Who are you?", "How does this engine work?", "What is 7 + 5?", "你是谁？"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "refrain-mini"))
    parser.add_argument("questions", nargs="*", metavar="QUESTION")
    args = parser.parse_args()

    has_gpu = llaisys.RuntimeAPI(llaisys.DeviceType.NVIDIA).get_device_count() > 0
    device = llaisys.DeviceType.NVIDIA if has_gpu else llaisys.DeviceType.CPU
    start = time.perf_counter()
    tokenizer = Tokenizer(args.model)
    with llaisys.models.Qwen2(args.model, device, progress=True) as model:
        print(f"{args.model} on {device.name}, ready in {time.perf_counter() - start:.2f} s\n")
        for question in args.questions or QUESTIONS:
            ids = tokenizer.encode(
                tokenizer.apply_chat_template([{"role": "user", "content": question}]),
                add_special_tokens=False,
            )
            print(f"> {question}")
            text, times = TextStream(tokenizer), [time.perf_counter()]
            for token in model.stream(ids, 200):
                times.append(time.perf_counter())
                print(text.push(token), end="", flush=True)
            seconds = times[-1] - times[1]
            speed = f"{(len(times) - 2) / seconds:.0f} tokens/s" if seconds > 0 else "one token"
            first = 1000 * (times[1] - times[0])
            print(f"{text.flush()}\n  ({speed}, first token after {first:.1f} ms)\n")


if __name__ == "__main__":
    main()
