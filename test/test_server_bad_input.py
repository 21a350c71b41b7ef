"""What strangers send: every row of the table of bad inputs, in OpenAI's shape, and nothing breaks."""

import json
import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bindings"), str(ROOT / "test")]

pytest.importorskip("uvicorn")
from llaisys.server.prepare import ENGINE
from server_utils import Served, chat_body

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]
BOMB = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    options = ("--body-timeout", 1, "--header-timeout", 1, "--max-body", 1 << 20)
    with Served(log, "--max-queue", 64, *options) as served:
        yield served
        assert (
            served.chat("What is 12 + 30?")["choices"][0]["message"]["content"] == "12 + 30 = 42."
        )
        served.idle()
        assert '"failure"' not in served.log()
        assert "Traceback" not in served.log()


def absent(name, *values):
    """Values of a parameter that are refused as long as the engine does not have it."""
    return [] if name in ENGINE else list(values)


def refused(server, status, param, path, body, *words):
    """Checks that a body is refused with a status, naming the parameter and saying some words."""
    found, _, answer = server.ask(path, body)
    assert found == status, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert len(error["message"]) < 500
    for word in words:
        assert str(word) in error["message"], error
    return error


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[1", b"hello", b"\x00", b'{"messages":', b"[" * 100_000),
        *(b'{"messages":[{"role":"user","content":"\xff\xfe"}]}', b"[]", b"1", b"null", b'"text"'),
        b'{"a":' * 100_000,
        b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"messages":[{"role":"user","content":"Hi"}],"seed":' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:12]),
)
def test_malformed(server, body):
    for path in (CHAT, COMPLETIONS, "/tokenize", "/detokenize"):
        status, _, answer = server.ask(path, body)
        assert status == 400
        assert answer["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ("string", "messages"),
        ([], "messages"),
        ([123], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{"role": 123}], "messages[0].role"),
        ([{"role": "wizard", "content": "Hi"}], "messages[0].role"),
        ([{"role": "user", "content": 123}], "messages[0].content"),
        ([*USER, {"role": "user", "content": [{"type": "text"}]}], "messages[1].content[0].text"),
        ([{"role": "user", "content": [BOMB]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{}]}], "messages[0].content[0].type"),
    ],
)
def test_messages(server, messages, param):
    refused(server, 400, param, CHAT, {"messages": messages})


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("n", [0, -1, 10**9, 2**63, 1.5, "2", True]),
        ("max_tokens", [0, -1, 2**31, 2**63, "5", 1.5]),
        ("temperature", [-0.1, 2.1, "hot", True]),
        ("top_p", [-1, 2, "x"]),
        ("top_k", [-2, 2**31, 0.5]),
        ("seed", [2**64, -(2**63) - 1, "x"]),
        ("min_p", [-1, 2, *absent("min_p", 0.5)]),
        ("presence_penalty", [-3, 3, *absent("presence_penalty", 0.5)]),
        ("frequency_penalty", [-3, 3, *absent("frequency_penalty", 0.5)]),
        ("repetition_penalty", [0, -1, 3, *absent("repetition_penalty", 1.1)]),
        ("stop", ["", "x" * 10_000, 5]),
        ("stop_token_ids", [[-1], [2048], [2**70], [1] * 65]),
        ("logit_bias", [{"-1": 1}, {"2048": 1}, {"x": 1}, {"9" * 30: 1}, {"5": 101}]),
        ("logit_bias", absent("logit_bias", {"5": 1})),
        ("stream", ["yes", 1]),
        ("cache_salt", ["", 5]),
        ("ignore_eos", ["no"]),
    ],
)
def test_values_of_both(server, param, values):
    for value in values:
        for path, body in ((CHAT, {"messages": USER}), (COMPLETIONS, {"prompt": "Hi"})):
            status, _, answer = server.ask(path, {**body, param: value})
            assert status == 400, (value, answer)
            assert answer["error"]["param"].split(".")[0].split("[")[0] == param


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *(("top_logprobs", -1), ("top_logprobs", 10**6), ("top_logprobs", 5)),
        *[("logprobs", value) for value in absent("logprobs", True)],
        *(("response_format", "sound"), ("response_format.type", {"type": "sound"})),
        *(("tool_choice", "required"), ("tool_choice", "never"), ("functions", [{"name": "f"}])),
        *(("chat_template", "{{ 1 }}"), ("modalities", ["audio"]), ("audio", {"voice": "x"})),
        *(("chat_template_kwargs", 5), ("chat_template_kwargs", {"x": "y" * 70_000})),
        *(("continue_final_message", True), ("max_completion_tokens", 0)),
    ],
)
def test_values_of_chat(server, param, value):
    name = param.partition(".")[0]
    refused(server, 400, param, CHAT, {"messages": USER, name: value})


def test_values_deeper(server):
    for body, param in (
        ({"response_format": {"type": "sound"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": 123}},
            "response_format.json_schema",
        ),
        ({"stream_options": {"include_usage": "x"}}, "stream_options.include_usage"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ):
        refused(server, 400, param, CHAT, {"messages": USER, **body})
    refused(server, 400, "stop", CHAT, {"messages": USER, "stop": ["x"] * 10_000}, "at most 16")
    for number in ("1e999", "-1e999", "NaN", "Infinity"):
        body = '{"messages":[{"role":"user","content":"Hi"}],"temperature":' + number + "}"
        assert server.ask(CHAT, body)[0] == 400


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (["x"] * 100_000, "prompt"),
        (["x"] * 65, "prompt"),
        ([[1]] * 100_000, "prompt"),
        ([], "prompt"),
        ("", "prompt"),
        ([[]], "prompt"),
        ([1, 2048], "prompt"),
        ([-1], "prompt"),
        ([2**70], "prompt"),
        ([[1], [2**63]], "prompt"),
        ({}, "prompt"),
        (None, "prompt"),
        (5, "prompt"),
    ],
)
def test_prompts(server, prompt, param):
    begun = time.monotonic()
    refused(server, 400, param, COMPLETIONS, {"prompt": prompt})
    assert time.monotonic() - begun < 5


def test_prompts_deeper(server):
    refused(server, 400, "prompt[1]", COMPLETIONS, {"prompt": ["a", 1]})
    for body, param in (
        ({"suffix": "x"}, "suffix"),
        *[({"logprobs": value}, "logprobs") for value in (*absent("logprobs", 0), 21)],
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 0}, "logprobs"),
        ({"n": 40}, "prompt"),
    ):
        refused(server, 400, param, COMPLETIONS, {"prompt": ["Hi", "you"], **body})


def test_longer_than_the_context(server):
    """Refused with both counts, before a stream begins."""
    count = server.ask("/tokenize", {"prompt": "ab " * 2000})[2]["count"]
    for stream in (False, True):
        body = {"prompt": "ab " * 2000, "stream": stream}
        error = refused(server, 400, "prompt", COMPLETIONS, body, 1024, count)
        assert error["code"] == "context_length_exceeded"
        body = {**chat_body("ab " * 2000), "stream": stream}
        refused(server, 400, "messages", CHAT, body, 1024)
    assert server.ask(COMPLETIONS, {"prompt": [1] * 1024})[0] == 400
    assert server.ask(COMPLETIONS, {"prompt": [1] * 1023})[0] == 200


def test_arguments_nested_at_every_depth(server):
    """Some can be read, but not be written again."""
    for depth in range(900, 1000):
        arguments = "[" * depth + "]" * depth
        call = {"function": {"name": "f", "arguments": arguments}}
        body = {"messages": [*USER, {"role": "assistant", "tool_calls": [call]}]}
        status, _, answer = server.ask("/tokenize", body)
        assert status in (200, 400), (depth, answer)
    assert "nested" in answer["error"]["message"] or "depth" in answer["error"]["message"]


def test_long_texts_hold_nobody_up(tmp_path):
    """Millions of tokens are made in a thread that others run beside, and their memory goes back."""
    with Served(tmp_path / "log") as server, ThreadPoolExecutor(24) as pool:

        def memory():
            pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
            return int(pages) * os.sysconf("SC_PAGESIZE")

        text = "1 " * 700_000
        assert server.ask("/tokenize", {"prompt": "1 " * 200_000})[2]["count"] == 400_000
        before, slowest = memory(), 0.0
        asked = pool.submit(server.ask, "/tokenize", {"prompt": text})
        while not asked.done():
            begun = time.monotonic()
            assert server.ask("/health")[0] == 200
            slowest = max(slowest, time.monotonic() - begun)
        assert asked.result()[2]["count"] == 1_400_000
        assert slowest < 1
        assert memory() - before < 200 << 20
        body = json.dumps({"prompt": "1 " * 140_000})
        statuses = list(pool.map(lambda _: server.ask(COMPLETIONS, body)[0], range(24)))
        assert set(statuses) == {400, 429}


def test_unsupported_says_so(server):
    body = {"messages": USER, "continue_final_message": True}
    error = refused(server, 400, "continue_final_message", CHAT, body, "not supported")
    assert error["code"] == "unsupported_parameter"


def test_unknown_places(server):
    for body in ({"messages": USER, "model": "gpt-4"}, {"messages": USER, "model": "x" * 10_000}):
        error = refused(server, 404, "model", CHAT, body)
        assert error["code"] == "model_not_found"
    for path in (
        "/",
        "/v1",
        "/v1/chat",
        "/v1/chat/completions/",
        "/%00",
        "/../etc/passwd",
        "/" + "x" * 9000,
    ):
        if path != "/":
            assert server.ask(path)[0] == 404
    for method, path in (
        ("GET", CHAT),
        ("DELETE", CHAT),
        ("POST", "/health"),
        ("PUT", "/v1/models"),
    ):
        status, headers, answer = server.ask(path, method=method)
        assert status == 405
        assert headers["allow"]
        assert answer["error"]["message"]


def test_body_too_large(server):
    text = json.dumps({"prompt": "x" * (2 << 20)})
    status, headers, answer = server.ask(COMPLETIONS, text)
    assert (status, headers["connection"]) == (413, "close")
    assert "1048576" in answer["error"]["message"]
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    assert server.raw(head + chunk * 20 + b"0\r\n\r\n").startswith(b"HTTP/1.1 413 ")


def test_headers_too_large(server):
    for head in (
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: " + b"y" * 100_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"x-many: 1\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nx-endless: " + b"y" * 200_000,
    ):
        received = server.raw(head)
        # one that still writes may find the connection reset before it reads
        assert received == b"" or received.startswith(b"HTTP/1.1 431 "), received[:100]
    received = server.raw(b"GET /health HTTP/1.1\r\nx-long: " + b"y" * 66_000 + b"\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 431 ")


def test_slow_senders(server):
    """In the headers and in the body; others are answered meanwhile."""

    def slow(data):
        begun = time.monotonic()
        received = server.raw(data)
        return received, time.monotonic() - begun

    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{".encode()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(slow, d) for d in (b"GET /health HT", head, b"")]
        assert server.ask("/health")[0] == 200
        (headers, *_), (body, seconds), (nothing, _) = [future.result() for future in waiting]
    assert headers.startswith(b"HTTP/1.1 408 ")
    assert body.startswith(b"HTTP/1.1 408 ")
    assert 0.9 < seconds < 5
    assert nothing == b""


def test_no_http(server):
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),  # TLS
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET http:// HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
    ):
        received = server.raw(data)
        assert received == b"" or received.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), received[:80]


def test_broken_bodies_are_told(server):
    """Unless an answer to another request is under way, for which it would be taken."""
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    for body in (b"zz\r\n", b"2\r\n{}x\r\n", b"f" * 20 + b"\r\n"):
        assert server.raw(head + body).startswith(b"HTTP/1.1 400 ")
    text = json.dumps({"prompt": "Hi", "max_tokens": 900, "ignore_eos": True}).encode()
    first = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(text)}\r\n\r\n"
    assert server.raw(first.encode() + text + head + b"zz\r\n") == b""


def test_half_a_request_then_gone(server):
    for length in (5, 60, 75):
        text = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{"
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(text[:length].encode())


def test_templates_in_requests(tmp_path):
    """Where they are allowed, they are sandboxed, and bounded in time and size."""
    with Served(tmp_path / "log", "--allow-chat-template") as server:
        template = "{{ messages[0].content }}{{ messages[1].content }}"
        messages = USER + USER
        body = {"messages": messages, "chat_template": template, "max_tokens": 1}
        plain = server.ask("/tokenize", {"prompt": "HiHi"})[2]["count"]
        assert server.ask(CHAT, body)[2]["usage"]["prompt_tokens"] == plain
        for bad in (
            "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}",
            "{{ 'x' * 10**9 }}",
            "{{ ''.__class__.__mro__ }}{{ x.y.z }}",
            "{{",
            "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
        ):
            asked = threading.Thread(target=server.ask, args=("/health",))
            asked.start()
            status, _, answer = server.ask(CHAT, {**body, "chat_template": bad})
            asked.join()
            assert status == 400, (bad[:40], answer)
            assert str(ROOT) not in answer["error"]["message"]
