"""Scores a model on held-out questions of the dialogue generator: exact match, greedy decoding.

    python tools/eval_mini.py --model models/refrain-mini --count 1000
    python tools/eval_mini.py --engine llaisys

An answer is right when the model writes it to the letter and then ends its turn. In thinking mode
the thought is free, the answer after </think> is not. `evaluate` takes any function that continues
token ids, so that an engine's test can pass its own.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dialogues import Message, generate

# Continues a prompt greedily: (prompt ids, most new tokens) -> prompt ids and new ids.
Generate = Callable[[list[int], int], list[int]]
END_OF_TURN, END_THINK = "<|im_end|>", "</think>"


class Question(NamedTuple):
    """A held-out question in its context."""

    topic: str
    messages: list[Message]  # the last is the user's
    thinking: bool
    answer: str


class Outcome(NamedTuple):
    """What the model made of a question."""

    question: Question
    reply: str
    exact: bool


@dataclass
class Report:
    """All outcomes, with their sums."""

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    new_tokens: int = 0

    @property
    def accuracy(self) -> float:
        """The share of exact answers."""
        return sum(o.exact for o in self.outcomes) / max(1, len(self.outcomes))

    def groups(self) -> dict[str, tuple[int, int]]:
        """(exact, asked) by topic, by mode, and of first and later turns."""
        exact, asked = Counter(), Counter()
        for outcome in self.outcomes:
            question = outcome.question
            turns = sum(m["role"] == "user" for m in question.messages)
            names = [
                question.topic,
                "(thinking)" if question.thinking else "(plain)",
                "(first turn)" if turns == 1 else "(later turn)",
            ]
            exact.update({name: int(outcome.exact) for name in names})
            asked.update(names)
        return {name: (exact[name], asked[name]) for name in sorted(asked)}

    def lines(self) -> list[str]:
        """The report as text."""
        rows = [
            f"{name:14} {exact:5} / {asked:5}  {exact / asked:7.2%}"
            for name, (exact, asked) in self.groups().items()
        ]
        right = sum(o.exact for o in self.outcomes)
        rows.append(f"{'all':14} {right:5} / {len(self.outcomes):5}  {self.accuracy:7.2%}")
        return rows


def questions(count: int, seed: int = 0) -> list[Question]:
    """Different held-out questions, each a random turn of a held-out dialogue of its own."""
    found: dict[str, Question] = {}
    rng = random.Random(seed)
    for dialogue in generate(seed, "heldout"):
        turns = [i for i, m in enumerate(dialogue) if m["role"] == "assistant"]
        last = rng.choice(turns)
        target = dialogue[last]
        context = [{"role": m["role"], "content": m["content"]} for m in dialogue[:last]]
        question = Question(target["topic"], context, "reasoning" in target, target["content"])
        found.setdefault(json.dumps([context, question.thinking]), question)
        if len(found) == count:
            return list(found.values())
    raise AssertionError("unreachable: the generator never ends")


def prompt_ids(tokenizer: Any, question: Question) -> list[int]:
    """The question as token ids, by the tokenizer's chat template."""
    text = tokenizer.apply_chat_template(
        question.messages,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=question.thinking,
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def evaluate(
    generate_ids: Generate, tokenizer: Any, asked: Sequence[Question], max_new_tokens: int = 192
) -> Report:
    """Ask every question and compare the answers to the letter."""
    report, start = Report(), time.monotonic()
    for question in asked:
        prompt = prompt_ids(tokenizer, question)
        new = list(generate_ids(prompt, max_new_tokens))[len(prompt) :]
        reply = tokenizer.decode(new, skip_special_tokens=False)
        answer = reply.split(END_THINK)[-1].lstrip("\n") if question.thinking else reply
        report.outcomes.append(Outcome(question, reply, answer == question.answer + END_OF_TURN))
        report.new_tokens += len(new)
    report.seconds = time.monotonic() - start
    return report


def transformers_generate(path: Path, threads: int) -> Generate:
    """Greedy decoding by transformers, in the checkpoint's own data type."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()

    def generate_ids(ids: list[int], max_new_tokens: int) -> list[int]:
        inputs = torch.tensor([ids])
        return model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )[0].tolist()

    return generate_ids


def llaisys_generate(path: Path) -> Generate:
    """Greedy decoding by our engine, on the CPU."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bindings"))
    import llaisys

    model = llaisys.models.Qwen2(str(path), llaisys.DeviceType.CPU)

    def generate_ids(ids: list[int], max_new_tokens: int) -> list[int]:
        return model.generate(ids, max_new_tokens=max_new_tokens, top_k=1)

    return generate_ids


def main() -> int:
    """Score a checkpoint on held-out questions; exit 1 when too few answers are exact."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/refrain-mini"))
    parser.add_argument("--engine", choices=("transformers", "llaisys"), default="transformers")
    parser.add_argument("--count", type=int, default=500, help="how many questions")
    parser.add_argument("--seed", type=int, default=0, help="which questions")
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--threads", type=int, default=2, help="of transformers")
    parser.add_argument("--at-least", type=float, default=0.0, help="the accuracy that is required")
    parser.add_argument(
        "--show-wrong", type=int, default=0, metavar="N", help="print N wrong answers"
    )
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.engine == "llaisys":
        generate_ids = llaisys_generate(args.model)
    else:
        generate_ids = transformers_generate(args.model, args.threads)
    report = evaluate(
        generate_ids, tokenizer, questions(args.count, args.seed), args.max_new_tokens
    )
    for outcome in [o for o in report.outcomes if not o.exact][: args.show_wrong]:
        question = outcome.question
        print(
            json.dumps(
                {
                    "topic": question.topic,
                    "thinking": question.thinking,
                    "asked": [m["content"] for m in question.messages][-5:],
                    "expected": question.answer,
                    "reply": outcome.reply,
                },
                ensure_ascii=False,
            )
        )
    print("\n".join(report.lines()))
    print(f"{report.new_tokens} tokens in {report.seconds:.1f} s")
    return int(report.accuracy < args.at_least)


if __name__ == "__main__":
    raise SystemExit(main())
