"""The engine beside its peers, on one GPU in one call: DeepSeek-R1-Distill-Qwen-1.5B's shape, random weights, bf16.

    python profiles/peers.py [--batch 1 8] [--bench build/llaisys-bench] [--json FILE]
    python profiles/peers.py --llama-bench llama.cpp/build/bin/llama-bench --gguf r1-1.5b-bf16.gguf

Peers: transformers' eager generate; transformers' StaticCache with the decode step compiled whole (mode reduce-overhead, that is
CUDA graphs; tokens stay on the GPU); cuBLAS's products of the step alone, in a graph, nothing between them; for a prompt, cuBLAS's
products alone; llama.cpp, if it is there. Every result is printed as soon as it is there, a peer that fails or outlasts its time
says so and the rest goes on. Times are wall times over many tokens, ours too. No network is needed.
"""

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"hidden": 1536, "heads": 12, "kv_heads": 2, "ffn": 8960, "vocab": 151936}
results = []


FAILURES = (RuntimeError, ImportError, TypeError, AttributeError, ValueError, KeyError, OSError)


class Slow(Exception):
    pass


def slow(*_):
    raise Slow


def report(who, what, batch, ms, tokens, **more):
    results.append(
        {
            "who": who,
            "what": what,
            "batch": batch,
            "ms": ms,
            "tokens_per_s": tokens / ms * 1e3,
            **more,
        }
    )
    print(f"{who}, {what}, batch {batch}: {ms:.3f} ms", flush=True)


# ---- ours, and llama.cpp: programs of their own ----


def run(command, limit):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=limit, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr.strip() or done.returncode}")
    return json.loads(done.stdout)


def bench(o, limit, *options):
    common = ("--model" if o.tiny else "--shape", o.shape, "--device", o.device, "--json")
    return run((o.bench, *common, *options), limit)


def ours_decode(o, limit, batch):
    found = bench(o, limit, "--context", o.context, "--new", o.new, "--repeat", 1, "--batch", batch)
    decode = found["decode"]
    report("Refrain", "decode", batch, batch / decode["tokens_per_s"] * 1e3, batch,
           bytes=decode["bytes"], read_gbs=found["plain_read_gbs"])  # fmt: skip
    if "replay" in found:
        report("Refrain, its graph alone", "decode", batch, found["replay"]["ms"], batch)


def ours_prefill(o, limit):
    found = bench(o, limit, "--context", o.prompt, "--new", 4, "--repeat", 5)
    report("Refrain", f"prompt of {o.prompt}", 1, found["prefill"]["ms"], o.prompt)


def llama(o, limit, batch):
    """llama-bench's medians but for the first repetition, which captures its graphs."""
    if batch != 1:
        return
    common = (o.llama_bench, "-m", o.gguf, "-ngl", 99, "-fa", 1, "-r", 6, "-o", "json")
    decode = ("-p", 0, "-n", o.new, "-d", o.context)
    prompt = ("-p", o.prompt, "-n", 0, "-b", o.prompt, "-ub", o.prompt)
    prompt_name = f"prompt of {o.prompt}"
    for what, steps, tokens, options in (
        ("decode", o.new, 1, decode),
        (prompt_name, 1, o.prompt, prompt),
    ):
        (row,) = run((*common, *options), limit)
        if not row["gpu_info"]:
            raise RuntimeError("llama-bench found no GPU")
        ms = statistics.median(row["samples_ns"][1:]) / 1e6 / steps
        report("llama.cpp", what, 1, ms, tokens, build=row["build_commit"])


# ---- PyTorch's side ----


def sync(o):
    import torch

    if o.device == "nvidia":
        torch.cuda.synchronize()


def timed(o, work):
    """Milliseconds of work(), by the wall clock."""
    sync(o)
    start = time.perf_counter()
    work()
    sync(o)
    return (time.perf_counter() - start) * 1e3


def model_of(o):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if not hasattr(o, "model"):
        config = Qwen2Config(
            hidden_size=o.hidden, intermediate_size=o.ffn, num_hidden_layers=o.layers, num_attention_heads=o.heads,
            num_key_value_heads=o.kv_heads, vocab_size=o.vocab, max_position_embeddings=131072,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rms_norm_eps=1e-6, tie_word_embeddings=False,
            use_sliding_window=False, dtype=torch.bfloat16, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(o.torch_device):
            o.model = Qwen2ForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
        o.model.generation_config.eos_token_id = None
    return o.model


def prompt_ids(o, batch):
    import torch

    return torch.randint(0, o.vocab, (batch, o.context), device=o.torch_device)


def eager(o, limit, batch):
    model, ids = model_of(o), prompt_ids(o, batch)

    def generate(count):
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    generate(2)
    few, many, count = 2, 18, 16  # what the prompt costs is in both
    ms = min(timed(o, lambda: generate(many)) for _ in range(2)) - min(
        timed(o, lambda: generate(few)) for _ in range(2)
    )
    report("transformers, eager generate", "decode", batch, ms / count, batch)


def compiled(o, limit, batch):
    import torch
    from transformers import StaticCache

    model, ids = model_of(o), prompt_ids(o, batch)
    torch._dynamo.reset()
    room = o.context + o.new + 16
    with torch.no_grad():
        try:
            cache = StaticCache(config=model.config, max_cache_len=room)
        except TypeError:
            cache = StaticCache(
                model.config, batch, room, torch.device(o.torch_device), torch.bfloat16
            )
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        state = {"token": logits[:, -1].argmax(-1, keepdim=True), "position": o.context}
        places = torch.arange(room, device=o.torch_device)[:, None]

        def step(token, position):
            output = model(token, position_ids=position, past_key_values=cache, use_cache=True)
            return output.logits[:, -1].argmax(-1, keepdim=True)

        if o.device == "nvidia":
            fast = torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)
        else:
            fast = torch.compile(step, backend="eager", fullgraph=True, dynamic=False)

        def decode(count):
            for _ in range(count):
                torch.compiler.cudagraph_mark_step_begin()
                position = places[state["position"]][None].expand(batch, 1)
                state["token"] = fast(state["token"], position).clone()
                state["position"] += 1

        start = time.perf_counter()
        decode(4)  # compiles, warms up, records, replays
        sync(o)
        seconds = time.perf_counter() - start
        times = [timed(o, lambda: decode(o.new // 4)) / (o.new // 4) for _ in range(4)]
    report("transformers, StaticCache + torch.compile", "decode", batch, statistics.median(times), batch,
           compile_s=seconds)  # fmt: skip


def products(o, rows, with_head):
    """Milliseconds of cuBLAS's products of a step of that many rows, one after the other, in a graph."""
    import torch

    group = o.hidden // o.heads * o.kv_heads * 2
    shapes = [
        (o.hidden + group, o.hidden),
        (o.hidden, o.hidden),
        (2 * o.ffn, o.hidden),
        (o.hidden, o.ffn),
    ] * o.layers
    if with_head:
        shapes.append((o.vocab, o.hidden))
    on = {"device": o.torch_device, "dtype": torch.bfloat16}
    weights = [torch.randn(shape, **on) / shape[1] ** 0.5 for shape in shapes]
    x = {k: torch.randn((rows, k), **on) for k in {shape[1] for shape in shapes}}
    out = {n: torch.empty((rows, n), **on) for n in {shape[0] for shape in shapes}}

    def work():
        for w in weights:
            torch.mm(x[w.shape[1]], w.T, out=out[w.shape[0]])

    with torch.no_grad():
        work()
        if o.device == "nvidia":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                work()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work()
            work = graph.replay
            work()
        many = max(4, min(100, 400 // rows))
        return statistics.median(
            timed(o, lambda: [work() for _ in range(many)]) / many for _ in range(5)
        )


def cublas_decode(o, limit, batch):
    report("cuBLAS, the products alone", "decode", batch, products(o, batch, True), batch)


def cublas_prefill(o, limit):
    ms = products(o, o.prompt, False)
    report("cuBLAS, the products alone", f"prompt of {o.prompt}", 1, ms, o.prompt)


# ---- the table ----


def table():
    ours = {(r["what"], r["batch"]): r for r in results if r["who"] == "Refrain"}
    print(
        "\n| who | what | batch | ms | tokens/s | of the plain read | time, ours = 1 |\n|---|---|---|---|---|---|---|"
    )
    for r in sorted(results, key=lambda r: (r["what"], r["batch"])):
        mine = ours.get((r["what"], r["batch"]))
        limit = ""
        if mine and "bytes" in mine:
            limit = f"{mine['bytes'] / mine['read_gbs'] / r['ms'] / 1e4:.1f}%"
        ratio = f"{r['ms'] / mine['ms']:.2f}" if mine else ""
        print(
            f"| {r['who']} | {r['what']} | {r['batch']} | {r['ms']:.3f} | {r['tokens_per_s']:.0f} | {limit} | {ratio} |"
        )
    for r in results:
        mine = ours.get((r["what"], r["batch"]))
        if mine and "torch.compile" in r["who"]:
            factor = r["ms"] / mine["ms"]
            print(
                f"batch {r['batch']}: {factor:.2f} times the compiled static cache's speed (compiled in {r['compile_s']:.0f} s)"
            )
        if mine and "cuBLAS" in r["who"] and r["what"] != "decode":
            print(
                f"{r['what']}: {mine['ms'] / r['ms']:.2f} times the time of cuBLAS's products alone"
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--compile-batch",
        type=int,
        nargs="+",
        help="of torch.compile, which takes a minute each; default: --batch",
    )
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument(
        "--prompt", type=int, default=4096, help="tokens of the prompt that is timed by itself"
    )
    parser.add_argument(
        "--bench",
        type=Path,
        help="llaisys-bench (default: the one in build/ or beside the library)",
    )
    parser.add_argument("--limit", type=int, default=150, help="seconds a peer may take")
    parser.add_argument(
        "--only", nargs="+", choices=("ours", "cublas", "eager", "compiled", "llama")
    )
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--gguf", type=Path, help="the model for --llama-bench, bf16")
    parser.add_argument("--json", type=Path, help="write the results there, too")
    parser.add_argument(
        "--tiny", action="store_true", help="check this script: a tiny shape on the CPU"
    )
    o = parser.parse_args()
    o.device, o.torch_device, o.shape = "nvidia", "cuda", "deepseek-r1-distill-qwen-1.5b"
    o.layers = 28
    vars(o).update(SHAPE)
    if o.tiny:
        o.device = o.torch_device = "cpu"
        o.shape = ROOT / "models/refrain-mini"
        o.hidden, o.heads, o.kv_heads, o.ffn, o.vocab, o.layers = 256, 4, 2, 768, 2048, 4
    places = (ROOT / "build/llaisys-bench", ROOT / "bindings/llaisys/libllaisys/llaisys-bench")
    o.bench = o.bench or next((p for p in places if p.exists()), None)
    if not o.bench:
        sys.exit("llaisys-bench is missing: run make, or name it with --bench")
    if "llama" in (o.only or ()) and not o.llama_bench:
        sys.exit(
            "llama.cpp is missing: name its llama-bench with --llama-bench, and a model with --gguf"
        )
    signal.signal(signal.SIGALRM, slow)

    peers = [("ours", ours_decode, b) for b in o.batch] + [("ours", ours_prefill, None)]
    peers += [("cublas", cublas_decode, b) for b in o.batch] + [("cublas", cublas_prefill, None)]
    if o.llama_bench:
        peers += [("llama", llama, b) for b in o.batch]
    peers += [("eager", eager, b) for b in o.batch]
    peers += [("compiled", compiled, b) for b in o.compile_batch or o.batch]
    start = time.perf_counter()
    for name, peer, batch in peers:
        if o.only and name not in o.only:
            continue
        signal.alarm(o.limit)
        try:
            peer(o, o.limit, *(() if batch is None else (batch,)))
        except (Slow, subprocess.TimeoutExpired):
            print(f"{name}, batch {batch}: not done in {o.limit} s", flush=True)
        except FAILURES as error:  # one peer's is not the others'
            print(f"{name}, batch {batch}: failed: {type(error).__name__}: {error}", flush=True)
        finally:
            signal.alarm(0)
        if name == "cublas" and not o.tiny:
            import torch

            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
    table()
    print(f"{time.perf_counter() - start:.0f} s in all")
    if o.json:
        o.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
