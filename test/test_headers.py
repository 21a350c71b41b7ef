"""Public headers compile alone, and the library exports what they declare and nothing else."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEADERS = sorted((ROOT / "include").rglob("*.h"))
LIBRARY = ROOT / "bindings" / "llaisys" / "libllaisys" / "libllaisys.so"

WARNINGS = ("-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only")
COMPILERS = {
    "C11": ("cc", "-std=c11", "-x", "c"),
    "C++17": ("c++", "-std=c++17", "-x", "c++"),
}


def run(*command: str, text: str = "") -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def declared() -> set[str]:
    """Names of the functions that the headers declare."""
    names = set()
    for header in HEADERS:
        text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.DOTALL)
        text = re.sub(r"^\s*#.*?(?<!\\)$", "", text, flags=re.DOTALL | re.MULTILINE)
        names |= set(re.findall(r"LLAISYS_API\b[^;(]*?(\w+)\s*\(", text))
    return names


@pytest.mark.parametrize("language", COMPILERS)
@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_header_compiles_alone(header: Path, language: str) -> None:
    # Twice, for its include guard.
    include = f'#include "{header.relative_to(ROOT / "include")}"\n'
    run(*COMPILERS[language], *WARNINGS, "-I", str(ROOT / "include"), "-", text=include * 2)


def test_headers_declare_the_interface() -> None:
    names = declared()
    assert {"llaisysGetLastError", "tensorView", "llaisysROPE", "llaisysQwen2ModelInfer"} <= names
    assert all(re.match(r"llaisys|tensor", name) for name in names), names


def test_library_exports_what_headers_declare() -> None:
    assert LIBRARY.is_file(), f"{LIBRARY.name} is missing: run make"
    symbols = run("nm", "-D", "--defined-only", "--format=posix", str(LIBRARY))
    exported = {line.split()[0].partition("@")[0] for line in symbols.splitlines()}
    assert declared() - exported == set(), "declared, but not exported"
    assert exported - declared() == set(), "exported, but not declared"
