"""Releases on Ray: two workers on this machine, one of which dies, and one that shares no disk."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from qwen_onnx.artifact.checksums import check_sums
from qwen_onnx.release.on_ray import Inbox
from tests.conftest import REPOSITORY
from tests.release.conftest import last_line, own_recipe, release_command, write_matrix
from tests.release.test_guard import gone
from tests.release.test_release import read_release

JOBS = ({"precisions": ["fp32"]}, {"precisions": ["int8"]})
WORKER = {"num_cpus": 1, "memory": 4 * 10**9, "object_store_memory": 80 << 20}
OLIVE = "qwen_onnx.export.worker"


@pytest.fixture
def cluster(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster whose first machine runs no jobs."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "memory": 10**9, "object_store_memory": 80 << 20, "include_dashboard": False}
    made = patiently(lambda: Cluster(initialize_head=True, connect=False, head_node_args=head))
    try:
        yield made
    finally:
        made.shutdown()


def patiently(begin: Callable[[], Any]) -> Any:
    """Ray gives a machine 30 seconds to start, which two busy cores may need more than once."""
    for _ in range(3):
        with contextlib.suppress(Exception):
            return begin()
    return begin()


def start(
    cluster: Any, place: Path, checkpoint: Path, *entries: dict[str, Any], recipe: Path | None = None
) -> subprocess.Popen[str]:
    more = ["--on", "ray", "--address", cluster.address, *(["--recipe", str(recipe)] if recipe else [])]
    model = "mine" if recipe else "starter"
    arguments = release_command(place, checkpoint, write_matrix(place, *entries), *more, model=model)
    command = [sys.executable, "-m", "qwen_onnx.cli.app", *arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    said, complained = process.communicate(timeout=400)
    return subprocess.CompletedProcess(process.args, process.returncode, said, complained)


def raylet(node: Any) -> psutil.Process:
    [info] = node.all_processes["raylet"]
    return psutil.Process(info.process.pid)


def awaited(condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


def building(node: Any) -> list[psutil.Process]:
    """The processes below this node, once one of them is Olive's."""
    family = raylet(node).children(recursive=True)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            if OLIVE in process.cmdline():
                return family
    return []


def worker_of(family: list[psutil.Process]) -> psutil.Process:
    """Ray's process that runs the job: whose child the guard is."""
    return next(
        process.parent()
        for process in family
        if "qwen_onnx.release.guard" in process.cmdline()  # type: ignore[misc]
    )


@pytest.mark.release
def test_a_release_is_whole_though_a_machine_and_a_worker_are_killed(
    cluster: Any, place: Path, tiny_checkpoint: Path
) -> None:
    first, second = (patiently(lambda: cluster.add_node(**WORKER)) for _ in range(2))
    cluster.wait_for_nodes()
    process = start(cluster, place, tiny_checkpoint, *JOBS)
    lost = awaited(lambda: building(first))
    hit = awaited(lambda: building(second))
    # Ray's own helpers of that machine end in their own time
    ours = {child.pid: line for child in lost if "qwen_onnx" in (line := " ".join(child.cmdline()))}
    assert len(ours) >= 3
    survivor = raylet(second)
    # a whole machine, and the process of a job on the other one
    [info] = first.all_processes["raylet"]
    info.process.kill()
    # its workers ask the kernel whether it lives, and a process that nobody waited for still seems to
    info.process.wait()
    worker_of(hit).kill()
    assert [line for pid, line in ours.items() if not gone(pid, seconds=60)] == []
    done = finished(process)
    assert done.returncode == 0, done.stderr
    assert survivor.is_running()
    assert last_line(done)["passed"]
    check_sums(place / "release")
    jobs = read_release(place / "release").jobs
    assert [job.name for job in jobs] == ["starter/cpu-fp32", "starter/cpu-int8"]
    assert {job.worker for job in jobs} == {second.node_id}
    assert not list(place.rglob(".unfinished*"))
    assert not list(place.rglob(".*staging*"))


@contextlib.contextmanager
def unshared_worker(cluster: Any, hidden: Path, cache: Path) -> Iterator[None]:
    """A machine of the cluster that sees an empty folder where ``hidden`` is."""
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    with contextlib.suppress(FileNotFoundError, subprocess.CalledProcessError):
        probe = f"mount -t tmpfs none {hidden}"
        subprocess.run([*namespace, "sh", "-c", probe], check=True, capture_output=True)
        ray = f"{sys.executable} -m ray.scripts.scripts start --block --address={cluster.address}"
        size = f"--num-cpus=1 --memory={WORKER['memory']} --object-store-memory={WORKER['object_store_memory']}"
        started = subprocess.Popen(
            [*namespace, "sh", "-c", f"{probe} && exec {ray} {size}"],
            env={**os.environ, "QWEN_ONNX_CACHE": str(cache)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield
        finally:
            family = psutil.Process(started.pid).children(recursive=True)
            started.kill()
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            started.wait()
        return
    pytest.skip("this machine lets nobody make a mount namespace")


@pytest.mark.release
def test_a_worker_without_the_disk_gets_the_recipe_and_sends_its_packages(
    cluster: Any, place: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = own_recipe(place / "mine.yaml")
    cache = tmp_path_factory.mktemp("worker")
    with unshared_worker(cluster, place, cache):
        import ray

        ray.init(address=cluster.address, log_to_driver=False)
        awaited(lambda: sum(node["Alive"] for node in ray.nodes()) == 2)
        ray.shutdown()
        entry = {"models": ["mine"], "precisions": ["fp32"]}
        done = finished(start(cluster, place, tiny_checkpoint, entry, recipe=recipe))
    assert done.returncode == 0, done.stderr
    check_sums(place / "release")
    [job] = read_release(place / "release").jobs
    assert job.passed
    assert check_sums(place / "release" / job.packages[0].folder)
    # built elsewhere, and nothing is left there but the artifact
    assert not (place / "mine").exists()
    assert [path.name for path in (cache / "release-worker").iterdir()] == ["artifacts"]


@pytest.mark.release
def test_a_job_that_fits_no_machine_is_told_at_once(cluster: Any, place: Path, tiny_checkpoint: Path) -> None:
    patiently(lambda: cluster.add_node(**WORKER))
    cluster.wait_for_nodes()
    done = finished(start(cluster, place, tiny_checkpoint, {"memory": "5GB"}))
    assert done.returncode == 12
    assert "no machine of the cluster has both" in done.stderr


@pytest.mark.slow
def test_no_cluster_is_told(place: Path, tiny_checkpoint: Path) -> None:
    arguments = release_command(place, tiny_checkpoint, write_matrix(place, {}), "--on", "ray", "--address", "auto")
    command = [sys.executable, "-m", "qwen_onnx.cli.app", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "no Ray cluster answers" in done.stderr


def test_pieces_make_a_file_in_any_order_and_twice(tmp_path: Path) -> None:
    inbox = Inbox(str(tmp_path))
    for offset, data in ((4, b"5678"), (0, b"1234"), (4, b"5678"), (8, b"9")):
        inbox.write("attempt", "packages/model", offset, data)
    inbox.write("attempt", "empty", 0, b"")
    assert (tmp_path / "attempt/packages/model").read_bytes() == b"123456789"
    assert (tmp_path / "attempt/empty").read_bytes() == b""
