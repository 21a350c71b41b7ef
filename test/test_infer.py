"""The same question to transformers and to llaisys: the same tokens must come back.

    python test/test_infer.py --model DIR --test --device nvidia

Without --model, the repository's refrain-mini answers. --test makes both sides greedy and compares
the tokens; --profile prints the time to the first token and the tokens per second of both. As a
pytest module it does the same for several prompts.
"""

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import __version__ as transformers_version
from transformers.generation.streamers import BaseStreamer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / name) for name in ("bindings", "test")]

import llaisys
from test_utils import absence

MINI = ROOT / "models" / "refrain-mini"
DEVICES = {"cpu": llaisys.DeviceType.CPU, "nvidia": llaisys.DeviceType.NVIDIA}


class Answer(NamedTuple):
    """Token ids of prompt and answer, the length of the prompt, and seconds since the question."""

    tokens: list[int]
    prompt: int
    times: list[float]

    def speed(self) -> str:
        """Time to the first token, and the rate of those after it."""
        text = f"TTFT {1000 * self.times[0]:.1f} ms"
        if len(self.times) > 1:
            rate = (len(self.times) - 1) / (self.times[-1] - self.times[0])
            text += f", {rate:.1f} tokens/s"
        return text


class Clock(BaseStreamer):
    """Notes when each token comes; transformers streams the prompt first, as one piece."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.times: list[float] = []
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.times.append(time.perf_counter() - self.begun)
        self.prompt_seen = True

    def end(self) -> None:
        pass


def load_transformers(path: str | Path, device: str) -> Any:
    """The reference model in the checkpoint's data type."""
    dtype = "dtype" if int(transformers_version.split(".")[0]) >= 5 else "torch_dtype"
    model = AutoModelForCausalLM.from_pretrained(path, **{dtype: "auto"})
    return model.to("cuda" if device == "nvidia" else "cpu").eval()


def encode_chat(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a chat that starts with the prompt; transformers 5 returns them in a dict."""
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
    return list(ids if isinstance(ids, list) else ids["input_ids"])


def ask_transformers(model: Any, ids: list[int], args: argparse.Namespace) -> Answer:
    sampling = (
        {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        if args.test or args.top_k == 1
        else {
            "do_sample": True,
            "temperature": args.temperature,
            "top_k": args.top_k,
            "top_p": args.top_p,
        }
    )
    inputs = torch.tensor([ids], device=model.device)
    clock = Clock()
    with torch.no_grad():
        outputs = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=args.max_steps,
            repetition_penalty=1.0,  # some checkpoints ask for one: it is no part of the model
            streamer=clock,
            **sampling,
        )
    return Answer(outputs[0].tolist(), len(ids), clock.times)


def ask_llaisys(model: llaisys.models.Qwen2, ids: list[int], args: argparse.Namespace) -> Answer:
    times: list[float] = []
    begun = time.perf_counter()
    tokens = model.generate(
        ids,
        max_new_tokens=args.max_steps,
        top_k=1 if args.test else args.top_k,
        top_p=args.top_p,
        temperature=args.temperature,
        on_token=lambda _: times.append(time.perf_counter() - begun),
    )
    return Answer(tokens, len(ids), times)


def show(title: str, answer: Answer, tokenizer: Any, profile: bool) -> None:
    print(f"\n=== {title} ===\n\nTokens:\n{answer.tokens}\n")
    print(f"Contents:\n{tokenizer.decode(answer.tokens, skip_special_tokens=True)}\n")
    print(f"Time elapsed: {answer.times[-1]:.2f}s")
    if profile:
        print(answer.speed())


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--model", default=MINI, help="a folder; the default is refrain-mini")
    parser.add_argument("--prompt", default="Who are you?")
    parser.add_argument("--max_steps", default=128, type=int)
    parser.add_argument("--top_p", default=0.8, type=float)
    parser.add_argument("--top_k", default=50, type=int)
    parser.add_argument("--temperature", default=1.0, type=float)
    parser.add_argument("--test", action="store_true", help="decode greedily and compare")
    parser.add_argument("--profile", action="store_true", help="print the speed of both")
    args = parser.parse_args(argv)
    if not Path(args.model).is_dir():
        parser.error(f"--model: expected a folder, found {args.model}")
    return args


def main() -> None:
    args = parse()
    sys.stdout.reconfigure(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = encode_chat(tokenizer, args.prompt)

    reference = load_transformers(args.model, args.device)
    expected = ask_transformers(reference, ids, args)
    show("Answer", expected, tokenizer, args.profile)
    del reference
    gc.collect()
    torch.cuda.empty_cache()

    with llaisys.models.Qwen2(args.model, DEVICES[args.device]) as model:
        found = ask_llaisys(model, ids, args)
    show("Your Result", found, tokenizer, args.profile)

    if args.test:
        assert found.tokens == expected.tokens
        print("\n\033[92mTest passed!\033[0m\n")


# ---- the same for pytest ----

PROMPTS = (
    "Who are you?",
    "你是谁？",
    "Hello",
    "What is 3 plus 4?",
    "What is the capital of France?",
    "The quick brown fox jumps over the lazy dog. " * 8,
)


@pytest.fixture(scope="module", params=DEVICES)
def both(request):
    """The tokenizer, transformers' model and ours, on one device."""
    if not (MINI / "config.json").exists():
        pytest.skip("models/refrain-mini is not there")
    if reason := absence(request.param):
        pytest.skip(reason)
    # The reference stays on the CPU: the assignment asks for the text of PyTorch's CPU version.
    reference = load_transformers(MINI, "cpu")
    with llaisys.models.Qwen2(MINI, DEVICES[request.param]) as model:
        yield AutoTokenizer.from_pretrained(MINI), reference, model


@pytest.mark.parametrize("prompt", PROMPTS)
def test_infer_equals_transformers(both, prompt):
    tokenizer, reference, model = both
    args = parse(["--test", "--max_steps", "64"])
    ids = encode_chat(tokenizer, prompt)
    expected = ask_transformers(reference, ids, args)
    found = ask_llaisys(model, ids, args)
    assert found.tokens == expected.tokens
    assert len(found.times) == len(found.tokens) - len(ids)


if __name__ == "__main__":
    main()
