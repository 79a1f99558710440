"""The jobs as tasks of a Ray cluster that runs already; the job itself is the one that runs locally.

A task whose machine or process dies is run again elsewhere by Ray. A worker that sees the release's folder (a shared
disk) works right in it; any other works in its own cache and sends what it made, in pieces, to an actor beside the
driver that writes them down. Nothing of a worker that died is ever taken: each attempt has a folder of its own, and
only a task's return value makes it the job's.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen_onnx.errors import ConfigError, EnvironmentFault, ReleaseError
from qwen_onnx.release.job import Task, run_job
from qwen_onnx.release.local import SayOf
from qwen_onnx.release.records import JobResult
from qwen_onnx.release.store import Store, whole

RETRIES = 3
# of a file, at a time: each piece is in the memory of three processes
PIECE = 16 << 20
SEEN = ".seen-by-workers"
POLL_S = 0.5


class Inbox:
    """On the driver's machine: makes attempts' folders, writes what comes, passes on what is said."""

    def __init__(self, root: str) -> None:
        self._root, self._said = Path(root), list[tuple[str, str]]()

    def say(self, job: str, stage: str) -> None:
        """A job's step begins."""
        self._said.append((job, stage))

    def said(self) -> list[tuple[str, str]]:
        """What was said since the last call."""
        said, self._said = self._said, []
        return said

    def write(self, folder: str, name: str, offset: int, data: bytes) -> None:
        """A piece of a file of an attempt; the same piece may come twice."""
        path = self._root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if path.exists() else "wb") as file:
            file.seek(offset)
            file.write(data)


def remote_job(task: str, root: str, token: str, inbox: Any) -> tuple[str, str]:
    """On a worker: one attempt at a job.

    Args:
        task: JSON of a ``Task``.
        root: of the driver's store, and ``token`` what its file ``SEEN`` holds.

    Returns:
        Name of the attempt's folder in the store, and JSON of the result.
    """
    import ray

    wanted = Task.model_validate_json(task)
    store, attempt = Store(Path(root)), uuid.uuid4().hex[:8]
    node = ray.get_runtime_context().get_node_id()

    def say(stage: str) -> None:
        ray.get(inbox.say.remote(wanted.job.name, f"{stage} on {node[:8]}"))

    if _sees(store.root, token):
        folder = store.unfinished(wanted.job, attempt)
        result = run_job(wanted, folder, say)
    else:
        own = _own_cache() / "release-worker"
        folder = own / f"{wanted.job.slug}-{attempt}"
        folder.mkdir(parents=True)
        here = wanted.model_copy(update={"cache": _own_cache(), "artifacts": own / "artifacts", "root": _own_root()})
        try:
            result = run_job(here, folder, say)
            _send(folder, store.unfinished_name(wanted.job, attempt), inbox)
        finally:
            shutil.rmtree(folder)
    return store.unfinished_name(wanted.job, attempt), result.model_copy(update={"worker": node}).model_dump_json()


def _sees(root: Path, token: str) -> bool:
    try:
        return (root / SEEN).read_text(encoding="utf-8") == token
    except OSError:
        return False


def _own_root() -> Path:
    from qwen_onnx.catalog.load import find_root
    from qwen_onnx.files import PACKAGE

    return find_root(PACKAGE)


def _own_cache() -> Path:
    """Of this worker: ``$QWEN_ONNX_CACHE``, or the user's cache."""
    own = os.environ.get("QWEN_ONNX_CACHE")
    return Path(own) if own else Path.home() / ".cache/qwen-onnx"


def _send(folder: Path, name: str, inbox: Any) -> None:
    import ray

    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            offset = 0
            # an empty file is one empty piece
            while (data := file.read(PIECE)) or offset == 0:
                # one at a time: a worker that is faster than the driver's disk must wait
                ray.get(inbox.write.remote(name, path.relative_to(folder).as_posix(), offset, data))
                offset += max(len(data), 1)


def run_on_ray(tasks: Sequence[Task], store: Store, address: str, say: SayOf) -> Iterator[JobResult]:
    """Run ``tasks`` on the cluster at ``address`` and yield their results as they end.

    Raises:
        EnvironmentFault: Ray is not installed, or no cluster answers.
        ReleaseError: no machine of the cluster is large enough for a job; every try at a job lost its worker.
    """
    ray = _connected(address)
    try:
        _check_room(ray, tasks)
        yield from _submitted(ray, tasks, store, say)
    finally:
        ray.shutdown()


def _connected(address: str) -> Any:
    if address.startswith("ray://"):
        raise ConfigError(
            ["--address: a Ray client has no machine in the cluster, which packages could be sent to"],
            hint="run it on a machine of the cluster, with its address as HOST:PORT or auto",
        )
    # read when Ray is imported: no statistics leave this machine
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise EnvironmentFault("Ray is not installed", hint="pip install 'qwen-onnx[ray]'") from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EnvironmentFault(
            f"no Ray cluster answers: {error}", where=address, hint="start one: ray start --head"
        ) from error
    return ray


def _check_room(ray: Any, tasks: Sequence[Task]) -> None:
    """Ray would wait for ever for a machine that is large enough."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for job in (task.job for task in tasks):
        if not any(node.get("CPU", 0) >= job.cpus and node.get("memory", 0) >= job.memory for node in nodes):
            sizes = ", ".join(f"{node.get('CPU', 0):g} CPUs {node.get('memory', 0) / 1e9:.1f} GB" for node in nodes)
            raise ReleaseError(
                f"{job.name} asks for {job.cpus} CPUs and {job.memory / 1e9:g} GB, no machine of the cluster has both",
                where=sizes,
                hint="lower `cpus` or `memory` in the matrix, or add a machine",
            )


def _submitted(ray: Any, tasks: Sequence[Task], store: Store, say: SayOf) -> Iterator[JobResult]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token = uuid.uuid4().hex
    (store.root / SEEN).write_text(token, encoding="utf-8")
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    inbox = ray.remote(Inbox).options(num_cpus=0, scheduling_strategy=here).remote(str(store.root))
    remote = ray.remote(remote_job)
    running = {}
    for task in tasks:
        options = {"num_cpus": task.job.cpus, "memory": task.job.memory, "max_retries": RETRIES, "name": task.job.name}
        running[remote.options(**options).remote(task.model_dump_json(), str(store.root), token, inbox)] = task
        say(task.job.name, "waiting for a machine")
    while running:
        ended, _ = ray.wait(list(running), timeout=POLL_S)
        for job, stage in ray.get(inbox.said.remote()):
            say(job, stage)
        for reference in ended:
            yield _taken(ray, reference, running.pop(reference), store)
    # of attempts whose worker died
    store.sweep()
    (store.root / SEEN).unlink()


def _taken(ray: Any, reference: Any, task: Task, store: Store) -> JobResult:
    """The result of an ended task, its folder put in the job's place."""
    begin = time.monotonic()
    try:
        name, told = ray.get(reference)
    except ray.exceptions.RayError as error:
        # the cluster's failure is this job's: the others go on
        name, told = _lost(task, store, f"{type(error).__name__}: {error}", begin)
    result = JobResult.model_validate_json(told)
    if not whole(store.root / name, result):
        broken = {"passed": False, "key": None, "stage": "transfer", "exit_code": ReleaseError.exit_code}
        fault = "the packages are not those that the worker made"
        result = result.model_copy(update={**broken, "fault": fault, "packages": ()})
    store.finish(task.job, store.root / name, result)
    return result


def _lost(task: Task, store: Store, fault: str, begin: float) -> tuple[str, str]:
    folder = store.unfinished(task.job, uuid.uuid4().hex[:8])
    (folder / "job.log").write_text(fault + "\n", encoding="utf-8")
    result = JobResult(
        name=task.job.name,
        model=task.job.model,
        target=task.job.target,
        precision=task.job.precision,
        key=None,
        passed=False,
        stage="ray",
        fault=fault,
        exit_code=ReleaseError.exit_code,
        seconds=time.monotonic() - begin,
    )
    return folder.name, result.model_dump_json()
