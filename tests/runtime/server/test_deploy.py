"""docs/deploy.md: its files are what their programs take, and its proxy passes tokens on one by one."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from openai import OpenAI

from benchmarks.live import LiveServer, free_port
from tests.conftest import REPOSITORY

TEXT = (REPOSITORY / "docs/deploy.md").read_text(encoding="utf-8")
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed: apt-get install nginx-light")


def block(language: str) -> str:
    [found] = re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)
    return found


def commands() -> list[str]:
    return [line for text in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL) for line in text.splitlines()]


@pytest.mark.slow
def test_every_option_of_the_commands_exists() -> None:
    """The programs' own help is asked; ``soak``, ``benchmark`` and ``ray_serve`` have tests that run them."""
    asked = 0
    for command in commands():
        words = command.split()
        if words[0] == "pip":
            continue
        verb = ["keys", "new"] if words[1] == "keys" else ["serve"]
        program = ["qwen_onnx.cli.app", *verb] if words[0] == "qwen-onnx" else [words[2]]
        done = subprocess.run([sys.executable, "-m", *program, "--help"], capture_output=True, text=True, check=True)
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", done.stdout), f"{command}: no {option}"
            asked += 1
    assert asked >= 6


def test_the_probes_are_yaml_and_ask_for_what_is_served() -> None:
    probes = yaml.safe_load(block("yaml"))
    assert {probe["httpGet"]["path"] for probe in probes.values() if isinstance(probe, dict)} == {
        "/health/live",
        "/health/ready",
    }


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_one(tmp_path: Path) -> None:
    unit = tmp_path / "qwen-onnx@.service"
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", block("ini"), flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Unknown" not in done.stderr


def rendered(folder: Path, proxy_port: int, ports: list[int]) -> Path:
    """The document's block within the least configuration; only ports and TLS are changed."""
    text = block("nginx")
    for documented, real in zip((8001, 8002), ports, strict=True):
        assert text.count(f":{documented} ") == 1
        text = text.replace(f":{documented} ", f":{real} ")
    assert "listen 443 ssl;" in text
    text = text.replace("listen 443 ssl;", f"listen 127.0.0.1:{proxy_port};")
    text = re.sub(r"^\s*ssl_certificate.*\n", "", text, flags=re.MULTILINE)
    places = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    head = f"daemon off;\nworker_processes 1;\npid {folder}/pid;\nerror_log {folder}/error.log;\nevents {{}}\n"
    path = folder / "nginx.conf"
    path.write_text(f"{head}http {{\naccess_log off;\n{places}{text}}}\n")
    return path


@pytest.fixture(scope="module")
def servers(tiny_build: Path) -> Iterator[list[LiveServer]]:
    options = ["serve", str(tiny_build), "--threads", "1"]
    with LiveServer("qwen_onnx.cli.app", options) as one, LiveServer("qwen_onnx.cli.app", options) as two:
        yield [one, two]


@contextmanager
def running(path: Path, port: int) -> Iterator[str]:
    """nginx with this configuration, for the length of a with block."""
    command = [str(NGINX), "-c", str(path), "-p", str(path.parent), "-e", str(path.parent / "error.log")]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(100):
            assert child.poll() is None, child.stderr and child.stderr.read()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        child.terminate()
        child.wait(timeout=10)


@pytest.fixture(scope="module")
def proxy(servers: list[LiveServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    path = rendered(tmp_path_factory.mktemp("nginx"), port, [server.port for server in servers])
    with running(path, port) as url:
        yield url


class Patient(BaseHTTPRequestHandler):
    """Sends its second event when the first was seen at the other end, or after two seconds."""

    seen = threading.Event()
    was_seen: bool | None = None

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b"data: 1\n\n")
        type(self).was_seen = self.seen.wait(2)
        self.wfile.write(b"data: 2\n\n")

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.mark.slow
@needs_nginx
@pytest.mark.parametrize("buffering", ["off", "on"])
def test_an_event_passes_before_the_next_one_is_there(buffering: str, tmp_path: Path) -> None:
    """As documented it does; with nginx's default it does not, which shows that this test can tell."""
    Patient.seen.clear()
    upstream = ThreadingHTTPServer(("127.0.0.1", 0), Patient)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    port, other = free_port(), free_port()
    path = rendered(tmp_path, port, [upstream.server_port, other])
    path.write_text(path.read_text().replace("proxy_buffering off", f"proxy_buffering {buffering}"))
    with running(path, port) as url, httpx.stream("GET", url, trust_env=False) as response:
        for _ in (text for text in response.iter_text() if "data: 1" in text):
            Patient.seen.set()
    upstream.shutdown()
    assert Patient.was_seen is (buffering == "off")


@needs_nginx
@pytest.mark.slow
def test_answers_come_through_whole(proxy: str, servers: list[LiveServer]) -> None:
    body: Any = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 64, "temperature": 0}
    direct, proxied = (OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) for url in (servers[0].url, proxy))
    expected = direct.chat.completions.create(model=servers[0].model, **body)
    chunks = list(proxied.chat.completions.create(model=servers[0].model, **body, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected.choices[0].message.content
    assert len(chunks) > 20


@needs_nginx
@pytest.mark.slow
def test_the_proxy_limits_bodies_and_hides_the_metrics(proxy: str) -> None:
    body = b'"' + b"x" * (5 << 20) + b'"'
    with httpx.Client(trust_env=False, base_url=proxy) as client:
        assert client.post("/v1/chat/completions", content=body).status_code == 413
        assert client.get("/metrics").status_code == 403


@needs_nginx
@pytest.mark.slow
def test_one_server_may_die(proxy: str, servers: list[LiveServer]) -> None:
    """The last test of the module: one server is gone afterwards."""
    family = servers[0].processes()
    servers[0].stop()
    psutil.wait_procs(family, timeout=10)
    with httpx.Client(trust_env=False, base_url=proxy) as client:
        assert [client.get("/v1/models").status_code for _ in range(6)] == [200] * 6
