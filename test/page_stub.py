"""A stand-in for the server, for tests of the chat page: OpenAI's API with answers by heart.

The last question chooses the answer: see ANSWERS and Handler. Everything asked is in Stub.asked.
"""

import json
import mimetypes
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "bindings/llaisys/server/page"
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

HOSTILE = """<script>window.hacked = 1</script>
<img src=x onerror="window.hacked = 2"><svg onload="window.hacked = 3">
<iframe srcdoc="<script>parent.hacked = 4</script>"></iframe>
[a](javascript:window.hacked=5) [b](JaVaScRiPt:window.hacked=6) [c](data:text/html,<script>)
[d](vbscript:x) <javascript:alert(1)> ![e](https://example.com/spy.png) [f](/metrics)
[g](https://example.com/"onmouseover="window.hacked=7)

# <b onclick="window.hacked = 8">title</b>

```"><script>window.hacked = 9</script>
</code></pre><script>window.hacked = 10</script>
```

| <u>x</u> | y |
|---|---|
| <script>window.hacked = 11</script> | [z](javascript:0) |
"""

MARKDOWN = r"""# Title

Some **bold**, *italic*, ***both***, ~~gone~~, `code <b>`, snake_case_name and 2 * 3 * 4.
A [link](https://example.com/a_(b)) and https://example.com/c, in a line.

1. one
   - inner **x**

   ```python
   print("in a list")
   ```
2. two
- [x] done

> quoted
> > twice

| a | b |
|:--|--:|
| 1 | `x\|y` |

---

\[ E = mc^2 \]

In 1984
1984. was a year, \(a_1 * b_2 * c\) and \*stars\*.
"""

ANSWERS = {
    "hostile": HOSTILE,
    "markdown": MARKDOWN,
    "slow": " ".join(f"word{i}" for i in range(2000)),
    "huge": "".join(f"Line {i} of **many**.\n\n" for i in range(3000))
    + "```\n"
    + "x = [1, 2, 3]\n" * 20_000
    + "```\n"
    + "*_[`<(" * 20_000
    + "> " * 5_000
    + "a" * 200_000,
}


class Stub(ThreadingHTTPServer):
    """Serves on a free port until close()."""

    daemon_threads = True

    def __init__(self, key: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.key = key
        self.asked: list[dict[str, Any]] = []  # bodies of chat completions
        self.sessions: list[str] = []  # their X-Session-Id
        self.aborted = 0  # answers whose reader went away
        self.is_loading = False
        self.url = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self._json(503 if self.server.is_loading else 200, {"status": "loading"})
        elif self.path == "/v1/models":
            if self._may_enter():
                self._json(200, {"object": "list", "data": [{"id": "stub"}, {"id": "other"}]})
        elif self.path == "/" or re.fullmatch(r"/page/[\w.]+", self.path):
            self._file(PAGE / (self.path.removeprefix("/page/").strip("/") or "index.html"))
        else:
            self._json(404, {"error": {"message": "there is no such page"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._may_enter():
            self.server.asked.append(body)
            self.server.sessions.append(self.headers["X-Session-Id"])
            self._answer(body["messages"])

    def _may_enter(self) -> bool:
        if self.server.key in ("", self.headers.get("Authorization", "").removeprefix("Bearer ")):
            return True
        self._json(401, {"error": {"message": "no valid API key"}})
        return False

    def _answer(self, messages: list[dict[str, str]]) -> None:
        question = messages[-1]["content"]
        before = sum(asked["messages"] == messages for asked in self.server.asked[:-1])
        if question == "busy" and not before:
            self._json(429, {"error": {"message": "the queue is full"}}, {"Retry-After": "2"})
            return
        if question == "too long":
            self._json(400, {"error": {"message": "the prompt has 9000 tokens, room is for 4096"}})
            return
        text = ANSWERS.get(question, f"You said: {question}" + f" ({before})" * bool(before))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            self._stream(question, text, messages)
        except OSError:
            self.server.aborted += 1

    def _stream(self, question: str, text: str, messages: list[dict[str, str]]) -> None:
        self._event({"role": "assistant", "content": ""})
        if question == "think":
            for word in ("Let me ", "think **hard**", " of it."):
                self._event({"reasoning_content": word})
                time.sleep(0.02)
        pieces = re.findall(r"\S*\s*", text)[:-1]
        if question == "huge":
            pieces = [text[i : i + 4000] for i in range(0, len(text), 4000)]
        for i, piece in enumerate(pieces):
            self._event({"content": piece})
            time.sleep(0.02 if question == "slow" else 0.004)
            if i == 2 and question == "drop":
                return
            if i == 2 and question == "fail":
                self._send({"error": {"message": "the engine failed: <b>no</b> reason"}})
                return
        self._event({}, "length" if question == "length" else "stop")
        usage = {"prompt_tokens": 40 * len(messages), "completion_tokens": len(pieces)}
        usage["prompt_tokens_details"] = {"cached_tokens": 40 * (len(messages) - 1)}
        self._send({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, delta: dict[str, str], finish: str | None = None) -> None:
        self._send({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    def _send(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(b": comment\r\ndata: " + json.dumps(chunk).encode() + b"\r\n\r\n")

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._bytes(
            status,
            json.dumps(value).encode(),
            {"Content-Type": "application/json"} | (headers or {}),
        )

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._json(404, {"error": {"message": "there is no such file"}})
            return
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        self._bytes(
            200, path.read_bytes(), {"Content-Type": kind, "Content-Security-Policy": POLICY}
        )

    def _bytes(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
