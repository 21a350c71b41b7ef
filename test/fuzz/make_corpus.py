#!/usr/bin/env python3
"""Writes the seed corpora of the fuzzers: small files, valid (ok-*) and hostile (bad-*), next to this script."""

import json
import struct
from pathlib import Path

HERE = Path(__file__).resolve().parent


def image(header, data=b"", length=None):
    """A safetensors file; header is a dict or the text itself."""
    text = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    )
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


W = tensor("F32", [2, 3], 0, 24)
SAFETENSORS = {
    "ok-two": image(
        {"__metadata__": {"format": "pt"}, "w": W, "b": tensor("BF16", [4], 24, 32)}, bytes(32)
    ),
    "ok-empty": image({}),
    "ok-scalar-and-none": image(
        {"s": tensor("I64", [], 0, 8), "none": tensor("F16", [0, 5], 8, 8)}, bytes(8)
    ),
    "ok-spaces": image(b' \t{"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}  ', b"x"),
    "ok-names": image(
        rb'{"\u00e9\ud83d\ude00 '
        + "\u20ac".encode()
        + rb'":{"dtype":"F8_E4M3","shape":[2,1,1],"data_offsets":[0,2]}}',
        b"xy",
    ),
    "bad-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3087467144\n",
    "bad-short": b"\x02\0\0",
    "bad-length": image({}, length=2**63),
    "bad-partial": image({"w": W}, bytes(20)),
    "bad-trailing": image({"w": W}, bytes(25)),
    "bad-hole": image({"a": tensor("U8", [1], 0, 1), "b": tensor("U8", [1], 2, 3)}, bytes(3)),
    "bad-overlap": image({"a": tensor("U8", [2], 0, 2), "b": tensor("U8", [2], 1, 3)}, bytes(3)),
    "bad-backwards": image({"a": tensor("U8", [2], 2, 0)}, bytes(2)),
    "bad-offsets": image(
        {"a": tensor("U8", [1], -1, 0.5), "b": tensor("U8", [1], 2**53, 2**64)}, bytes(2)
    ),
    "bad-overflow": image({"w": tensor("U8", [4194305, 4194305, 211106198978564], 0, 1)}, bytes(1)),
    "bad-dtype": image({"w": tensor("F7", [1], 0, 1)}, bytes(1)),
    "bad-twice": image(b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":{}}'),
    "bad-metadata": image({"__metadata__": {"format": 1}}),
    "bad-utf8": image(b'{"\xed\xa0\x80":1}'),
    "bad-deep": image(b'{"w":' + b"[" * 100),
    "bad-dims": image({"w": tensor("U8", [1] * 9, 0, 1)}, bytes(1)),
}

BASE = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 1000,
}


def config(**more):
    return json.dumps({**BASE, **more}).encode()


ROPE = {"rope_type": "default", "rope_theta": 1e6}
FULL = ["full_attention"] * 2
CONFIG = {
    "ok-least": config(),
    "ok-v4": config(
        torch_dtype="bfloat16",
        rope_theta=10000,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        use_sliding_window=False,
        sliding_window=16,
        max_window_layers=1,
        eos_token_id=7,
        hidden_act="silu",
        rope_scaling=None,
        max_position_embeddings=512,
    ),
    "ok-v5": config(
        dtype="float16", rope_parameters=ROPE, layer_types=FULL, head_dim=32, eos_token_id=[7, 8]
    ),
    "ok-generation": b'{"do_sample": true, "eos_token_id": [1, 2], "temperature": 0.6, "top_p": 0.95}',
    "bad-yarn": config(rope_scaling={"type": "yarn", "factor": 4.0}),
    "bad-slides": config(use_sliding_window=True, sliding_window=16, max_window_layers=0),
    "bad-layers": config(layer_types=["full_attention", "sliding_attention"]),
    "bad-quantized": config(quantization_config={"quant_method": "awq", "bits": 4}),
    "bad-eos": config(eos_token_id=[1, -1, 1000, 1.5, None]),
    "bad-zero": config(hidden_size=0),
    "bad-huge": config(vocab_size=2**64, rms_norm_eps=1e-60, rope_theta=-1.5),
    "bad-type": config(model_type="llama"),
    "bad-twice": config()[:-1] + b', "hidden_size": 128}',
    "bad-cut": config()[:-9],
    "bad-text": b'\xef\xbb\xbf{"\\ud800": 01, }',
    "bad-lfs": b"version https://git-lfs.github.com/spec/v1\n",
}


def main():
    for folder, files in (("safetensors", SAFETENSORS), ("config", CONFIG)):
        out = HERE / "corpus" / folder
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (out / name).write_bytes(data)
        print(f"{out}: {len(files)} files")


if __name__ == "__main__":
    main()
