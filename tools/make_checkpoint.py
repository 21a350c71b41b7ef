"""Makes Qwen2 checkpoints of any shape with random weights, as transformers-format folders.

    python tools/make_checkpoint.py --shape deepseek-r1-distill-qwen-1.5b --out /tmp/r1-1.5b
    python tools/make_checkpoint.py --shape tiny --layers 3 --untied --dtype f32 --out /tmp/tiny

For benchmarks and tests that need a model's shape but not its knowledge. Weights are normally
distributed, different in every tensor, and scaled so that activations and logits stay of ordinary
size through any number of layers. A tensor's values follow from the seed and its name alone,
however the folder is sharded. Tensors are streamed to disk, so that a large model
takes little memory.
"""

import argparse
import json
import math
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, BinaryIO, NamedTuple

import numpy as np

CHUNK = 1 << 20  # values made and written at once; a multiple of 4, as one 64-bit draw makes four
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Shape:
    """The shape of a Qwen2-architecture model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool = False
    head_dim: int | None = None  # hidden / heads when not given
    theta: float = 1000000.0
    eps: float = 1e-6
    max_positions: int = 32768
    dtype: str = "bf16"
    bos: int = 151643
    eos: int = 151645

    @property
    def width(self) -> int:
        """The size of one head."""
        return self.head_dim or self.hidden // self.heads


SHAPES = {
    "tiny": Shape(128, 2, 4, 2, 352, 512, tied=True, theta=10000.0, max_positions=256),
    "qwen2-0.5b": Shape(896, 24, 14, 2, 4864, 151936, tied=True),
    "deepseek-r1-distill-qwen-1.5b": Shape(
        1536, 28, 12, 2, 8960, 151936, theta=10000.0, max_positions=131072, bos=151646, eos=151643
    ),
    "qwen2.5-7b": Shape(3584, 28, 28, 4, 18944, 152064),
    "qwen2.5-14b": Shape(5120, 48, 40, 8, 13824, 152064),
    "qwen2.5-32b": Shape(5120, 64, 40, 8, 27648, 152064),
}
DTYPES = {
    "bf16": ("BF16", "bfloat16", 2),
    "f16": ("F16", "float16", 2),
    "f32": ("F32", "float32", 4),
}


class TensorSpec(NamedTuple):
    """A tensor's name and shape, and the normal distribution of its values."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float

    @property
    def count(self) -> int:
        """The number of values."""
        return math.prod(self.shape)


def tensors(shape: Shape) -> Iterator[TensorSpec]:
    """Every tensor of the model, in the order of the file."""
    q, kv = shape.heads * shape.width, shape.kv_heads * shape.width
    hidden, ffn = shape.hidden, shape.ffn
    # Each layer adds two terms to the residual stream; so scaled, all of them add about one to its
    # variance.
    depth = 1 / math.sqrt(2 * shape.layers)
    # Logits of standard deviation two: the best of many stands out, and tied weights do not echo
    # the input.
    logits = 2 / math.sqrt(hidden)
    yield TensorSpec(
        "model.embed_tokens.weight", (shape.vocab, hidden), 0, logits if shape.tied else 1
    )
    for i in range(shape.layers):

        def spec(
            name: str,
            *dims: int,
            mean: float = 0,
            std: float | None = None,
            layer: str = f"model.layers.{i}.",
        ) -> TensorSpec:
            return TensorSpec(
                layer + name, dims, mean, 1 / math.sqrt(dims[-1]) if std is None else std
            )

        yield spec("input_layernorm.weight", hidden, mean=1, std=0.1)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            yield spec(f"self_attn.{name}_proj.weight", rows, hidden)
            yield spec(f"self_attn.{name}_proj.bias", rows, std=0.1)
        yield spec("self_attn.o_proj.weight", hidden, q, std=depth / math.sqrt(q))
        yield spec("post_attention_layernorm.weight", hidden, mean=1, std=0.1)
        yield spec("mlp.gate_proj.weight", ffn, hidden)
        yield spec("mlp.up_proj.weight", ffn, hidden)
        yield spec("mlp.down_proj.weight", hidden, ffn, std=2 * depth / math.sqrt(ffn))
    yield TensorSpec("model.norm.weight", (hidden,), 1, 0.1)
    if not shape.tied:
        yield TensorSpec("lm_head.weight", (shape.vocab, hidden), 0, logits)


@cache
def _quantiles() -> np.ndarray:
    """f64[65536]: the normal distribution cut into as many equally likely values."""
    normal, cells = NormalDist(), 1 << 16
    upper = np.array([normal.inv_cdf((i + 0.5) / cells) for i in range(cells // 2, cells)])
    return np.concatenate((-upper[::-1], upper))


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """Rounds f32 to the nearest bf16, ties to even; the result holds the bits as u16."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _table(mean: float, std: float, dtype: str) -> np.ndarray:
    """[65536]: what each 16 random bits stand for, in the file's data type."""
    values = (mean + std * _quantiles()).astype(np.float32)
    if dtype == "bf16":
        return _to_bf16(values)
    return values.astype(np.float16) if dtype == "f16" else values


def _write_tensor(file: BinaryIO, spec: TensorSpec, dtype: str, seed: int) -> None:
    """Streams one tensor's values: 16 random bits each, looked up in a table."""
    table = _table(spec.mean, spec.std, dtype)
    bits = np.random.SFC64([seed, zlib.crc32(spec.name.encode())])
    for start in range(0, spec.count, CHUNK):
        count = min(CHUNK, spec.count - start)
        file.write(table[bits.random_raw((count + 3) // 4).view(np.uint16)[:count]].data)


def _write_shard(path: Path, specs: list[TensorSpec], dtype: str, seed: int) -> None:
    """One safetensors file: header length u64, JSON header, then the tensors back to back."""
    code, _, size = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.count * size
        header[spec.name] = {"dtype": code, "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            _write_tensor(file, spec, dtype, seed)


def _bytes_of(size: int | str) -> int:
    """5GB, 200MB, 64KB, or a plain number of bytes."""
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3}
    text = str(size).strip().upper()
    try:
        unit = units.get(text[-2:])
        count = int(float(text[:-2]) * unit) if unit else int(text)
    except ValueError:
        count = 0
    if count <= 0:
        raise ValueError(f"shard size: expected something like 5GB or 100MB, found {size!r}")
    return count


def _shards(shape: Shape, limit: int) -> list[list[TensorSpec]]:
    """Tensors in order, cut into files of at most `limit` bytes or of one larger tensor."""
    shards: list[list[TensorSpec]] = [[]]
    used, size = 0, DTYPES[shape.dtype][2]
    for spec in tensors(shape):
        bytes_ = spec.count * size
        if shards[-1] and used + bytes_ > limit:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += bytes_
    return shards


def config_of(shape: Shape) -> dict[str, Any]:
    """The config.json, in the fields that transformers 4 wrote and transformers 5 reads."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": shape.bos,
        "eos_token_id": shape.eos,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.max_positions,
        "max_window_layers": shape.layers,
        "model_type": "qwen2",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": DTYPES[shape.dtype][1],
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab,
    }
    if shape.width * shape.heads != shape.hidden:
        config["head_dim"] = shape.width
    return config


def _check(shape: Shape) -> None:
    if shape.dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, found {shape.dtype!r}")
    for name in ("hidden", "layers", "heads", "kv_heads", "ffn", "vocab", "max_positions"):
        if getattr(shape, name) < 1:
            raise ValueError(f"{name}: expected at least 1, found {getattr(shape, name)}")
    if shape.heads % shape.kv_heads:
        raise ValueError(
            f"heads: expected a multiple of {shape.kv_heads} KV heads, found {shape.heads}"
        )
    if shape.head_dim is None and shape.hidden % shape.heads:
        raise ValueError(
            f"hidden: expected a multiple of {shape.heads} heads, found {shape.hidden}"
        )
    if shape.width % 2:
        raise ValueError(f"head_dim: expected an even number, found {shape.width}")


def make_checkpoint(
    path: str | Path,
    *,
    shape: str = "tiny",
    seed: int = 0,
    shard_size: int | str = "5GB",
    tokenizer: str | Path | None = None,
    **overrides: Any,
) -> Shape:
    """Writes a checkpoint folder and returns its shape; `overrides` are fields of Shape.

    Token ids of begin and end that lie outside a smaller vocabulary are moved to its end.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, found {shape!r}")
    model = replace(SHAPES[shape], **overrides)
    _check(model)
    model = replace(model, bos=min(model.bos, model.vocab - 1), eos=min(model.eos, model.vocab - 1))
    limit, path = _bytes_of(shard_size), Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for old in (*path.glob("model*.safetensors"), *path.glob("model.safetensors.index.json")):
        old.unlink()
    shards = _shards(model, limit)
    index: dict[str, str] = {}
    for number, specs in enumerate(shards, 1):
        name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        _write_shard(path / name, specs, model.dtype, seed)
        index.update({spec.name: name for spec in specs})
    total = sum(spec.count for spec in tensors(model)) * DTYPES[model.dtype][2]
    texts = {
        "config.json": config_of(model),
        "generation_config.json": {
            "bos_token_id": model.bos,
            "do_sample": False,
            "eos_token_id": model.eos,
        },
    }
    if len(shards) > 1:
        texts["model.safetensors.index.json"] = {
            "metadata": {"total_size": total},
            "weight_map": index,
        }
    for name, content in texts.items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n")
    if tokenizer is not None:
        copied = [
            shutil.copy(Path(tokenizer) / f, path)
            for f in TOKENIZER_FILES
            if (Path(tokenizer) / f).exists()
        ]
        if not copied:
            raise FileNotFoundError(
                f"tokenizer: expected tokenizer.json or the like in {tokenizer}"
            )
    return model


def main() -> None:
    """Make a Qwen2 checkpoint with random weights."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="the shape to start from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", default="5GB", help="largest file, as 5GB or 200MB")
    parser.add_argument("--tokenizer", type=Path, help="a folder to copy tokenizer files from")
    parser.add_argument("--dtype", choices=DTYPES)
    tied = parser.add_mutually_exclusive_group()
    tied.add_argument("--tied", action="store_true", default=None, help="lm_head is the embedding")
    tied.add_argument("--untied", action="store_false", dest="tied", help="lm_head of its own")
    kinds = {"theta": float, "eps": float}
    own = [f.name for f in fields(Shape)]
    for name in own:
        if name not in ("tied", "dtype"):
            parser.add_argument("--" + name.replace("_", "-"), type=kinds.get(name, int))
    args = parser.parse_args()
    overrides = {name: getattr(args, name) for name in own if getattr(args, name) is not None}
    try:
        made = make_checkpoint(
            args.out,
            shape=args.shape,
            seed=args.seed,
            shard_size=args.shard_size,
            tokenizer=args.tokenizer,
            **overrides,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    size = sum(spec.count for spec in tensors(made))
    print(json.dumps({"path": str(args.out), "parameters": size, **asdict(made)}))


if __name__ == "__main__":
    main()
