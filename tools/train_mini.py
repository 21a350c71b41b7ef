"""Trains refrain-mini: a byte-level BPE tokenizer and a Qwen2 model of a few million weights.

    python tools/train_mini.py --out models/refrain-mini

Everything follows from the seed: the dialogues (tools/dialogues.py), the tokenizer, the first
weights and the order of the batches. Weights are f32 while training, and written as bf16.
"""

import argparse
import itertools
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import dialogue_facts as facts
import numpy as np
import torch
from dialogues import Message, generate
from eval_mini import Question, questions
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2Config, Qwen2ForCausalLM

END_OF_TEXT, IM_START, IM_END, THINK, END_THINK = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
)
SPECIAL = (END_OF_TEXT, IM_START, IM_END)  # left out of decoded text
MARKS = (THINK, END_THINK)  # kept in decoded text, as in the R1 models
# Qwen2's split: words with their leading space or mark, single digits, punctuation, line ends.
WORD_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- set content = message['content'] %}
    {%- if message['role'] == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}
"""
IGNORE = -100


def render(messages: list[Message]) -> str:
    """The text of a dialogue: as by the chat template, with the last answer's reasoning."""
    text = "".join(f"{IM_START}{m['role']}\n{m['content']}{IM_END}\n" for m in messages[:-1])
    last = messages[-1]
    thought = f"{THINK}\n{last['reasoning']}\n{END_THINK}\n\n" if "reasoning" in last else ""
    return f"{text}{IM_START}{last['role']}\n{thought}{last['content']}{IM_END}\n"


def tokenizer_texts(seed: int, dialogues: int) -> Iterator[str]:
    """What the tokenizer learns from.

    Remembered and repeated values are left out, so that names seen in training come in pieces just
    as unseen ones do, and copying is learned rather than a list of names. Every Chinese character
    is offered on its own, so that it becomes a token before longer pieces do.
    """
    copied = ("telling", "remembering", "repeat")
    for messages in itertools.islice(generate(seed, "train"), dialogues):
        for user, reply in itertools.pairwise(messages):
            if reply["role"] == "assistant" and reply["topic"] not in copied:
                yield f"{user['content']}\n{reply['content']}\n{reply.get('reasoning', '')}"
    for about in facts.MEMORY_EN + facts.MEMORY_ZH:
        for text in (*about.tells, about.reply, *about.asks, about.answer):
            yield from [text.format(v=" ")] * (dialogues // 100)
    for text in ("user\nassistant\nsystem\n", *facts.SYSTEMS, *facts.REPEAT_ASKS):
        yield from [text.format(v="")] * (dialogues // 20)
    tables = [v for v in vars(facts).values() if isinstance(v, tuple | dict)]
    characters = {c for c in str(tables) if "\u4e00" <= c <= "\u9fff"}
    for character in sorted(characters):
        yield from [character] * (dialogues // 20)


def train_tokenizer(seed: int, vocab_size: int, dialogues: int = 6000) -> Tokenizer:
    """A byte-level BPE tokenizer learned from training dialogues."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL + MARKS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(tokenizer_texts(seed, dialogues), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKS])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"tokenizer: expected {vocab_size} tokens, found {tokenizer.get_vocab_size()}"
        )
    return tokenizer


class Encoder:
    """Turns dialogues into token ids and labels."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.assistant = tokenizer.encode(f"{IM_START}assistant\n").ids
        self.end = tokenizer.token_to_id(IM_END)
        self.think = tokenizer.token_to_id(THINK)
        self.pad = tokenizer.token_to_id(END_OF_TEXT)

    def __call__(self, dialogues: list[list[Message]]) -> list[tuple[np.ndarray, np.ndarray]]:
        encodings = self.tokenizer.encode_batch([render(d) for d in dialogues])
        return [self._label(encoding.ids) for encoding in encodings]

    def _label(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and what to learn of them: the assistant's turns up to their <|im_end|>.

        An opening "<think>\\n" is not learned: it belongs to the prompt.
        """
        labels = np.full(len(ids), IGNORE, dtype=np.int64)
        header, length = self.assistant, len(self.assistant)
        i = 0
        while i < len(ids):
            if ids[i] != header[0] or ids[i : i + length] != header:
                i += 1
                continue
            i += length
            if ids[i] == self.think:
                i += 2
            stop = ids.index(self.end, i) + 1
            labels[i:stop] = ids[i:stop]
            i = stop
        return np.array(ids, dtype=np.int64), labels


def pad(rows: Sequence[tuple[np.ndarray, np.ndarray]], fill: int) -> tuple[torch.Tensor, ...]:
    """Ids and labels i64[rows, length], padded at the end."""
    width = max(len(ids) for ids, _ in rows)
    padded = [
        np.stack([np.pad(row[k], (0, width - len(row[0])), constant_values=value) for row in rows])
        for k, value in enumerate((fill, IGNORE))
    ]
    return tuple(torch.from_numpy(p) for p in padded)


def batches(
    encoder: Encoder, seed: int, tokens: int, longest: int, pool: int = 3000
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Endless batches of ids and labels i64[rows, length], rows of like length, `tokens` in all."""
    source, rng = generate(seed, "train"), random.Random(seed)
    while True:
        rows = encoder(list(itertools.islice(source, pool)))
        rows = sorted((row for row in rows if len(row[0]) <= longest), key=lambda row: len(row[0]))
        groups: list[list[tuple[np.ndarray, np.ndarray]]] = [[]]
        for row in rows:
            if (len(groups[-1]) + 1) * len(row[0]) > tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            yield pad(group, encoder.pad)


def answer_logits(
    model: Qwen2ForCausalLM, ids: torch.Tensor, labels: torch.Tensor, offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits f32[n, vocab] of the n learned tokens alone, their targets i64[n] and rows i64[n]."""
    positions = torch.arange(offset, offset + ids.shape[1])[None]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False)[0]
        rows, columns = torch.nonzero(labels[:, 1:] != IGNORE, as_tuple=True)
        logits = model.lm_head(hidden[rows, columns])
    return logits.float(), labels[rows, columns + 1], rows


def heldout_accuracy(
    model: Qwen2ForCausalLM, encoder: Encoder, asked: Sequence[Question]
) -> dict[str, float]:
    """The share of held-out questions that greedy decoding answers exactly, by topic and for "all".

    One forward pass over the right answer tells: it is exact if every token of it is the best one.
    """
    rows = []
    for question in asked:
        reply = {"role": "assistant", "content": question.answer, "topic": question.topic}
        ids, labels = encoder([[*question.messages, reply]])[0]
        labels[: np.flatnonzero(ids == encoder.assistant[0])[-1]] = IGNORE
        rows.append((ids, labels, question.topic))
    rows.sort(key=lambda row: len(row[0]))
    exact, total = Counter(), Counter()
    for start in range(0, len(rows), 32):
        group = rows[start : start + 32]
        ids, labels = pad([row[:2] for row in group], encoder.pad)
        with torch.no_grad():
            logits, targets, where = answer_logits(model, ids, labels)
        wrong = set(where[logits.argmax(-1) != targets].tolist())
        for i, (_, _, topic) in enumerate(group):
            exact.update({topic: i not in wrong, "all": i not in wrong})
            total.update((topic, "all"))
    return {topic: exact[topic] / total[topic] for topic in total}


def optimizers(model: Qwen2ForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embeddings, norms and biases."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(
            matrices, lr=lr, weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(model: Qwen2ForCausalLM, encoder: Encoder, args: argparse.Namespace) -> None:
    """Trains in place: a short warm-up, a constant rate, then a linear decay to zero."""
    steps = args.steps
    opts = optimizers(model, args.lr)
    longest = model.config.max_position_embeddings
    source = batches(encoder, args.seed, args.batch_tokens, longest)
    asked = [q for q in questions(600, args.seed) if not q.thinking]
    rng = random.Random(args.seed)
    begun, seen = time.monotonic(), 0
    mean = math.log(model.config.vocab_size)
    for step in range(steps):
        rate = args.lr * min((step + 1) / 40, 1.0, (steps - step) / (steps * args.decay))
        for group in itertools.chain.from_iterable(opt.param_groups for opt in opts):
            group["lr"] = rate
        ids, labels = next(source)
        offset = rng.randrange(model.config.max_position_embeddings - ids.shape[1] + 1)
        logits, targets, _ = answer_logits(model, ids, labels, offset)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        mean, seen = 0.97 * mean + 0.03 * loss.item(), seen + ids.numel()
        if (step + 1) % args.log_every == 0 or step + 1 == steps:
            exact = heldout_accuracy(model, encoder, asked)
            worst = sorted((share, topic) for topic, share in exact.items())[:4]
            print(
                f"step {step + 1:5d}  loss {mean:.4f}  held-out exact {exact['all']:6.1%}  "
                f"{seen / 1e6:.2f} M tokens  {time.monotonic() - begun:.0f} s  "
                f"({time.process_time():.0f} s of CPU)  "
                + ", ".join(f"{topic} {share:.0%}" for share, topic in worst),
                flush=True,
            )


def save(model: Qwen2ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Writes the folder that transformers and the engine read; weights as bf16."""
    out.mkdir(parents=True, exist_ok=True)
    end, pad = tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)
    config = model.config
    config.eos_token_id, config.bos_token_id, config.pad_token_id = end, None, pad
    saved = Qwen2ForCausalLM(config).to(torch.bfloat16)
    saved.load_state_dict(model.state_dict())
    saved.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    # Both spellings: transformers 5 writes dtype and rope_parameters, others read these.
    path = out / "config.json"
    fields = json.loads(path.read_text())
    fields.update(torch_dtype="bfloat16", rope_theta=10000.0)
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    generation = {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    added = {
        tokenizer.token_to_id(t): {
            "content": t,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": t in SPECIAL,
        }
        for t in SPECIAL + MARKS
    }
    tokenizer_config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): token for i, token in sorted(added.items())},
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": config.max_position_embeddings,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    (out / "tokenizer_config.json").write_text(
        json.dumps(tokenizer_config, indent=2, ensure_ascii=False) + "\n"
    )


def main() -> None:
    """Train refrain-mini and write it as a transformers folder."""
    parser = argparse.ArgumentParser(
        description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("models/refrain-mini"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--ffn", type=int, default=768)
    parser.add_argument("--max-positions", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-tokens", type=int, default=6144)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument(
        "--decay", type=float, default=0.7, help="share of the steps that decay the rate"
    )
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = train_tokenizer(args.seed, args.vocab)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=args.vocab,
            hidden_size=args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            intermediate_size=args.ffn,
            max_position_embeddings=args.max_positions,
            tie_word_embeddings=True,
            rms_norm_eps=1e-6,
            max_window_layers=args.layers,
        )
    )
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M weights", flush=True)
    train(model, Encoder(tokenizer), args)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
