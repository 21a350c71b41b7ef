"""deploy/: what it says is checked by the programs that read it, and against the server's own names."""

import collections
import json
import re
import shutil
import subprocess
import sys
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


def test_dockerfile_copies_what_there_is() -> None:
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    sources = {name for line in copied for name in line.split()}
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text()
    assert {name for name in sources if not (ROOT / name).exists()} == set()
    assert sources == set(re.findall(r"^!(.+)$", allowed, re.MULTILINE))
