"""llaisys serve over HTTP: what it answers, how streams end, and what it does when it must refuse."""

import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bindings"), str(ROOT / "test")]

pytest.importorskip("uvicorn")
from llaisys.engine import Engine
from llaisys.tokenizer import Tokenizer
from server_utils import ENVIRONMENT, MINI, Served, chat_body, command, joined

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
QUESTIONS = ["What is 12 + 30?", "Who are you?", "What is the capital of France?", "你是谁？"]
LONG = {"prompt": "Hello", "max_tokens": 900, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with Served(log, "--max-seqs", 16, "--max-queue", 64, "--body-timeout", 2) as served:
        yield served


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(MINI)


# ---- answers ----


def test_chat(server):
    body = server.chat("What is 12 + 30?")
    (choice,) = body["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "12 + 30 = 42.",
        "reasoning_content": None,
    }
    assert choice["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert body["model"] == "refrain-mini"
    assert body["object"] == "chat.completion"
    timings = body["timings"]
    assert 0 < timings["queued_ms"] <= timings["ttft_ms"] <= timings["total_ms"]


@pytest.mark.parametrize("question", QUESTIONS)
def test_stream_is_the_same_text(server, tokenizer, question):
    whole = server.chat(question)
    events = server.events(CHAT, chat_body(question, stream_options={"include_usage": True}))
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert joined(events) == whole["choices"][0]["message"]["content"]
    *chunks, last = events
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + [
        "stop"
    ]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert {k: last["usage"][k] for k in ("prompt_tokens", "completion_tokens")} == {
        k: whole["usage"][k] for k in ("prompt_tokens", "completion_tokens")
    }
    assert last["timings"]["predicted_n"] == last["usage"]["completion_tokens"]
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in e for e in server.events(CHAT, chat_body(question)))


def test_same_tokens_as_the_engine(server, tokenizer):
    text = tokenizer.apply_chat_template([{"role": "user", "content": QUESTIONS[0]}])
    ids = tokenizer.encode(text, add_special_tokens=False)
    with Engine(MINI, threads=1) as engine:
        options = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 5}
        (answer,) = engine.generate([ids], 40, **options)
    found = server.ask(COMPLETIONS, {"prompt": ids, "max_tokens": 40, **options})[2]
    expected = tokenizer.decode(answer.tokens, skip_special_tokens=True)
    assert found["choices"][0]["text"] == expected
    assert found["choices"][0]["finish_reason"] == answer.finish
    assert found["usage"]["completion_tokens"] == len(answer.tokens)


def test_length(server):
    body = server.chat("Count from 3 to 9.", max_tokens=4)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 4
    again = server.chat("Count from 3 to 9.", max_completion_tokens=4, max_tokens=9)
    assert again["choices"][0]["message"] == body["choices"][0]["message"]
    # no more than there is room for, and plain completions have OpenAI's default
    body = server.ask(COMPLETIONS, {**LONG, "max_tokens": 100_000})[2]
    assert body["usage"]["total_tokens"] == 1024
    assert body["choices"][0]["finish_reason"] == "length"
    body = server.ask(COMPLETIONS, {"prompt": "Hello", "ignore_eos": True})[2]
    assert body["usage"]["completion_tokens"] == 16


def test_content_parts_and_roles(server):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "12 + 30?"}]
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    body = server.ask(CHAT, {"messages": messages, "temperature": 0})[2]
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": QUESTIONS[0]},
    ]
    same = server.ask(CHAT, {"messages": messages, "temperature": 0})[2]
    assert body["choices"] == same["choices"]
    assert body["usage"]["prompt_tokens"] == same["usage"]["prompt_tokens"]


def test_a_stop_string_ends_its_own_choice(server):
    """One choice's stop string cancels that request; the others are what they would have been."""
    options = {"prompt": "Hello", "n": 6, "temperature": 2, "seed": 3, "max_tokens": 60}
    whole = [choice["text"] for choice in server.ask(COMPLETIONS, options)[2]["choices"]]
    words = [word for text in whole for word in text.split()]
    stop = next(word for word in words if 0 < sum(word in text for text in whole) < 6)
    choices = server.ask(COMPLETIONS, {**options, "stop": stop})[2]["choices"]
    assert [choice["text"] for choice in choices] == [text.split(stop)[0] for text in whole]
    assert all(c["finish_reason"] == "stop" or stop not in whole[c["index"]] for c in choices)
    streamed = [""] * 6
    for event in server.events(COMPLETIONS, {**options, "stop": stop}):
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == [choice["text"] for choice in choices]
    server.idle()


def test_many_choices(server):
    options = {"temperature": 2, "seed": 3, "max_tokens": 30}
    body = server.chat("Who are you?", n=5, **options)
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert [choice["index"] for choice in body["choices"]] == list(range(5))
    assert len(set(texts)) > 1
    events = server.events(CHAT, chat_body("Who are you?", n=5, **options))
    for index, text in enumerate(texts):
        parts = [c for e in events for c in e["choices"] if c["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in parts) == text
        assert [c["finish_reason"] for c in parts if c["finish_reason"]] == [
            body["choices"][index]["finish_reason"]
        ]
    # several prompts: as each alone
    prompts = ["Hello", "What is", [1, 2, 3]]
    asked = {"temperature": 0, "max_tokens": 8}
    body = server.ask(COMPLETIONS, {"prompt": prompts[:2], "n": 2, "echo": True, **asked})[2]
    texts = [choice["text"] for choice in body["choices"]]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    for prompt, text in zip(prompts, texts[::2], strict=False):
        alone = server.ask(COMPLETIONS, {"prompt": prompt, **asked})[2]
        assert prompt + alone["choices"][0]["text"] == text


def test_stop_strings(server):
    """Every piece of the answer as a stop string: cut right there, in a stream and in one go."""
    question = "Count from 3 to 9."
    full = server.chat(question)["choices"][0]["message"]["content"]
    pieces = {full[a : a + n] for a in range(0, len(full), 3) for n in (1, 2, 5)}
    for stop in sorted(pieces)[:25]:
        expected = full.split(stop)[0]
        body = server.chat(question, stop=[stop, "never said"])
        assert body["choices"][0]["message"]["content"] == expected
        assert body["choices"][0]["finish_reason"] == "stop"
        events = server.events(CHAT, chat_body(question, stop=stop))
        assert joined(events) == expected
    cut = server.chat(question, stop=full[5:8])
    assert cut["usage"]["completion_tokens"] < server.chat(question)["usage"]["completion_tokens"]
    server.idle()
    # and the engine does not go on behind it
    text = server.ask(COMPLETIONS, LONG)[2]["choices"][0]["text"]
    before = server.metric("vllm:generation_tokens_total")
    for _ in range(4):
        assert server.ask(COMPLETIONS, {**LONG, "stop": text[:3]})[2]["choices"][0]["text"] == ""
    server.idle()
    assert server.metric("vllm:generation_tokens_total") - before < 4 * 600


def test_stop_tokens(server, tokenizer):
    full = server.chat("Count from 3 to 9.")["choices"][0]["message"]["content"]
    comma = tokenizer.token_id(",")
    cut = server.chat("Count from 3 to 9.", stop_token_ids=[comma])["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == (full.split(",")[0], "stop")


def test_thoughts(server):
    think = {"chat_template_kwargs": {"enable_thinking": True}}
    message = server.chat("What is 12 + 30?", **think)["choices"][0]["message"]
    assert message["content"] == "12 + 30 = 42."
    assert message["reasoning_content"].startswith("Ones:")
    events = server.events(CHAT, chat_body("What is 12 + 30?", **think))
    assert joined(events) == message["content"]
    assert joined(events, "reasoning_content") == message["reasoning_content"]
    # a stop string is for the answer
    again = server.chat("What is 12 + 30?", stop=":", **think)["choices"][0]["message"]
    assert again == message


def test_follow_up_is_cached(server):
    text = " ".join(map(str, range(120)))
    body = server.ask(COMPLETIONS, {"prompt": text, "max_tokens": 1})[2]
    again = server.ask(COMPLETIONS, {"prompt": text, "max_tokens": 1})[2]["usage"]
    cached = again["prompt_tokens_details"]["cached_tokens"]
    assert body["usage"]["prompt_tokens"] - 32 <= cached < body["usage"]["prompt_tokens"]
    salted = {"prompt": text, "max_tokens": 1, "cache_salt": "mine"}
    for expected in (0, cached):
        usage = server.ask(COMPLETIONS, salted)[2]["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == expected


def test_neutral_values_and_null(server):
    neutral = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1,
        "min_p": 0,
        "logit_bias": {},
        "logprobs": False,
        "top_logprobs": 0,
        "tools": [],
        "top_k": -1,
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "stop": [],
        "user": "me",
    }
    names = ("max_tokens", "n", "seed", "temperature", "top_p", "stream", "stream_options", "tools")
    assert server.chat("Who are you?", **neutral)["choices"]
    assert server.chat("Who are you?", **dict.fromkeys(names))["choices"]
    status, headers, _ = server.ask(CHAT, chat_body("Hi", max_tokens=1, foo=1, bar={}))
    assert status == 200
    assert headers["x-ignored-parameters"] == "bar,foo"


# ---- other endpoints ----


def test_models_and_health(server):
    assert server.ask("/health")[2] == {"status": "ok"}
    (model,) = server.ask("/v1/models")[2]["data"]
    assert model["id"] == "refrain-mini"
    assert model["max_model_len"] == 1024
    assert server.ask("/v1/models/refrain-mini")[2] == model
    assert server.ask("/v1/models/gpt-4")[0] == 404


def test_tokenize(server, tokenizer):
    text = "Hello 你好 👍"
    for name in ("prompt", "content"):
        body = server.ask("/tokenize", {name: text})[2]
        assert body["tokens"] == tokenizer.encode(text)
        assert body["count"] == len(body["tokens"])
    back = server.ask("/detokenize", {"tokens": body["tokens"]})[2]
    assert back == {"prompt": text, "content": text}
    chat = server.ask("/tokenize", {"messages": chat_body("Hi")["messages"]})[2]
    usage = server.chat("Hi", max_tokens=1)["usage"]
    assert chat["count"] == usage["prompt_tokens"]


def test_metrics(server):
    before = {
        name: server.metric(name)
        for name in ("vllm:generation_tokens_total", "vllm:time_to_first_token_seconds_count")
    }
    usage = server.chat("Who are you?", n=2)["usage"]
    generated = server.metric("vllm:generation_tokens_total")
    assert generated - before["vllm:generation_tokens_total"] == usage["completion_tokens"]
    first = server.metric("vllm:time_to_first_token_seconds_count")
    assert first - before["vllm:time_to_first_token_seconds_count"] == 2
    text = server.ask("/metrics")[2]
    for name in (
        *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
        *("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"),
        *("vllm:inter_token_latency_seconds_bucket", "vllm:e2e_request_latency_seconds_sum"),
    ):
        assert f'{name}{{model_name="refrain-mini"' in text or f"{name}{{" in text, name
    assert re.search(r'llaisys:http_requests_total\{path="/v1/models/\{name:path\}"', text)


def test_pages(server):
    status, _, docs = server.ask("/docs")
    assert status == 200
    assert "/v1/chat/completions" in docs
    assert "http://" not in docs
    assert "https://" not in docs
    description = server.ask("/openapi.json")[2]
    assert {"/v1/chat/completions", "/tokenize"} <= set(description["paths"])
    references = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(description))
    assert set(references) <= set(description["components"]["schemas"])
    status, headers, _ = server.ask("/")
    assert status in (200, 307)
    if status == 200:
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


def test_request_ids_and_log(server):
    _, headers, _ = server.ask("/v1/models", headers={"x-request-id": "mine-1"})
    assert headers["x-request-id"] == "mine-1"
    _, headers, _ = server.ask("/v1/models", headers={"x-request-id": 'bad"{id'})
    assert re.fullmatch(r"[0-9a-f]{32}", headers["x-request-id"])
    status, headers, _ = server.ask(CHAT, chat_body("a secret question", max_tokens=3))
    deadline = time.monotonic() + 10  # the line is written once the answer has gone
    while not (found := [e for e in server.requests() if e["id"] == headers["x-request-id"]]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (entry,) = found
    assert (entry["status"], entry["finish"], entry["completion_tokens"]) == (status, "length", 3)
    assert "secret" not in server.log()


# ---- clients that go, or do not read ----


def test_disconnects(server):
    """A thousand that go away in prefill, in decode or while they wait: nothing is left of them."""
    rng = random.Random(1)
    server.chat("Who are you?", max_tokens=1)
    server.idle()
    finished = server.metric("vllm:request_success_total")
    accepted = 0
    for _ in range(25):
        socks = []
        for number in range(40):
            body = {**LONG, "prompt": [rng.randrange(300) for _ in range(rng.choice((3, 600)))]}
            body |= {"stream": rng.random() < 0.6, "n": 1 + number % 2}
            socks.append(server.open(COMPLETIONS, body))
        time.sleep(rng.random() * 0.3)
        for sock in socks:
            if rng.random() < 0.5:  # a reset rather than an orderly end
                sock.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER of 0 s
            sock.close()
        accepted += len(socks)
    server.idle()
    assert server.metric("vllm:request_success_total") > finished
    gone = [entry for entry in server.requests() if entry.get("finish") == "disconnect"]
    assert len(gone) > accepted / 4
    assert server.chat("What is 12 + 30?")["choices"][0]["message"]["content"] == "12 + 30 = 42."


def test_pipelined_requests_of_a_client_that_goes(server):
    """The one being answered ends, too, not only the last of them."""
    body = json.dumps({**LONG, "stream": True}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    before = len([e for e in server.requests() if e.get("finish") == "disconnect"])
    sock = server.open(COMPLETIONS, {**LONG, "n": 16, "stream": True})
    sock.recv(1000)
    sock.sendall((head.encode() + body) * 3)
    time.sleep(0.05)
    sock.close()
    server.idle()
    deadline = time.monotonic() + 5
    while len([e for e in server.requests() if e.get("finish") == "disconnect"]) == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_slow_reader_holds_nobody_up(tmp_path):
    with Served(tmp_path / "log", "--max-seqs", 80, "--stall-timeout", 1) as server:
        socks = [
            server.open(COMPLETIONS, {**LONG, "n": 32, "stream": True}, receive_buffer=2048)
            for _ in range(2)
        ]
        begun = time.monotonic()
        for _ in range(5):
            assert server.chat("Who are you?")["choices"][0]["finish_reason"] == "stop"
        assert time.monotonic() - begun < 10
        server.idle(timeout=60)  # their tokens have been computed, though nobody took them
        deadline = time.monotonic() + 20
        while sum(e.get("finish") == "stall" for e in server.requests()) < 2:
            assert time.monotonic() < deadline, server.log()[-2000:]
            time.sleep(0.1)
        for sock in socks:
            sock.close()


def test_request_timeout(tmp_path):
    with Served(tmp_path / "log", "--request-timeout", "0.3") as server:
        body = {**LONG, "n": 32}
        status, _, answer = server.ask(COMPLETIONS, body)
        assert (status, answer["error"]["code"]) == (504, "timeout")
        *_, last = server.events(COMPLETIONS, body)
        assert last["error"]["code"] == "timeout"
        server.idle()


def test_sign_of_life(tmp_path):
    """A stream that waits in the queue sends comments, which clients skip."""
    program = (
        "import sys; import llaisys.server.hub as hub; hub.KEEP_ALIVE = 0.1; "
        "from llaisys.cli import main; sys.exit(main())"
    )
    with Served(tmp_path / "log", "--max-seqs", 1, program=program) as slow:
        ahead = slow.open(COMPLETIONS, {**LONG, "n": 10})
        time.sleep(0.1)
        _, _, text = slow.ask(COMPLETIONS, {"prompt": "Hello", "max_tokens": 2, "stream": True})
        assert text.startswith(": waiting\n\n")
        assert text.endswith("data: [DONE]\n\n")
        ahead.close()


# ---- full, loading, draining ----


def test_full_queue(tmp_path):
    with Served(tmp_path / "log", "--max-seqs", 2, "--max-queue", 2) as server:

        def ask(number):
            if number % 2:  # streams are refused with a status, too, not within a 200
                sock = server.open(COMPLETIONS, {**LONG, "stream": True})
                with contextlib.closing(sock):
                    received = b""
                    while data := sock.recv(1 << 16):
                        received += data
                        if b"[DONE]" in received or b'"error"' in received:
                            break
                head = received.split(b"\r\n\r\n")[0].decode().lower()
                return int(head.split()[1]), "retry-after: 1" in head
            status, headers, _ = server.ask(COMPLETIONS, LONG)
            return status, headers.get("retry-after") == "1"

        with ThreadPoolExecutor(24) as pool:
            results = list(pool.map(ask, range(24)))
        statuses = [status for status, _ in results]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 4
        assert all(retry == (status == 429) for status, retry in results)
        # more at once than there is room for now: nothing of it stays
        server.idle()
        with contextlib.closing(server.open(COMPLETIONS, {**LONG, "stream": True})) as sock:
            sock.recv(1)
            before = server.metric("vllm:generation_tokens_total")
            assert server.ask(COMPLETIONS, {**LONG, "n": 4})[0] == 429
        server.idle()
        assert server.metric("vllm:generation_tokens_total") - before < 2 * 900
        # and than there is, ever: to try again makes no sense
        for body in ({**LONG, "n": 5}, {**LONG, "prompt": ["Hi"] * 5}):
            status, headers, answer = server.ask(COMPLETIONS, body)
            assert (status, headers.get("retry-after")) == (400, None)
            assert "at most 4 allowed" in answer["error"]["message"]


def test_loading():
    """The server answers while the model is on its way."""
    testclient = pytest.importorskip("starlette.testclient")
    from llaisys.server.app import Server, make_app
    from llaisys.server.config import Config

    client = testclient.TestClient(make_app(Server(Config(str(MINI)))))
    for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("POST", CHAT)):
        answer = client.request(method, path, content=b"{}")
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
    assert client.get("/metrics").status_code == 200


def test_failure_within(monkeypatch):
    """What nobody has foreseen is a 500 in OpenAI's shape, and tells strangers nothing."""
    testclient = pytest.importorskip("starlette.testclient")
    from llaisys.server import app
    from llaisys.server.config import Config

    server = app.Server(Config(str(MINI)))
    client = testclient.TestClient(app.make_app(server))
    monkeypatch.setattr(server.metrics, "text", lambda: 1 / 0)
    answer = client.get("/metrics")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "ZeroDivision" not in answer.text


def test_page(tmp_path, monkeypatch):
    """A page is served with its files, may load and call this server alone, and needs no key."""
    testclient = pytest.importorskip("starlette.testclient")
    from llaisys.server import app
    from llaisys.server.config import Config

    (tmp_path / "page").mkdir()
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (tmp_path / "page" / "index.html").write_text("<script src=page/app.js>", encoding="utf-8")
    (tmp_path / "page" / "app.js").write_text("1", encoding="utf-8")
    monkeypatch.setattr(app, "PAGE", tmp_path / "page")
    client = testclient.TestClient(app.make_app(app.Server(Config(str(MINI), api_keys=("x",)))))
    for path, kind in (("/", "text/html"), ("/page/app.js", "text/javascript")):
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert "script-src 'self';" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("/page/../secret", "/page/%2e%2e/secret", "/page/nothing.js"):
        assert client.get(path).status_code in (401, 404)
    assert client.get("/docs").status_code == 401


def test_drain_lets_answers_finish(tmp_path):
    with Served(tmp_path / "log") as server:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.events, COMPLETIONS, {**LONG, "n": 8})
            while not server.metric("vllm:num_requests_running"):
                time.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 5
            while server.ask("/health")[0] != 503:
                assert time.monotonic() < deadline
            status, headers, body = server.ask(CHAT, chat_body("Hi"))
            assert (status, headers["retry-after"]) == (503, "5")
            assert body["error"]["type"] == "service_unavailable_error"
            events = asked.result()
        finishes = [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]]
        assert finishes == ["length"] * 8
        assert server.process.wait(10) == 0


def test_drain_has_a_limit(tmp_path):
    with (
        Served(tmp_path / "log", "--drain-timeout", "0.5") as server,
        ThreadPoolExecutor(2) as pool,
    ):
        stream = pool.submit(server.events, COMPLETIONS, {**LONG, "n": 60})
        whole = pool.submit(server.ask, COMPLETIONS, {**LONG, "n": 4})
        while server.metric("vllm:num_requests_running") < 64:
            time.sleep(0.01)
        status, seconds = server.end()
        assert status == 0
        assert 0.5 <= seconds < 5
        assert stream.result()[-1]["error"]["code"] == "shutting_down"
        status, headers, body = whole.result()
        assert (status, body["error"]["code"]) == (503, "shutting_down")
        assert headers["retry-after"]


def test_second_signal_ends_at_once(tmp_path):
    with Served(tmp_path / "log") as server, ThreadPoolExecutor(1) as pool:
        stream = pool.submit(server.events, COMPLETIONS, {**LONG, "n": 60})
        while not server.metric("vllm:num_requests_running"):
            time.sleep(0.01)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        status, seconds = server.end(signal.SIGINT)
        assert status == 0
        assert seconds < 3
        assert stream.result()[-1]["error"]["code"] == "shutting_down"


def test_restart_under_load(tmp_path):
    """A server that ends makes room for the next one on its port, whatever its clients do."""
    over, answered = threading.Event(), []

    def ask(server):
        while not over.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, _, _ = server.ask(CHAT, chat_body("Who are you?"))
                answered.append(status)

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Served(tmp_path / "log"))
        stack.callback(over.set)
        threads = [threading.Thread(target=ask, args=(server,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(3):
            answered.clear()
            while answered.count(200) < 5:
                time.sleep(0.01)
            assert server.end()[0] == 0
            server = stack.enter_context(Served(tmp_path / f"log{number}", port=server.port))
        over.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert set(answered) <= {200, 503}
        server.idle()


def test_port_in_use(server):
    done = subprocess.run(
        command("serve", MINI, "--port", server.port, "--device", "cpu"),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert re.fullmatch(r"llaisys: error: 127\.0\.0\.1:\d+ is in use.*\n", done.stderr)
    assert server.ask("/health")[0] == 200


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere"], 1, "nowhere"),
        ([MINI, "--port", "70000"], 1, "70000"),
        ([MINI, "--host", "no.such.host.invalid"], 1, "no.such.host.invalid"),
        ([MINI, "--max-seqs", "0"], 1, "max_seqs"),
        ([MINI, "--drain-timeout", "-1"], 1, "--drain-timeout"),
        ([MINI, "--api-key-file", os.devnull], 1, "API keys"),
        ([MINI, "--port", "x"], 2, "--port"),
    ],
)
def test_bad_command_lines(arguments, status, message):
    if "--port" not in arguments:
        arguments = [*arguments, "--port", "0"]
    done = subprocess.run(
        command("serve", *arguments, "--device", "cpu"),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status
    assert re.fullmatch(rf"llaisys: error: .*{re.escape(message)}.*\n", done.stderr), done.stderr


# ---- who may ask ----


def test_api_key_and_cors(tmp_path):
    options = ("--cors-origin", "https://chat.example")
    with Served(tmp_path / "log", *options, key="sesame-1") as server:
        assert server.chat("What is 12 + 30?")["choices"]
        key, server.headers = server.headers, {}
        for path in ("/v1/models", "/metrics", "/docs", "/openapi.json", "/nowhere"):
            assert server.ask(path)[0] == 401
        for path in (CHAT, COMPLETIONS, "/tokenize", "/detokenize"):
            for given in ({}, {"authorization": "Bearer sesame-2"}, {"authorization": "sesame-1"}):
                status, headers, body = server.ask(path, {}, headers=given)
                assert (status, headers["www-authenticate"]) == (401, "Bearer")
                assert body["error"]["code"] == "invalid_api_key"
        assert server.ask("/health")[0] == 200
        asked = {"origin": "https://chat.example", "access-control-request-method": "POST"}
        status, headers, _ = server.ask(CHAT, method="OPTIONS", headers=asked)
        assert status == 200
        assert headers["access-control-allow-origin"] == "https://chat.example"
        _, headers, _ = server.ask("/v1/models", headers=asked | key)
        assert headers["access-control-allow-origin"] == "https://chat.example"
        _, headers, _ = server.ask("/v1/models", headers=key | {"origin": "https://other.example"})
        assert "access-control-allow-origin" not in headers


def test_no_cors_unasked(server):
    _, headers, _ = server.ask("/v1/models", headers={"origin": "https://chat.example"})
    assert "access-control-allow-origin" not in headers


# ---- the README ----


def test_readme(tmp_path):
    """Its commands and its program, word for word but for the build and the port."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"\n## Serve\n(.*?)\n## ", text, re.DOTALL)[1]
    (script,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    pytest.importorskip("openai", reason="NOT TESTED: the openai package is missing")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    (tmp_path / "program.py").write_text(program.replace("8000", port), encoding="utf-8")
    _build, activate, *rest = script.replace("8000", port).splitlines()
    assert activate == ". .venv/bin/activate; export PYTHONPATH=bindings"
    *rest, end = rest
    assert end.startswith("kill %1; wait %1")
    # a python first on PATH, as the one that activate puts there
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    lines = ["set -e", f'export PATH="{tmp_path}:$PATH" PYTHONPATH=bindings', *rest]
    lines += [f"python {tmp_path}/program.py", end]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.count("12 + 30 = 42.") == 2
    assert "7 + 5 = 12." in done.stdout
    assert "drained" in done.stderr
