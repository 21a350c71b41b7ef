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
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bindings"), str(ROOT / "test")]

pytest.importorskip("rich")
pytest.importorskip("uvicorn")
from llaisys.chat import Local, _split_blocks
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


def start(*arguments):
    return subprocess.run(
        command("chat", *arguments),
        input="",
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


LOCAL = (MINI, "--device", "cpu", "--threads", "1")


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_conversation(server, tmp_path, kind):
    arguments = LOCAL if kind == "local" else ("--url", server.url)
    arguments = (*arguments, "--temperature", "0")
    out = chat(
        arguments,
        *(
            "My favourite colour is green.",
            "What is my favourite colour?",
            "/regenerate",
            "/edit What is 7 + 5?",
        ),
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
    assert out.count("Your favourite colour is green.") >= 2  # and again when regenerated
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
    done = start(*arguments)
    assert done.returncode == 1
    assert re.fullmatch(rf"llaisys: error: .*{re.escape(message)}.*\n", done.stderr), done.stderr


def test_no_key(server):
    done = start("--url", server.url)
    assert done.returncode == 1
    assert "401: no valid API key" in done.stderr


class Told(BaseHTTPRequestHandler):
    """A server that answers with what it is told to; no answers are left: it breaks off."""

    models = b'{"data": [{"id": "told"}]}'
    answers = ()

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.models)

    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        text, *type(self).answers = self.answers or [""]
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": "stop" if text else None}
        self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def told(**fields):
    """The address of such a server."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Told,), fields))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


@pytest.mark.parametrize("models", [b"", b"<html>", b"[]", b'{"data": []}', b'{"data": [5]}'])
def test_some_other_server(models):
    with told(models=models) as address:
        done = start("--url", address)
    assert done.returncode == 1
    assert done.stderr == f"llaisys: error: --url: {address}: expected a server of OpenAI's API\n"


def test_nothing_is_lost_with_the_server():
    """What had been said before a question that fails, and the answer that was to be given again."""
    with told(answers=["One.", "Two."]) as address:
        out = chat(
            ("--url", address),
            *("First?", "Second?", "/regenerate", "/edit Third?", "Fourth?", "/show"),
        )
    assert out.count("error: the answer broke off") == 3
    shown = out.rpartition("broke off")[2]
    assert [w for w in shown.split() if w in ("user:", "assistant:")] == ["user:", "assistant:"] * 2
    for words in ("First?", "One.", "Second?", "Two."):
        assert words in shown


def test_files_that_cannot_be(tmp_path):
    lines = ("/save ~nobody-of-this-name/x", "/load ~nobody-of-this-name/x", "/load", "/save")
    with told(answers=["One."]) as address:
        out = chat(("--url", address), *lines, "First?", cwd=tmp_path)
    assert out.count("error: /save: ") == out.count("error: /load: ") == 2
    assert "One." in out


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
            os.chdir(home)
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

    def status(self, timeout=20):
        """The exit status; what is still shown is thrown away."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = None
                return os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):
                if select.select([self.fd], [], [], 0.1)[0]:
                    os.read(self.fd, 1 << 16)
        raise AssertionError("it does not end")

    def end(self):
        if self.pid is None:
            os.close(self.fd)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.fd)
        os.waitpid(self.pid, 0)


class Endless(BaseHTTPRequestHandler):
    """A server whose answers have no end; gone is set when a client leaves one."""

    gone = threading.Event()

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "endless"}]}')

    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        text = {"choices": [{"index": 0, "delta": {"content": "words, "}, "finish_reason": None}]}
        try:
            while True:
                self.wfile.write(f"data: {json.dumps(text)}\n\n".encode())
                time.sleep(0.01)
        except OSError:
            self.gone.set()

    def log_message(self, *_):
        pass


def test_interrupt_stops_the_answer_alone(tmp_path):
    http = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    terminal = Terminal(command("chat", "--url", f"127.0.0.1:{http.server_port}"), tmp_path)
    try:
        terminal.wait_for("/help lists the commands")
        terminal.wait_for(">")
        terminal.type("\x03")  # at the prompt: nothing
        for _ in range(2):
            terminal.type("Go on\r")
            terminal.wait_for("words, words")
            terminal.type("\x03")
            terminal.wait_for("(stopped)")
            assert Endless.gone.wait(5)
            Endless.gone.clear()
        terminal.type("/save kept\x1b\r.json\r")  # Alt-Enter begins a line
        terminal.wait_for("4 messages saved to kept")
        terminal.wait_for(">")
        terminal.type("\x04")
        assert terminal.status() == 0
    finally:
        terminal.end()
        http.shutdown()
    assert "+Go on" in (tmp_path / "llaisys" / "chat_history").read_text(encoding="utf-8")
    assert (tmp_path / "kept\n.json").exists()


def test_answers_do_not_command_the_terminal(tmp_path):
    """Escape sequences in an answer: the title, the clipboard, the screen, and as one character."""
    text = "\x1b]0;title\x07 \x1b]52;c;aGk=\x07 \x9b2J done\n\n```\n\x1b[2J fenced\n```\n\nthe end"
    with told(answers=[text]) as address:
        terminal = Terminal(command("chat", "--url", address), tmp_path)
        try:
            terminal.wait_for("/help lists the commands")
            terminal.wait_for(">")
            terminal.type("Go\r")
            shown = terminal.wait_for("the end")
            terminal.type("/show\r")
            shown += terminal.wait_for("assistant:") + terminal.wait_for("the end")
        finally:
            terminal.end()
    assert "done" in shown
    assert "]52;" in shown  # as text
    assert not re.search("\x1b]|\x07|\x9b", shown)


def test_talk_in_a_terminal(tmp_path):
    terminal = Terminal(command("chat", *LOCAL, "--temperature", "0"), tmp_path)
    try:
        terminal.wait_for("/help lists the commands")
        terminal.wait_for(">")
        terminal.type(f"{SUM}\r")
        terminal.wait_for(ANSWER)
        terminal.wait_for("TTFT")
        terminal.type("/edit\r")
        terminal.wait_for(SUM)  # stands there, to be changed
        terminal.type("\x15What is 7 + 5?\r")
        terminal.wait_for("7 + 5 = 12.")
        terminal.type("/quit\r")
        assert terminal.status() == 0
    finally:
        terminal.end()


def test_leaving_a_local_answer():
    """What the engine computed of it stays in the cache, and nothing goes on."""
    with Local(str(MINI), {"threads": 1}) as local:
        body = {"messages": [{"role": "user", "content": "Tell me all that you know"}]}
        for _ in range(20):
            stream = local.stream({**body, "temperature": 2})
            next(stream)
            stream.close()
            assert local._engine.stats()["kv_active"] == 0
        assert local._engine.stats()["finished"]["cancelled"] > 0
        pieces = list(local.stream({**body, "temperature": 0}))
        assert pieces[-1].finish == "stop"


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
