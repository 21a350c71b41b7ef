"""llaisys chat: against a model and against a server, in a pipe and in a terminal."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bindings"), str(ROOT / "test")]

pytest.importorskip("rich")
pytest.importorskip("uvicorn")
from llaisys.chat import _split_blocks
from server_utils import ENVIRONMENT, MINI, Served, command

SUM, ANSWER = "What is 12 + 30?", "12 + 30 = 42."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Served(tmp_path_factory.mktemp("server") / "log", key="sesame") as served:
        yield served


def chat(arguments, *lines, key=None, cwd=ROOT):
    environment = ENVIRONMENT | ({"LLAISYS_API_KEY": key} if key else {})
    done = subprocess.run(
        command("chat", *arguments),
        input="".join(line + "\n" for line in lines),
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOCAL = (MINI, "--device", "cpu", "--threads", "1")


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_conversation(server, tmp_path, kind):
    arguments = LOCAL if kind == "local" else ("--url", server.url)
    arguments = (*arguments, "--temperature", "0")
    out = chat(
        arguments,
        *("My name is Ann.", "What is my name?", "/regenerate", "/edit What is 7 + 5?"),
        *('"""', "What is", "12 + 30?", '"""', "/save kept.json"),
        *("/set think on", "/edit What is 12 + 30?", "/set think", "/nonsense", "/set top_p x"),
        *("/new", "/regenerate", "/load kept.json", "/show", "/quit", "never read"),
        key="sesame",
        cwd=tmp_path,
    )
    for words in (
        *("refrain-mini", "7 + 5 = 12.", ANSWER, "there is no /nonsense", "/set top_p: x is not"),
        *("Ones:", "a new chat", "nothing has been asked yet", "6 messages loaded"),
    ):
        assert words in out, (words, out)
    assert out.count("Ann") >= 3  # remembered, and again when regenerated, and shown
    assert re.search(r"\d+ tokens, \d+ tokens/s, TTFT \d+ ms, \d+ of \d+ prompt tokens cached", out)
    assert "never read" not in out
    kept = json.loads((tmp_path / "kept.json").read_text(encoding="utf-8"))
    roles = [message["role"] for message in kept["messages"]]
    assert roles == ["user", "assistant"] * 3
    assert kept["messages"][4]["content"] == "What is\n12 + 30?"
    assert kept["settings"] == {"temperature": 0.0}


def test_follow_up_is_cached():
    out = chat(LOCAL, SUM, "And what is 7 + 5? " * 5, "/quit")
    cached = [int(n) for n in re.findall(r"(\d+) of \d+ prompt tokens cached", out)]
    assert cached[0] == 0
    out = chat(LOCAL, "Tell me " * 20, "/regenerate")
    cached = [int(n) for n in re.findall(r"(\d+) of \d+ prompt tokens cached", out)]
    assert cached[1] >= 32


def test_errors_do_not_end_it(server):
    out = chat(("--url", server.url), "word " * 2000, SUM, "/load nowhere.json", key="sesame")
    assert "error: 400: the context holds 1024 tokens" in out
    assert ANSWER in out
    assert "nowhere.json" in out
    out = chat(LOCAL, "word " * 2000, "/set temperature 9", SUM, "/set temperature", SUM)
    assert "error: the context holds" in out
    assert "error: temperature" in out
    assert ANSWER in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--url", "http://127.0.0.1:1"), "refused"),
        (("--url", "ftp://x"), "--url"),
        ((MINI, "--url", "http://x"), "either MODEL or --url"),
        (("nowhere",), "nowhere"),
    ],
)
def test_bad_command_lines(arguments, message):
    options = {"env": ENVIRONMENT, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(command("chat", *arguments), input="", timeout=60, **options)
    assert done.returncode == 1
    assert re.fullmatch(rf"llaisys: error: .*{re.escape(message)}.*\n", done.stderr), done.stderr


def test_no_key(server):
    options = {"env": ENVIRONMENT, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(command("chat", "--url", server.url), input="", timeout=60, **options)
    assert done.returncode == 1
    assert "401: no valid API key" in done.stderr


# ---- in a terminal ----


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, arguments, home):
        environment = ENVIRONMENT | {
            "TERM": "xterm",
            "HOME": str(home),
            "LLAISYS_API_KEY": "sesame",
        }
        environment["XDG_STATE_HOME"] = str(home)
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.chdir(ROOT)
            os.execve(sys.executable, [str(a) for a in arguments], environment)
        self.seen = ""

    def type(self, text):
        os.write(self.fd, text.encode())

    def wait_for(self, words, timeout=30):
        """Reads until words are shown, past those shown before; returns what came."""
        deadline = time.monotonic() + timeout
        while words not in self.seen:
            assert time.monotonic() < deadline, (words, self.seen)
            if select.select([self.fd], [], [], 0.1)[0]:
                data = os.read(self.fd, 1 << 16).decode(errors="replace")
                if "\x1b[6n" in data:  # it asks where the cursor is
                    os.write(self.fd, b"\x1b[1;1R")
                self.seen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data)
        before, _, self.seen = self.seen.partition(words)
        return before

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.fd)
        os.waitpid(self.pid, 0)


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_interrupt_stops_the_answer_alone(server, tmp_path, kind):
    arguments = LOCAL if kind == "local" else ("--url", server.url)
    terminal = Terminal(command("chat", *arguments), tmp_path)
    try:
        terminal.wait_for("/help lists the commands")
        terminal.wait_for("> ")
        terminal.type("\x03")  # at the prompt: nothing
        terminal.type(f"{SUM}\r")
        terminal.wait_for(ANSWER)
        terminal.wait_for("TTFT")
        # noise does not end by itself before it has filled the context
        terminal.type("/set temperature 2\r")
        terminal.wait_for("settings: temperature 2")
        for _ in range(20):
            terminal.type("Tell me all that you know\r")
            time.sleep(0.05)
            terminal.type("\x03")
            terminal.wait_for("> ")
            if "(stopped)" in terminal.seen or "(stopped)" in terminal.wait_for("> ", 5):
                break
        terminal.type("/set temperature 0\r")
        terminal.wait_for("settings: temperature 0")
        terminal.type("/new\r")
        terminal.wait_for("a new chat")
        terminal.type("What is\x1b\r12 + 30?\r")  # Alt-Enter
        terminal.wait_for(ANSWER)
        terminal.type("\x04")
        deadline = time.monotonic() + 20
        while os.waitpid(terminal.pid, os.WNOHANG) == (0, 0):
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError):
                select.select([terminal.fd], [], [], 0.1)
                os.read(terminal.fd, 1 << 16)
        terminal.pid = os.spawnlp(os.P_NOWAIT, "true", "true")  # for end() to wait for
    finally:
        terminal.end()
    assert SUM in (tmp_path / "llaisys" / "chat_history").read_text(encoding="utf-8")
    if kind == "remote":
        server.idle(timeout=5)


def test_blocks_of_markdown():
    for text, done in (
        ("a\nb", ""),
        ("a\n\nb", "a\n\n"),
        ("a\n\n", "a\n\n"),
        ("```\nx\n\ny\n", ""),
        ("```\nx\n\ny\n```\n\nz", "```\nx\n\ny\n```\n\n"),
        ("a\n\n~~~py\n\n```\n\n", "a\n\n"),
    ):
        assert _split_blocks(text) == (done, text[len(done) :])
