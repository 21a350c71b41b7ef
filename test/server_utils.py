"""A server in a process of its own, and raw HTTP to talk to it."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "models" / "refrain-mini"
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "LLAISYS_API_KEY"} | {
    "PYTHONPATH": str(ROOT / "bindings")
}


def command(*arguments):
    return [sys.executable, "-m", "llaisys", *map(str, arguments)]


class Served:
    """llaisys serve on a free port; log() is what it has written to standard error."""

    def __init__(self, log_file, *options, key=None, port=0, program=None, model=MINI):
        self.log_file = Path(log_file)
        environment = ENVIRONMENT | ({"LLAISYS_API_KEY": key} if key else {})
        self.headers = {"authorization": f"Bearer {key}"} if key else {}
        arguments = command("serve", model, "--device", "cpu", "--threads", 1, "--port", port)
        arguments += [*map(str, options), "--log-format", "json"]
        if program:  # instead of the llaisys command
            arguments[1:3] = ["-c", program]
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(arguments, env=environment, stderr=log)
        deadline = time.monotonic() + 60
        while not (found := re.search(r"listening on http://127.0.0.1:(\d+)", self.log())):
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def log(self):
        return self.log_file.read_text(encoding="utf-8")

    def requests(self):
        """The lines of the log about requests, as dicts."""
        lines = (line for line in self.log().splitlines() if line.startswith("{"))
        return [entry for entry in map(json.loads, lines) if entry["event"] == "request"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def end(self, number=signal.SIGTERM, timeout=30):
        """Sends a signal and returns the exit status and the seconds it took."""
        begun = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(timeout), time.monotonic() - begun

    # ---- requests ----

    def ask(self, path, body=None, method=None, headers=None):
        """Status, headers and body; a dict is sent as JSON and JSON comes back as one."""
        if isinstance(body, (dict, list)):
            body = json.dumps(body)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            method = method or ("GET" if body is None else "POST")
            connection.request(method, path, body, self.headers | (headers or {}))
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.status, response.headers, json.loads(text) if is_json else text.decode()

    def chat(self, question, **options):
        status, _, body = self.ask("/v1/chat/completions", chat_body(question, **options))
        assert status == 200, body
        return body

    def events(self, path, body):
        """The events of a stream, up to [DONE], as dicts."""
        status, headers, text = self.ask(path, {**body, "stream": True})
        assert status == 200, text
        assert headers["content-type"].startswith("text/event-stream")
        assert text.endswith("data: [DONE]\n\n")
        return [json.loads(e.removeprefix("data: ")) for e in text.split("\n\n")[:-2]]

    def open(self, path, body, receive_buffer=None):
        """A socket on which a request has been sent."""
        text = json.dumps(body).encode()
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.connect(("127.0.0.1", self.port))
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(text)}\r\n\r\n"
        sock.sendall(head.encode() + text)
        return sock

    def raw(self, data, timeout=10):
        """What comes back, up to the end of the connection, for bytes as they are."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as sock:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(data)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while data := sock.recv(1 << 16):
                    received += data
            return received

    def metric(self, name):
        """The value of a metric, summed over its labels."""
        text = self.ask("/metrics")[2]
        found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert found, name
        return sum(map(float, found))

    def idle(self, timeout=20):
        """Waits until nothing runs, and checks that every KV block has come back."""
        deadline = time.monotonic() + timeout
        names = (
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "llaisys:kv_blocks_active",
        )
        while any(values := [self.metric(name) for name in names]):
            assert time.monotonic() < deadline, dict(zip(names, values, strict=True))
            time.sleep(0.02)


def chat_body(question, **options):
    return {"messages": [{"role": "user", "content": question}], "temperature": 0, **options}


def joined(events, field="content"):
    """The text of a stream's first choice."""
    parts = (choice for event in events for choice in event["choices"] if choice["index"] == 0)
    return "".join(
        (choice["delta"].get(field) or "") if "delta" in choice else choice["text"]
        for choice in parts
    )
