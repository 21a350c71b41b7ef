"""Compiles grammars where it does no harm: a process that its parent may end at any time.

A schema of a few bytes can take minutes to compile ({"multipleOf": 1234567}), or all memory, and a
thread that compiles cannot be stopped. So grammars from strangers are compiled here first. Run as a
program of its own, without this package: reads lines of JSON, first {"tokenizer", "vocab", "eos",
"limits"}, then strings, each a grammar; answers each with a line: null, or what is wrong with it.
"""

import ctypes
import json
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any

MEMORY = 512 << 20  # bytes of address space that grammars may take

PR_SET_PDEATHSIG = 1

__all__ = ["check", "explain", "make_tokenizer"]


def make_tokenizer(text: str, vocab: int, eos: list[int]) -> Any:
    from llguidance import LLTokenizer

    return LLTokenizer(text, n_vocab=vocab, eos_token=eos)


def check(tokenizer: Any, grammar: str, limits: dict[str, Any]) -> tuple[Any, str | None]:
    """The grammar's beginning, and what is wrong with it: nothing may begin, or it is too large."""
    from llguidance import LLMatcher, LLParserLimits

    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**limits))
    if not matcher.is_error():
        mask = matcher.compute_bitmask()
        if not matcher.is_error() and not any(mask):
            return matcher, "nothing satisfies it"
    if not matcher.is_error():
        return matcher, None
    return matcher, explain(matcher.get_error())


def explain(error: str) -> str:
    """llguidance's messages, less the grammar's own text, which the client does not know."""
    if error.startswith("NoExtension"):
        return "nothing finite satisfies it"
    text = re.split(r"\n +\d+ \| |\n<", error, maxsplit=1)[0]
    text = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", text)
    return " ".join(text.split())[:400]


def main() -> None:
    sys.path.pop(0)  # this folder, whose modules others might take for theirs
    # ends with the server, also where that is killed while a grammar takes its time
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    setup = json.loads(sys.stdin.readline())
    tokenizer = make_tokenizer(setup["tokenizer"], setup["vocab"], setup["eos"])
    check(tokenizer, 'start: "x"', setup["limits"])  # threads and tables that it needs in any case
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    print(json.dumps(None), flush=True)
    for line in sys.stdin:
        print(json.dumps(check(tokenizer, json.loads(line), setup["limits"])[1]), flush=True)


if __name__ == "__main__":
    main()
