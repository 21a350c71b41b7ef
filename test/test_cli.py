"""The llaisys command, and the tokenizer and chat templates behind it."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bindings"), str(ROOT / "tools")]

import llaisys
from llaisys.tokenizer import Bounds, TextStream, Tokenizer, TokenizerError
from make_checkpoint import make_checkpoint

MINI = ROOT / "models" / "refrain-mini"
STATS = re.compile(
    r"load [\d.]+ s, prompt (\d+) tokens, answer (\d+) tokens, TTFT [\d.]+ ms"
    r"(, [\d.]+ tokens/s)?\n"
)
CHAT = [
    {"role": "system", "content": "You are kind."},
    {"role": "user", "content": "你好 👩‍👩‍👧!"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi"},
    {"role": "user", "content": "Who are you?"},
]
TEXTS = (
    "",
    " ",
    "Hello, world!",
    "  two  spaces\n\n\nlines\r\n\ttabs ",
    "1234567890.5e-7",
    "a" * 3000,
    "你好，世界",
    "日本語のテキスト",
    "e\u0301 \u212b \ufb01",
    "\x00\x7f\x80\xa0\ufffd\ufeff",
    "\U0001f389\U0001f469\u200d\U0001f467\u200d\U0001f466\U0001f3f3\ufe0f\u200d\U0001f308",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<think>x</think>",
    "<|im_start",
    "don't we'll I'D",
)


def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "llaisys", *map(str, arguments)],
        text=True,
        encoding="utf-8",
        input=stdin or "",
        capture_output=True,
        env=environment(),
        timeout=120,
        check=False,
    )


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "bindings")}


def answer_of(*arguments: str, stdin: str | None = None) -> str:
    """Standard output of a generate command, which must succeed."""
    done = run("generate", *arguments, "--device", "cpu", "--threads", "1", stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert STATS.fullmatch(done.stderr), done.stderr
    return done.stdout


def assert_error(done: subprocess.CompletedProcess, status: int, *parts: str) -> None:
    """One line that says what is wrong, and nothing else."""
    assert done.returncode == status, (done.returncode, done.stderr)
    assert done.stdout == ""
    assert re.fullmatch(r"llaisys: error: .+\n", done.stderr), done.stderr
    for part in parts:
        assert part in done.stderr


@pytest.fixture(scope="module")
def mini() -> Path:
    if not (MINI / "config.json").exists():
        pytest.skip("models/refrain-mini is not there")
    return MINI


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny model with random weights, whose tokens are the bytes, and a few added ones."""
    make_checkpoint(
        tmp_path,
        hidden=16,
        heads=4,
        kv_heads=2,
        layers=1,
        ffn=24,
        vocab=260,
        dtype="f32",
        max_positions=64,
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    backend.add_tokens([AddedToken("<｜用户｜>", normalized=False)])
    backend.enable_truncation(10)  # must not cut anything
    backend.save(str(tmp_path / "tokenizer.json"))
    set_template(tmp_path, "{{ messages[0].content }}")
    return tmp_path


def set_template(folder: Path, template: object) -> None:
    config = {
        "chat_template": template,
        "eos_token": "<|end|>",
        "bos_token": None,
        "pad_token": {"content": "<|end|>", "__type": "AddedToken"},
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


# ---- generate ----


def test_generate_prints_the_answer(mini):
    tokenizer = Tokenizer(mini)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}])
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    with llaisys.models.Qwen2(mini) as model:
        expected = model.generate(ids, 40)[len(ids) :]
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert text
    done = run(
        "generate", mini, "--device", "cpu", "--prompt", "Who are you?", "--max-new-tokens", "40"
    )
    assert done.returncode == 0
    assert done.stdout == text + "\n"
    match = STATS.fullmatch(done.stderr)
    assert [int(count) for count in match.groups()[:2]] == [len(ids), len(expected)]


def test_prompt_from_standard_input_and_default_model(mini):
    expected = answer_of(mini, "--prompt", "你是谁？")
    assert answer_of(mini, stdin="你是谁？\n") == expected
    assert answer_of("--prompt", "你是谁？") == expected


def test_messages(mini, tmp_path):
    chat = [{"role": "user", "content": "Who are you?"}]
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(chat), encoding="utf-8")
    expected = answer_of(mini, "--prompt", "Who are you?")
    assert answer_of(mini, "--messages", str(file)) == expected
    assert answer_of(mini, "--messages", "-", stdin=json.dumps(chat)) == expected
    for text in ("", "{", "7", "[]", "[7]", "[" * 100_000, '{"role": "user"}'):
        file.write_text(text)
        assert_error(run("generate", mini, "--messages", file), 1, "messages" if text else "JSON")
    assert_error(run("generate", mini, "--messages", tmp_path / "none"), 1, "none: No such file")


def test_raw_and_think(mini):
    tokenizer = Tokenizer(mini)
    chat = [{"role": "user", "content": "Hello"}]
    think = tokenizer.apply_chat_template(chat, enable_thinking=True)
    assert think != tokenizer.apply_chat_template(chat)
    limit = ("--max-new-tokens", "30")
    thought = answer_of(mini, "--prompt", "Hello", "--think", *limit)
    assert thought == answer_of(mini, "--raw", "--prompt", think, *limit)
    for other in ("--think", "--messages=x"):
        assert_error(run("generate", mini, "--raw", other), 2, "--raw")


def test_sampling(mini):
    def sample(*options):
        return answer_of(mini, "--raw", "--prompt", "The", "--max-new-tokens", "30", *options)

    hot = ("--temperature", "2")
    assert sample(*hot, "--seed", "1") == sample(*hot, "--seed", "1")
    assert sample(*hot, "--seed", "1") != sample(*hot, "--seed", "2")
    assert sample() == sample(*hot, "--top-k", "1") == sample(*hot, "--top-p", "1e-9")


def test_options_of_the_model(folder):
    plain = answer_of(folder, "--prompt", "abc")
    options = ("--prefill-chunk", "2", "--max-seq", "64", "--dtype", "f32")
    assert answer_of(folder, "--prompt", "abc", *options) == plain
    done = run("generate", folder, "--device", "cpu", "--prompt", "a" * 64)
    assert_error(done, 1, "64 tokens", "holds 64")


def test_streams_bytes_as_whole_characters(folder):
    """Random bytes: what comes out is UTF-8, bytes that are not characters replaced."""
    text = answer_of(folder, "--prompt", "你", "--temperature", "9", "--seed", "3")
    assert "\ufffd" in text


def test_interrupt_is_quiet(mini):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "llaisys",
            "generate",
            str(mini),
            "--device",
            "cpu",
            "--raw",
            "--prompt",
            "The",
            "--temperature",
            "8",
            "--seed",
            "1",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b""


def test_broken_pipe_is_quiet(mini):
    for command in ("generate", "plan"):
        process = subprocess.Popen(
            [sys.executable, "-m", "llaisys", command, str(mini), "--device", "cpu"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        process.stdout.close()
        process.stdin.write(b"Who are you?")
        process.stdin.close()
        process.stdin = None
        errors = process.stderr.read()
        assert process.wait(60) == 141
        assert errors == b""


# ---- plan and bench ----


def test_plan(folder):
    text = run("plan", folder, "--device", "cpu")
    assert text.returncode == 0, text.stderr
    assert text.stderr == ""
    assert len(text.stdout.splitlines()) > 10

    plan = json.loads(run("plan", folder, "--device", "cpu", "--json").stdout)
    small = json.loads(run("plan", folder, "--device", "cpu", "--json", "--max-seq", "16").stdout)
    assert 0 < small["totals"]["total"] < plan["totals"]["total"]
    picture = run("plan", folder, "--device", "cpu", "--svg").stdout
    assert ElementTree.fromstring(picture).tag.endswith("svg")


def test_plan_output(folder, tmp_path):
    file = tmp_path / "plan.svg"
    done = run("plan", folder, "--device", "cpu", "--svg", "--output", file)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    printed = run("plan", folder, "--device", "cpu", "--svg").stdout
    assert file.read_text(encoding="utf-8") == printed
    done = run("plan", folder, "--output", tmp_path / "none" / "plan")
    assert_error(done, 1, "No such file")
    assert_error(run("plan", tmp_path / "none"), 1, "none")


def test_bench(tmp_path):
    program = tmp_path / "llaisys-bench"
    beside = Path(llaisys.libllaisys.__file__).with_name("llaisys-bench")
    built = ROOT / "build" / "llaisys-bench"
    if beside.exists() or built.exists():
        assert run("bench", "--help").returncode == 0
        return
    assert_error(run("bench", "--help"), 1, "llaisys-bench", "PATH")
    program.write_text('#!/bin/sh\necho "$@"\nexit 7\n')
    program.chmod(0o755)
    env = environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-m", "llaisys", "bench", "--help", "-x", "a b"],
        env=env,
        text=True,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (7, "--help -x a b\n")


# ---- errors ----


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["generate", "--nonsense"],
        ["generate", "a", "b"],
        ["plan", "--json", "--svg"],
        ["generate", "--prompt", "a", "--messages", "b"],
        ["generate", "--max-new-tokens", "many"],
        ["generate", "--device", "abacus"],
        ["plan", "--dtype", "f64"],
        ["plan", "--device-ids", "a"],
    ],
)
def test_usage_errors(arguments):
    assert_error(run(*arguments), 2)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-new-tokens", "0"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-p", "0"),
        ("--top-k", "-1"),
        ("--seed", "-1"),
        ("--max-seq", "0"),
        ("--threads", "-1"),
    ],
)
def test_values_out_of_range(folder, option, value):
    name = option.strip("-").replace("-", "_")
    assert_error(run("generate", folder, "--prompt", "a", option, value), 1, name)


def test_help():
    for arguments in (["--help"], ["generate", "--help"], ["plan", "--help"]):
        done = run(*arguments)
        assert done.returncode == 0
        assert done.stdout.startswith("usage: llaisys")


# ---- tokenizer ----


def test_tokenizer_equals_transformers(mini):
    check_tokenizer(mini, AutoTokenizer.from_pretrained(mini))


def test_byte_tokenizer_equals_transformers(folder):
    # AutoTokenizer would go by the model and make it a Qwen2Tokenizer, with tokens of its own.
    check_tokenizer(folder, PreTrainedTokenizerFast.from_pretrained(folder))


def check_tokenizer(path: Path, theirs: PreTrainedTokenizerFast) -> None:
    ours = Tokenizer(path)
    assert ours.vocab_size == len(theirs)
    rng = random.Random(0)
    drawn = [
        "".join(
            chr(
                rng.choice(
                    (
                        rng.randrange(32, 127),
                        rng.randrange(0x4E00, 0x9FFF),
                        rng.randrange(0x1F300, 0x1F700),
                        rng.randrange(0x2500),
                    )
                )
            )
            for _ in range(rng.randrange(60))
        )
        for _ in range(200)
    ]
    for text in (*TEXTS, *drawn):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(
            text, add_special_tokens=False
        )
        for skip in (False, True):
            decoded = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == decoded
            # Every piece of the stream is certain: bytes of one character stay together.
            stream = TextStream(ours, skip_special_tokens=skip)
            pieces = [stream.push(token) for token in ids]
            assert "".join(pieces) == decoded
            assert stream.flush() == ""
            assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_streams_of_any_tokens(mini, folder):
    """Also of bytes that are no text."""
    rng = random.Random(1)
    for tokenizer in (Tokenizer(mini), Tokenizer(folder)):
        for _ in range(300):
            ids = [rng.randrange(tokenizer.vocab_size + 3) for _ in range(rng.randrange(50))]
            for skip in (False, True):
                stream = TextStream(tokenizer, skip_special_tokens=skip)
                text = "".join([*map(stream.push, ids), stream.flush()])
                assert text == tokenizer.decode(ids, skip_special_tokens=skip)


def test_unfinished_character(folder):
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("a👍")
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in ids] == ["a", "", "", "", "👍"]
    assert [stream.push(token) for token in ids[1:3]] == ["", ""]
    assert stream.flush() == "\ufffd"


def test_special_tokens(folder):
    tokenizer = Tokenizer(folder)
    end, user = tokenizer.token_id("<|end|>"), tokenizer.token_id("<｜用户｜>")
    assert (end, user, tokenizer.token_id("nothing")) == (256, 257, None)
    assert tokenizer.encode("<|end|><｜用户｜>") == [end, user]
    assert tokenizer.decode([end, user], skip_special_tokens=True) == "<｜用户｜>"
    assert tokenizer.is_special(end)
    assert not tokenizer.is_special(user)
    assert tokenizer.special_tokens == {"eos_token": "<|end|>", "pad_token": "<|end|>"}
    with pytest.raises(TokenizerError, match="Unicode"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"{}",
        b"[" * 100_000,
        b"\xff\xfe",
        b"null",
        b"version https://git-lfs.github.com/spec/v1\n",
        b'{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"a":-1},"merges":[]}}',
        b'{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{},"merges":[["a","b"]]}}',
    ],
)
def test_bad_tokenizer(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: .+") as error:
        Tokenizer(folder)
    assert "\n" not in str(error.value)
    assert_error(run("generate", folder, "--prompt", "a"), 1, "tokenizer.json")


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    assert_error(run("generate", folder, "--prompt", "a"), 1, "tokenizer.json")


def test_tokenizer_beyond_the_vocabulary(folder):
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([f"<{i}>" for i in range(10)])
    backend.save(str(folder / "tokenizer.json"))
    assert_error(
        run("generate", folder, "--prompt", "<9>"), 1, "is 267, expected an id", "0 to 259"
    )


# ---- chat templates ----


def test_template_equals_transformers(mini):
    ours, theirs = Tokenizer(mini), AutoTokenizer.from_pretrained(mini)
    for options in (
        {},
        {"enable_thinking": True},
        {"enable_thinking": False},
        {"add_generation_prompt": False},
    ):
        expected = theirs.apply_chat_template(
            CHAT, tokenize=False, **{"add_generation_prompt": True, **options}
        )
        assert ours.apply_chat_template(CHAT, **options) == expected
        assert "You are kind." in expected


TEMPLATES = {
    "loop": "{% for m in messages %}\n  {{ loop.index ~ m.role ~ loop.last ~ loop.length }}\n"
    "{{ loop.revindex }}{% if loop.first %}{% continue %}{% endif %}"
    "{{ loop.previtem.role }}{% else %}none{% endfor %}",
    "variables": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ tools is none }}|{{ nothing }}"
    "|{{ none }}|{{ strftime_now('%Y') | length }}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ '<&>' }}",
    "generation": "{% generation %}{% set q = 1 %}{{ 'a' * 3 + 'b' }}{% endgeneration %}"
    "{{ q is defined }}",
    "namespace": "{% set ns = namespace(a=1) %}{% for i in range(9) if i % 2 %}"
    "{% set ns.a = ns.a + i %}{% if i == 7 %}{% break %}{% endif %}{% endfor %}"
    "{{ ns.a ** 3 }}",
    "macro": "{% macro f(x, y=2) %}[{{ x }}{{ y }}]{% endmacro %}{{ f(10**9) }}{{ f('a', y=1.5) }}",
    "filters": "{{ '%5d' % 3 }}{{ 'x' | center(9) }}{{ 'a\nb' | indent(4) }}"
    "{{ 'a b'.split() | join('~') }}{{ messages | map(attribute='role') | join(',') }}",
    "recursive": "{%- for m in messages recursive %}{{ m.role if m is mapping else m }}"
    "{% if m is mapping %}{{ loop(['a', 'b']) }}{% endif %}{% endfor %}",
    "items": "{% for k, v in messages[1].items() %}{{ k ~ '=' ~ v ~ none ~ nothing }}{% endfor %}"
    "{{ messages[2].name is defined }}{{ dict(a=1).a }}",
    "block": "{% set x %}{% for m in messages[::-1] %}{{ m.content | trim }}{% endfor %}"
    "{% endset %}{{ x }}",
    "named": [{"name": "default", "template": "D{{ eos_token }}"}, {"name": "r", "template": "R"}],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_equal_transformers(folder, name):
    set_template(folder, TEMPLATES[name])
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert Tokenizer(folder).apply_chat_template(CHAT) == expected


def test_messages_as_templates_see_them(folder):
    """As in transformers 5: null fields are left out, reasoning has each of its names."""
    set_template(folder, "{{ messages | tojson }}")
    chat = [{"role": "user", "content": "a", "name": None, "thinking": "b", "reasoning": None}]
    seen = json.loads(Tokenizer(folder).apply_chat_template(chat))
    assert seen == [{"role": "user", "content": "a", "thinking": "b", "reasoning_content": "b"}]
    assert chat[0]["name"] is None


def test_template_file_wins(folder):
    (folder / "chat_template.jinja").write_text("{{ eos_token }}\n\n你\n", encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(CHAT, tokenize=False)
    assert Tokenizer(folder).apply_chat_template(CHAT) == expected == "<|end|>\n\n你"


HOSTILE = {
    "multiply": "{{ 'a' * 10**10 }}",
    "multiply-list": "{{ [messages] * 10**10 }}",
    "double": "{% set n = namespace(s='a' * 1000) %}{% for i in range(60) %}"
    "{% set n.s = n.s ~ n.s %}{% endfor %}",
    "double-plus": "{% set n = namespace(s='a' * 1000) %}{% for i in range(60) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}",
    "double-block": "{% set n = namespace(s='a' * 1000) %}{% for i in range(60) %}"
    "{% set x %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = x %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
    "width": "{{ 'x'.ljust(10**10) }}",
    "width-filter": "{{ 'x' | center(10**10) }}",
    "power": "{{ 7 ** (7 ** 12) }}",
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "tree": "{% macro f(x) %}{% if x %}{{ f(x - 1) }}{{ f(x - 1) }}{% endif %}{% endmacro %}"
    "{{ f(100) }}",
    "parentheses": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "blocks": "{% if 1 %}" * 3_000 + "{% endif %}" * 3_000,
    "loops": "{% for i in [1] %}" * 100 + "{% endfor %}" * 100,
    "sum": "{{ 1" + " + 1" * 20_000 + " }}",
    "long": " " * (1 << 21),
    "range": "{{ range(10**12) | list }}",
    "escape": "{{ ''.__class__.__mro__ }}",
    "change": "{{ messages.append(1) }}",
    "undefined": "{{ messages[0].nothing.at.all }}",
    "raise": "{{ raise_exception('roles must\nalternate') }}",
    "divide": "{{ 1 / 0 }}",
    "unknown-tag": "{% unknown %}",
    "include": "{% include '/etc/passwd' %}",
    "number": 7,
    "list": [7],
    "no-default": [{"name": "other", "template": "x"}],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_bad_template(folder, name):
    set_template(folder, HOSTILE[name])
    with pytest.raises(TokenizerError, match=r"template.*[a-z]") as error:
        Tokenizer(folder, Bounds(seconds=0.3)).apply_chat_template(CHAT)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_bad_template_on_the_command_line(folder):
    for name in ("double", "parentheses", "raise"):
        set_template(folder, HOSTILE[name])
        assert_error(run("generate", folder, "--prompt", "a"), 1, str(folder), "chat template: ")


@pytest.mark.parametrize("chat", [None, [], "x", [1], [None], {}, [{"role": {1}}], 7])
def test_bad_messages(folder, chat):
    with pytest.raises(TokenizerError, match="messages"):
        Tokenizer(folder).apply_chat_template(chat)
