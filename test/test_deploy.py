"""deploy/: what it says is checked by the programs that read it, and against the server's own names."""

import collections
import fnmatch
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if not found:
        pytest.skip(f"deploy/: no {name}")
    return found


def check(*command: object) -> None:
    done = subprocess.run(
        list(map(str, command)), check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    shown = [target["expr"] for panel in panels for target in panel["targets"]]
    asked = [v["definition"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    alerts = re.findall(r"expr: (.+)", (DEPLOY / "llaisys-alerts.yml").read_text())
    return shown + asked + alerts


def test_metrics_are_those_of_the_server() -> None:
    metrics = pytest.importorskip(
        "llaisys.server.metrics", reason="deploy/: no server in this tree"
    )
    told = metrics.Metrics("model")
    told.stats = lambda: collections.defaultdict(lambda: 1)
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)", told.text().decode(), re.MULTILINE))
    names = {name + "_bucket" * (kind == "histogram") for name, kind in kinds.items()}
    used = {name for text in expressions() for name in re.findall(r"\b(?:vllm|llaisys):\w+", text)}
    assert len(used) > 15
    assert used <= names


def test_prometheus_understands_them(tmp_path: Path) -> None:
    promtool = tool("promtool")
    check(promtool, "check", "config", "--syntax-only", DEPLOY / "prometheus.yml")
    check(promtool, "check", "rules", DEPLOY / "llaisys-alerts.yml")
    texts = [text for text in expressions() if not text.startswith("label_values")]
    rules = [
        {"record": f"r{i}", "expr": re.sub(r"\$__\w+", "1m", text)} for i, text in enumerate(texts)
    ]
    path = tmp_path / "rules.yml"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    check(promtool, "check", "rules", path)


def test_nginx_understands_its_file(tmp_path: Path) -> None:
    nginx, openssl = tool("nginx"), tool("openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    new = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=llm.example.com")
    check(openssl, *new, "-keyout", key, "-out", certificate)
    site = (DEPLOY / "nginx.conf").read_text()
    site = re.sub(r"(ssl_certificate_key +)\S+;", rf"\g<1>{key};", site)
    site = re.sub(r"(ssl_certificate +)\S+;", rf"\g<1>{certificate};", site)
    site = re.sub(r"(access_log )\S+", rf"\g<1>{tmp_path}/access.log", site)
    whole = f"pid {tmp_path}/pid; error_log {tmp_path}/error.log;\nevents {{}}\nhttp {{\n{site}}}\n"
    path = tmp_path / "nginx.conf"
    path.write_text(whole)
    check(nginx, "-t", "-c", path)


def test_systemd_understands_its_unit(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    unit = tmp_path / "llaisys@.service"
    # the program has to be there, though not to be ours
    text = (DEPLOY / "llaisys@.service").read_text()
    unit.write_text(text.replace("/opt/llaisys/bin/llaisys", sys.executable))
    done = subprocess.run(
        [analyze, "verify", unit], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert unit.name not in done.stderr


def test_dockerfile_is_clean() -> None:
    check(tool("hadolint"), DEPLOY / "Dockerfile")


def stages() -> dict[str, list[tuple[str, str]]]:
    """The Dockerfile's instructions, by stage; those before the first FROM are stage ""."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: dict[str, list[tuple[str, str]]] = {"": []}
    for line in filter(None, text.replace("\\\n", " ").splitlines()):
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            found[rest.partition(" AS ")[2] or "image"] = []
        list(found.values())[-1].append((instruction, rest))
    return found


def image(instruction: str) -> str:
    """The last value that the last stage gives."""
    return [rest for name, rest in stages()["image"] if name == instruction][-1]


def test_dockerfile_copies_what_there_is() -> None:
    copies = [rest.split() for stage in stages().values() for name, rest in stage if name == "COPY"]
    sources = {name for words in copies if words[0] != "--from=build" for name in words[:-1]}
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text()
    assert {name for name in sources if not (ROOT / name).exists()} == set()
    assert sources == set(re.findall(r"^!(.+)$", allowed, re.MULTILINE))


def test_dockerfile_copies_no_more_than_the_repository_has() -> None:
    """What git ignores among the folders copied, the build's context leaves out."""
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    sources = [line[1:] for line in lines if line.startswith("!")]
    left_out = {line.removeprefix("**/") for line in lines[2:] if not line.startswith("!")}
    for pattern in filter(None, (ROOT / ".gitignore").read_text().splitlines()):
        path = pattern.strip("/")
        if not pattern.startswith("/"):  # caches of tools, which run in the root folder
            assert path.startswith(".") or path in left_out
        elif any(path.startswith(f"{source}/") for source in sources):
            assert any(fnmatch.fnmatchcase(path, allowed) for allowed in left_out), path


def test_image_builds_the_library_from_what_it_copies() -> None:
    copied = {
        name
        for instruction, rest in stages()["build"]
        if instruction == "COPY"
        for name in rest.split()[:-1]
    }
    read = re.findall(r"'([\w./]+\.(?:cu|[ch]|map))'", (ROOT / "meson.build").read_text())
    assert len(read) > 60
    assert [path for path in read if not any(path.startswith(name + "/") for name in copied)] == []


def test_image_starts_the_server_without_privileges() -> None:
    """The command, the user and the health check, as the server knows them."""
    from llaisys.cli import _parser

    command = json.loads(image("ENTRYPOINT")) + json.loads(image("CMD"))
    assert command[0] == "llaisys"
    args = _parser().parse_args(command[1:])
    assert args.host == "0.0.0.0"  # or its published port would reach nothing
    assert image("EXPOSE") == str(args.port)
    models = [rest for name, rest in stages()["image"] if name == "COPY"][-1]
    assert models.split()[-1] == str(args.model)
    assert all(int(number) > 0 for number in image("USER").split(":"))


def test_health_check_of_the_image() -> None:
    """It runs as it is written, against a server that answers 200, then 503, then not at all."""
    check = json.loads(image("HEALTHCHECK").partition(" CMD ")[2])
    status = 200

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    def exits() -> int:
        port = str(server.server_port)
        command = [sys.executable, *(word.replace("8000", port) for word in check[1:])]
        proxies = {"http_proxy": "http://127.0.0.1:1"}  # which Docker gives containers
        return subprocess.run(
            command, check=False, capture_output=True, timeout=30, env=os.environ | proxies
        ).returncode

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            assert check[0] == "python3"
            assert exits() == 0
            status = 503
            assert exits() == 1
        finally:
            server.shutdown()
    assert exits() == 1
