"""The generator of dialogues, the maker of checkpoints, and the committed refrain-mini folder."""

import itertools
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import dialogues
import eval_mini
from make_checkpoint import SHAPES, make_checkpoint, tensors

MINI = ROOT / "models" / "refrain-mini"


def take(split: str, count: int, seed: int = 0) -> list[list[dialogues.Message]]:
    return list(itertools.islice(dialogues.generate(seed, split), count))


# The generator.


def test_generator_is_deterministic():
    assert take("train", 50) == take("train", 50)
    assert take("train", 50) != take("train", 50, seed=1)
    assert take("train", 50) != take("heldout", 50)
    with pytest.raises(ValueError, match="expected one of train, heldout"):
        next(dialogues.generate(0, "test"))


def test_dialogues_are_well_formed():
    topics, thoughts = set(), 0
    for dialogue in take("train", 2000):
        roles = [m["role"] for m in dialogue]
        if roles[0] == "system":
            roles = roles[1:]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(m["content"].strip() for m in dialogue)
        assert not any("reasoning" in m for m in dialogue[:-1])
        thoughts += "reasoning" in dialogue[-1]
        topics.update(m["topic"] for m in dialogue if m["role"] == "assistant")
    assert topics == {*dialogues.TOPICS, "telling", "remembering", "not-told"}
    assert 0.15 < thoughts / 2000 < 0.35


def asked(split: str, count: int) -> dict[str, set[str]]:
    """The questions of each topic; what is remembered counts together with what was told."""
    found: dict[str, set[str]] = {}
    for dialogue in take(split, count):
        told = ""
        for user, assistant in itertools.pairwise(dialogue):
            if assistant["role"] != "assistant":
                continue
            text = user["content"].lower().rstrip("?.!？。！ ")
            if assistant["topic"] == "telling":
                told += text + "; "
            if assistant["topic"] == "remembering":
                text = told + text
            found.setdefault(assistant["topic"], set()).add(text)
    return found


def test_heldout_questions_are_not_in_training():
    train, heldout = asked("train", 8000), asked("heldout", 3000)
    for topic, questions in heldout.items():
        assert not questions & train[topic], topic
        assert len(questions) > 10, topic


def test_heldout_sums_are_in_no_phrasing_of_training():
    def lines(split: str, sign: str) -> set[tuple[int, int]]:
        answers = [
            m["content"] for d in take(split, 2500) for m in d if m.get("topic") == "arithmetic"
        ]
        sums = [a.split(" = ")[0].split(f" {sign} ") for a in answers if f" {sign} " in a]
        return {(int(a), int(b)) for a, b in sums}

    for sign in "+-":
        assert not lines("train", sign) & lines("heldout", sign), sign
    mirrored = {(b, a) for a, b in lines("heldout", "+")}
    assert not lines("train", "+") & mirrored


def test_arithmetic_and_its_thoughts_are_right():
    count = 0
    for message in itertools.chain.from_iterable(take("train", 3000)):
        if message.get("topic") != "arithmetic":
            continue
        left, right = message["content"].rstrip(".。").split(" = ")
        a, sign, b = left.split()
        assert int(right) == {"+": int.__add__, "-": int.__sub__, "×": int.__mul__}[sign](
            int(a), int(b)
        )
        if sign != "×" and "reasoning" in message:
            tens = message["reasoning"].rstrip(".。").split(" = ")[-1]
            assert int(tens) == int(right) // 10
            count += 1
    assert count > 50


# The evaluation.


class Letters:
    """A tokenizer of code points, with the prompt's think flag as its only template."""

    def apply_chat_template(self, messages, enable_thinking, **_):
        return json.dumps([messages, enable_thinking])

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids, **_):
        return "".join(map(chr, ids))


def test_evaluate_wants_the_exact_answer_and_its_end():
    questions = eval_mini.questions(60, seed=3)
    right = {json.dumps([q.messages, q.thinking]): q for q in questions}
    assert len(right) == 60 and any(q.thinking for q in questions)

    def reply(suffix):
        def generate(ids, max_new_tokens):
            question = right["".join(map(chr, ids))]
            thought = "Hm.\n</think>\n\n" if question.thinking else ""
            return ids + [ord(c) for c in thought + question.answer + suffix]

        return generate

    assert eval_mini.evaluate(reply("<|im_end|>"), Letters(), questions).accuracy == 1
    assert eval_mini.evaluate(reply(""), Letters(), questions).accuracy == 0
    report = eval_mini.evaluate(reply(" <|im_end|>"), Letters(), questions)
    assert report.accuracy == 0 and report.groups()["(plain)"][0] == 0


# The maker of checkpoints.


def weights(folder: Path) -> dict:
    from safetensors.numpy import load_file

    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_loads_in_transformers(tmp_path, dtype, tied):
    import torch
    from transformers import AutoModelForCausalLM

    shape = make_checkpoint(tmp_path, dtype=dtype, tied=tied, head_dim=64, theta=5000.0, eps=1e-5)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="auto", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (
        model.dtype == {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[dtype]
    )
    config = model.config
    assert config.rms_norm_eps == 1e-5 and config.tie_word_embeddings == tied
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    assert rope["rope_theta"] == 5000.0
    stored = sum(spec.count for spec in tensors(shape))
    assert stored == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        logits = model(torch.arange(64)[None] * 7 % shape.vocab).logits[0].float()
    assert torch.isfinite(logits).all() and 0.5 < logits.std() < 8
    best = logits.topk(2).values
    assert (best[:, 0] > best[:, 1]).float().mean() > 0.8


def test_checkpoint_does_not_depend_on_shards(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    one, many, other = tmp_path / "one", tmp_path / "many", tmp_path / "other"
    make_checkpoint(one, dtype="f32", seed=7)
    make_checkpoint(many, dtype="f32", seed=7, shard_size="300KB")
    make_checkpoint(other, dtype="f32", seed=8)
    assert len(list(many.glob("*.safetensors"))) > 3 and not (many / "model.safetensors").exists()
    a, b, c = weights(one), weights(many), weights(other)
    assert a.keys() == b.keys() == c.keys()
    assert all((a[k] == b[k]).all() for k in a)
    assert all((a[k] != c[k]).mean() > 0.9 for k in a)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in a.values())
    assert set(index["weight_map"]) == set(a)
    loaded = [AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (one, many)]
    assert all(torch.equal(loaded[0][k], loaded[1][k]) for k in loaded[0])
    make_checkpoint(many, dtype="f32", seed=7)  # a second run leaves no file of the first
    assert (many / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
    assert not list(many.glob("*-of-*"))


def test_checkpoint_values_are_random_and_distinct(tmp_path):
    make_checkpoint(tmp_path, dtype="f32", hidden=256, layers=3, vocab=1000)
    values = weights(tmp_path)
    heads = {tuple(v.ravel()[:8]) for v in values.values()}
    assert len(heads) == len(values)
    for name, value in values.items():
        mean, spread = (1, 0.1) if "norm" in name else (0, value.std())
        assert value.std() > 0 and abs(value.mean() - mean) < 0.2 * max(spread, 0.1), name
        if value.ndim == 2:
            assert value.shape[0] == len({row[:4].tobytes() for row in value}), name


def test_checkpoint_rejects_impossible_shapes(tmp_path):
    for fields, message in (
        ({"heads": 3}, "multiple of 2 KV heads"),
        ({"dtype": "f8"}, "dtype"),
        ({"layers": 0}, "at least 1"),
        ({"shape": "qwen3"}, "expected one of"),
        ({"shard_size": "much"}, "shard size"),
    ):
        with pytest.raises(ValueError, match=message):
            make_checkpoint(tmp_path / "x", **fields)


def test_named_shapes_have_the_published_sizes():
    millions = {n: sum(s.count for s in tensors(shape)) / 1e6 for n, shape in SHAPES.items()}
    assert round(millions["qwen2-0.5b"]) == 494
    assert round(millions["deepseek-r1-distill-qwen-1.5b"]) == 1777
    assert round(millions["qwen2.5-7b"]) == 7616
    assert round(millions["qwen2.5-14b"]) == 14770
    assert round(millions["qwen2.5-32b"]) == 32764


# The committed folder.


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MINI)


def test_mini_folder_is_small_and_complete():
    files = {p.name: p.stat().st_size for p in MINI.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    } <= files.keys()
    assert sum(files.values()) <= 10 * 10**6


def test_mini_config():
    config = json.loads((MINI / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["torch_dtype"] == "bfloat16"
    assert config["hidden_size"] // config["num_attention_heads"] == 64
    assert config["num_attention_heads"] > config["num_key_value_heads"]
    assert config["tie_word_embeddings"] and config["rope_theta"] == 10000.0
    generation = json.loads((MINI / "generation_config.json").read_text())
    assert generation["eos_token_id"][0] == config["eos_token_id"]


def test_template_plain_and_thinking(tokenizer):
    def render(messages, **kwargs):
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)

    user = {"role": "user", "content": "Hi"}
    asked = "<|im_start|>user\nHi<|im_end|>\n"
    assert render([user]) == asked
    prompt = asked + "<|im_start|>assistant\n"
    assert render([user], add_generation_prompt=True) == prompt
    assert render([user], add_generation_prompt=True, enable_thinking=False) == prompt
    assert render([user], add_generation_prompt=True, enable_thinking=True) == prompt + "<think>\n"
    system = {"role": "system", "content": "Be brief."}
    assert render([system, user]) == "<|im_start|>system\nBe brief.<|im_end|>\n" + asked
    for content in ("Yes.", "<think>\nHm.\n</think>\n\nYes.", "Hm.\n</think>\n\nYes."):
        history = [user, {"role": "assistant", "content": content}, user]
        assert render(history) == prompt + "Yes.<|im_end|>\n" + asked


def test_tokenizer_round_trip_and_marks(tokenizer):
    for text in (
        "Hello, 42 + 17 = 59.",
        "你是谁？我叫 Refrain。",
        "naïve 🎵\n\n  tabs\tend ",
        "I'm l-i-n",
    ):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("1234", add_special_tokens=False)["input_ids"]) == 4
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    ids = tokenizer("".join(marks), add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == marks
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think></think>"
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_training_renders_as_the_template_does(tokenizer):
    from train_mini import IGNORE, Encoder, render

    encoder = Encoder(tokenizer.backend_tokenizer)
    for dialogue in take("train", 100):
        last = dict(dialogue[-1])
        thinking = "reasoning" in last
        prompt = tokenizer.apply_chat_template(
            dialogue[:-1], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        thought = f"{last['reasoning']}\n</think>\n\n" if thinking else ""
        answer = f"{thought}{last['content']}<|im_end|>"
        assert render(dialogue) == prompt + answer + "\n"
        ((ids, labels),) = encoder([dialogue])
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert ids[: len(prompt_ids)].tolist() == prompt_ids
        learned = [int(i) for i in labels if i != IGNORE]
        assert "".join(tokenizer.decode(learned)).endswith(answer)
        assert (labels[: len(prompt_ids)] != IGNORE).sum() + len(
            tokenizer(answer, add_special_tokens=False)["input_ids"]
        ) == len(learned)


def test_mini_answers_heldout_questions_through_the_engine(tokenizer):
    """At least 95 % of 1000 held-out questions, to the letter, greedily, by this engine."""
    generate = eval_mini.llaisys_generate(MINI)
    report = eval_mini.evaluate(generate, tokenizer, eval_mini.questions(1000, seed=0))
    assert report.accuracy >= 0.95, report.accuracy


def test_mini_generates_and_thinks(tokenizer):
    generate = eval_mini.transformers_generate(MINI, threads=2)
    for thinking in (False, True):
        messages = [{"role": "user", "content": "What day comes after Monday?"}]
        asked = [eval_mini.Question("day", messages, thinking, "Tuesday.")]
        report = eval_mini.evaluate(generate, tokenizer, asked)
        assert report.accuracy == 1, report.outcomes
        assert ("</think>" in report.outcomes[0].reply) == thinking
