"""Replicas by Ray Serve on one machine: both answer, and one that dies is missed by nobody for long."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from openai import APIStatusError, OpenAI

from benchmarks.live import LiveServer
from qwen_onnx.errors import EnvironmentFault
from qwen_onnx.runtime.server import ray_serve

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def cluster(tiny_build: Path) -> Iterator[LiveServer]:
    with LiveServer("qwen_onnx.runtime.server.ray_serve", [str(tiny_build), "--replicas", "2"]) as server:
        yield server


def ask(server: LiveServer) -> tuple[str, str]:
    """Name of the replica and its answer."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    raw = client.chat.completions.with_raw_response.create(
        model=server.model, messages=MESSAGES, max_tokens=8, temperature=0
    )
    return raw.headers["x-replica"], raw.parse().choices[0].message.content or ""


def names(server: LiveServer, count: int, seconds: float = 60) -> dict[str, str]:
    """Ask until ``count`` replicas have answered; replica to answer."""
    answers: dict[str, str] = {}
    deadline = time.monotonic() + seconds
    while len(answers) < count and time.monotonic() < deadline:
        answers.update([ask(server)])
    return answers


def replica_processes(server: LiveServer) -> list[psutil.Process]:
    """Those that descend from this server, and nobody else's."""
    return [p for p in server.processes() if p.is_running() and " ".join(p.cmdline()).startswith("ray::ServeReplica")]


@pytest.mark.release
def test_both_replicas_answer_alike_and_stream(cluster: LiveServer) -> None:
    answers = names(cluster, 2)
    assert len(answers) == 2
    assert len(set(answers.values())) == 1
    client = OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(
        model=cluster.model, messages=MESSAGES, max_tokens=1000, temperature=0, stream=True
    )
    arrivals = [time.monotonic() for _ in stream]
    assert len(arrivals) > 20
    assert arrivals[-1] - arrivals[0] > 0.05, "all pieces came at once"


@pytest.mark.release
def test_a_replica_that_is_killed_comes_back(cluster: LiveServer) -> None:
    before = names(cluster, 2)
    replica_processes(cluster)[0].kill()
    lost, after = 0, dict(before)
    deadline = time.monotonic() + 90
    while len(after) < 3 and time.monotonic() < deadline:
        try:
            after.update([ask(cluster)])
        except APIStatusError:
            # what was on its way to the dead replica is lost
            lost += 1
    assert len(after) == 3, "no new replica answered"
    assert set(after.values()) == set(before.values())
    assert lost <= 3


@pytest.mark.release
def test_the_api_is_on_the_loopback_address_alone(cluster: LiveServer) -> None:
    """Ray's own ports are on every address, which docs/deploy.md says; they ask for a token."""
    listening = {
        connection.laddr.ip
        for process in cluster.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == cluster.port
    }
    assert listening == {"127.0.0.1"}


@pytest.mark.release
def test_ray_sends_no_statistics_and_asks_for_a_token(cluster: LiveServer) -> None:
    [raylet] = [process for process in cluster.processes() if process.name() == "raylet"]
    environment = raylet.environ()
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environment["RAY_AUTH_MODE"] == "token"


@pytest.mark.release
def test_sigterm_ends_it_and_its_replicas(cluster: LiveServer) -> None:
    """The last test of the module: the cluster is gone afterwards."""
    family = cluster.processes()
    assert cluster.stop() == 0
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive


def test_a_missing_extra_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'qwen-onnx\[ray\]'"):
        ray_serve.deployment(Path("artifact"), "tiny", replicas=1, threads=1)


@pytest.mark.slow
def test_a_folder_that_is_no_artifact_starts_no_ray(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qwen_onnx.runtime.server.ray_serve", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 6
    assert "error:" in done.stderr
