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
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from dialogues import Message, generate
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
    source = itertools.islice(generate(seed, "train"), dialogues)
    texts = (
        m["role"] + "\n" + m["content"] + "\n" + m.get("reasoning", "")
        for messages in source
        for m in messages
    )
    tokenizer.train_from_iterator(texts, trainer)
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


def batches(
    encoder: Encoder, seed: int, split: str, tokens: int, longest: int, pool: int = 3000
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of ids and labels i64[rows, length], rows of like length, `tokens` in all."""
    source, rng = generate(seed, split), random.Random(seed)
    pad = encoder.tokenizer.token_to_id(END_OF_TEXT)
    while True:
        rows = encoder(list(itertools.islice(source, pool)))
        rows = sorted((row for row in rows if len(row[0]) <= longest), key=lambda row: len(row[0]))
        groups, group = [], []
        for row in rows:
            if group and (len(group) + 1) * len(row[0]) > tokens:
                groups.append(group)
                group = []
            group.append(row)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            ids = np.full((len(group), width), pad, dtype=np.int64)
            labels = np.full((len(group), width), IGNORE, dtype=np.int64)
            for i, (row_ids, row_labels) in enumerate(group):
                ids[i, : len(row_ids)] = row_ids
                labels[i, : len(row_ids)] = row_labels
            yield torch.from_numpy(ids), torch.from_numpy(labels)


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


def turn_accuracy(model: Qwen2ForCausalLM, encoder: Encoder, seed: int, dialogues: int) -> float:
    """The share of held-out dialogues with every answer exact, each given the right history."""
    wrong, total = 0, 0
    with torch.no_grad():
        for ids, labels in batches(encoder, seed, "heldout", 8192, 1024, dialogues):
            logits, targets, rows = answer_logits(model, ids, labels)
            wrong += len(torch.unique(rows[logits.argmax(-1) != targets]))
            total += len(ids)
            if total > dialogues * 0.7:
                return 1 - wrong / total
    raise AssertionError("unreachable: batches never end")


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
    source = batches(
        encoder, args.seed, "train", args.batch_tokens, model.config.max_position_embeddings
    )
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
            exact = turn_accuracy(model, encoder, args.seed + 1, 400)
            spent = time.monotonic() - begun
            print(
                f"step {step + 1:5d}  loss {mean:.4f}  held-out dialogues exact {exact:6.1%}  "
                f"{seen / 1e6:.2f} M tokens  {spent:.0f} s",
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
    parser.add_argument("--vocab", type=int, default=1536)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--ffn", type=int, default=768)
    parser.add_argument("--max-positions", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-tokens", type=int, default=6144)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument(
        "--decay", type=float, default=0.6, help="share of the steps that decay the rate"
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
