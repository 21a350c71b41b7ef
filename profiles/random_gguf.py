"""A bf16 GGUF of DeepSeek-R1-Distill-Qwen-1.5B's shape with random weights, for llama.cpp's llama-bench.

    pip install gguf
    python profiles/random_gguf.py r1-1.5b-bf16.gguf     # 3.55 GB

Without a vocabulary ("no_vocab"): it is for timing only. Norms and biases are f32, as llama.cpp's converter writes them.
"""

import sys

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS, VOCAB = 1536, 12, 2, 8960, 28, 151936
BLOCK = 8388593  # random values that repeat; a prime, so that no two rows of a matrix are equal


def tensors():
    """Names and shapes, in the file's order."""
    kv = HIDDEN // HEADS * KV_HEADS
    yield "token_embd.weight", (VOCAB, HIDDEN)
    for i in range(LAYERS):
        for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv)):
            yield f"blk.{i}.attn_{name}.weight", (rows, HIDDEN)
            yield f"blk.{i}.attn_{name}.bias", (rows,)
        yield f"blk.{i}.attn_norm.weight", (HIDDEN,)
        yield f"blk.{i}.attn_output.weight", (HIDDEN, HIDDEN)
        yield f"blk.{i}.ffn_norm.weight", (HIDDEN,)
        yield f"blk.{i}.ffn_gate.weight", (FFN, HIDDEN)
        yield f"blk.{i}.ffn_up.weight", (FFN, HIDDEN)
        yield f"blk.{i}.ffn_down.weight", (HIDDEN, FFN)
    yield "output_norm.weight", (HIDDEN,)
    yield "output.weight", (VOCAB, HIDDEN)


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: random_gguf.py FILE")
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(BLOCK, dtype=np.float32) * np.float32(0.02)).view(np.uint32)
    block = (values + 0x7FFF + (values >> 16 & 1) >> 16).astype(np.uint16)  # bf16, to nearest even
    writer = gguf.GGUFWriter(sys.argv[1], "qwen2")
    writer.add_name("random-qwen2")
    writer.add_context_length(131072)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    types = {1: gguf.GGMLQuantizationType.F32, 2: gguf.GGMLQuantizationType.BF16}
    for name, shape in tensors():
        element = np.dtype(np.float32 if len(shape) == 1 else np.uint16)
        size = int(np.prod(shape)) * element.itemsize
        writer.add_tensor_info(name, shape, element, size, raw_dtype=types[len(shape)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in tensors():
        if len(shape) == 1:
            value = 1.0 if "norm" in name else 0.02
            writer.write_tensor_data(np.full(shape, value, np.float32))
        else:
            first = int(rng.integers(BLOCK))
            writer.write_tensor_data(np.resize(np.roll(block, first), shape))
    writer.close()


if __name__ == "__main__":
    main()
