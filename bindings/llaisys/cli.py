"""The llaisys command: serve, chat, generate text, show a memory plan, run the benchmark.

    llaisys serve models/refrain-mini --port 8000
    llaisys chat models/refrain-mini
    llaisys generate models/refrain-mini --prompt "Who are you?"
    llaisys plan models/refrain-mini --svg --output plan.svg
    llaisys bench --help

Answers and plans go to standard output, everything else to standard error. An error is one line
that starts with "llaisys: error: "; the exit status is then 1, or 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import libllaisys
from .engine import plan as engine_plan
from .libllaisys import DataType, DeviceType, LlaisysError
from .models import Qwen2, plan
from .runtime import RuntimeAPI
from .serve import add_chat, add_serve

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

DEVICES = {"cpu": DeviceType.CPU, "nvidia": DeviceType.NVIDIA}
DTYPES = {"bf16": DataType.BF16, "f16": DataType.F16, "f32": DataType.F32}
REPOSITORY = Path(__file__).resolve().parents[2]
BENCH = "llaisys-bench"
# What a shell reports for a process that SIGINT or SIGPIPE has ended.
INTERRUPTED, BROKEN_PIPE = 130, 141


class UsageError(ValueError):
    """A command line that makes no sense."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv[:1] == ["bench"]:  # all that follows is the program's own, --help too
            _bench(argv[1:])
        args = _parser().parse_args(argv)
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads on. Python would try to flush once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except UsageError as error:
        return _report(error, 2)
    except OSError as error:
        return _report(f"{error.filename}: {error.strerror}" if error.filename else error, 1)
    except (LlaisysError, ValueError) as error:
        return _report(error, 1)
    return 0


def _report(error: object, status: int) -> int:
    print("llaisys: error:", " ".join(str(error).split()), file=sys.stderr)
    return status


# ---- generate ----


def _generate(args: argparse.Namespace) -> None:
    if args.raw and (args.messages or args.think):
        raise UsageError("--raw takes a text as it is: it goes with neither --messages nor --think")
    from .tokenizer import TextStream, Tokenizer  # not needed, and not cheap, elsewhere

    path = args.model or _default_model()
    tokenizer = Tokenizer(path)
    ids = _prompt_ids(args, tokenizer)
    begun = time.perf_counter()
    with Qwen2(path, progress=True, **_model_options(args)) as model:
        loaded = time.perf_counter()
        answer = model.stream(
            ids, args.max_new_tokens, args.top_k, args.top_p, args.temperature, seed=args.seed
        )
        text = TextStream(tokenizer)
        times = [loaded]
        for token in answer:
            times.append(time.perf_counter())
            print(text.push(token), end="", flush=True)
        print(text.flush(), flush=True)
    print(_stats(len(ids), loaded - begun, times), file=sys.stderr)


def _stats(prompt: int, load: float, times: list[float]) -> str:
    """One line, from the seconds at which the prompt went in and each token came out."""
    count = len(times) - 1
    line = (
        f"load {load:.2f} s, prompt {prompt} tokens, answer {count} tokens, "
        f"TTFT {1000 * (times[1] - times[0]):.1f} ms"
    )
    if count > 1:
        line += f", {(count - 1) / (times[-1] - times[1]):.1f} tokens/s"
    return line


def _prompt_ids(args: argparse.Namespace, tokenizer: Tokenizer) -> list[int]:
    if args.messages:
        messages = _read_messages(args.messages)
    else:
        prompt = _read_stdin() if args.prompt is None else args.prompt
        if args.raw:
            return tokenizer.encode(prompt)
        messages = [{"role": "user", "content": prompt}]
    variables = {"enable_thinking": True} if args.think else {}
    text = tokenizer.apply_chat_template(messages, **variables)
    return tokenizer.encode(text, add_special_tokens=False)


def _read_stdin() -> str:
    if sys.stdin.isatty():
        raise UsageError("expected --prompt TEXT, --messages FILE, or a prompt on standard input")
    return sys.stdin.read().rstrip("\n")


def _read_messages(file: str) -> Any:
    text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected a list of messages as JSON: {error}") from error


# ---- plan and bench ----


def _plan(args: argparse.Namespace) -> None:
    path = args.model or _default_model()
    options = _model_options(args) | {"format": args.format}
    sizes = {"max_seqs": args.max_seqs, "kv_tokens": args.kv_tokens}
    if sizes == {"max_seqs": None, "kv_tokens": None}:
        text = plan(path, **options)
    else:
        text = engine_plan(path, **options, **sizes)
    text = text if text.endswith("\n") else text + "\n"
    if args.output is None:
        sys.stdout.write(text)
    else:
        Path(args.output).write_text(text, encoding="utf-8")


def _bench(argv: Sequence[str]) -> NoReturn:
    """Becomes the benchmark program, so that profilers see nothing else."""
    beside = Path(libllaisys.__file__).with_name(BENCH)
    built = REPOSITORY / "build" / BENCH
    found = next((str(p) for p in (beside, built) if os.access(p, os.X_OK)), shutil.which(BENCH))
    if found is None:
        raise ValueError(f"expected {BENCH} beside the library, as {built} or on PATH")
    os.execv(found, [found, *argv])


# ---- command line ----


def _default_model() -> Path:
    model = REPOSITORY / "models" / "refrain-mini"
    if not (model / "config.json").exists():
        raise UsageError("expected MODEL, a folder in transformers' format")
    return model


def _default_device() -> str:
    return "nvidia" if RuntimeAPI(DeviceType.NVIDIA).get_device_count() > 0 else "cpu"


def _model_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": DEVICES[args.device or _default_device()],
        "device_ids": args.device_ids,
        "max_seq": args.max_seq,
        "prefill_chunk": args.prefill_chunk,
        "threads": args.threads,
        "dtype": DTYPES[args.dtype] if args.dtype else None,
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="llaisys", description="Runs Qwen2-architecture language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="answer OpenAI's API over HTTP")
    _add_model(serve)
    add_serve(serve, _default_model, _model_options)

    chat = commands.add_parser("chat", help="talk to a model, or to a server")
    _add_model(chat)
    add_chat(chat, _default_model, _model_options)

    generate = commands.add_parser("generate", help="answer a prompt or a chat")
    _add_model(generate)
    source = generate.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="what to ask; else read from stdin")
    source.add_argument("--messages", metavar="FILE", help="a chat as JSON, or - for stdin")
    generate.add_argument("--raw", action="store_true", help="continue the text: no chat template")
    generate.add_argument("--think", action="store_true", help="have the model reason first")
    generate.add_argument("--max-new-tokens", type=int, metavar="N", help="length of the answer")
    generate.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy"
    )
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is off")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 is off")
    generate.add_argument("--seed", type=int, default=0, help="same seed, same answer")
    generate.set_defaults(run=_generate)

    planner = commands.add_parser("plan", help="show where every byte of memory goes")
    _add_model(planner)
    planner.add_argument(
        "--max-seqs", type=int, metavar="N", help="of an engine for N requests at once"
    )
    planner.add_argument(
        "--kv-tokens", type=int, metavar="N", help="of an engine with a KV cache of N tokens"
    )
    formats = planner.add_mutually_exclusive_group()
    for name in ("json", "svg"):
        formats.add_argument(
            f"--{name}", dest="format", action="store_const", const=name, help=f"print {name}"
        )
    planner.add_argument("--output", metavar="FILE", help="write there, not to standard output")
    planner.set_defaults(run=_plan, format="text")

    commands.add_parser("bench", help="time the engine; see llaisys bench --help", add_help=False)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a folder; else the repository's refrain-mini"
    )
    parser.add_argument("--device", choices=DEVICES, help="the default is a GPU, if there is one")
    parser.add_argument(
        "--device-ids", type=_ids, metavar="I,J,...", help="devices for tensor parallelism"
    )
    parser.add_argument("--max-seq", type=int, metavar="N", help="tokens of prompt and answer")
    parser.add_argument("--prefill-chunk", type=int, metavar="N", help="tokens computed at once")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--dtype", choices=DTYPES, help="the default is the checkpoint's")


def _ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
