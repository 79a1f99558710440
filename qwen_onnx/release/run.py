"""Matrix → jobs → one folder with every package, what was measured and what it is made of.

Jobs that are finished under the same key are taken as they are, so a release that was killed goes on where it was. The
folder appears by one rename; with a failed job it appears as ``<output>.rejected`` and the last good one stays.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from qwen_onnx import __version__
from qwen_onnx.artifact.checksums import write_sums
from qwen_onnx.artifact.store import build_lock, put_in_place, rejected_place, staging_folder
from qwen_onnx.catalog.load import Catalog
from qwen_onnx.catalog.plan import make_plan
from qwen_onnx.errors import ConfigError, ReleaseError
from qwen_onnx.release.job import Task
from qwen_onnx.release.local import run_local
from qwen_onnx.release.matrix import ReleaseJob
from qwen_onnx.release.records import JUNIT, RELEASE, JobResult, Release
from qwen_onnx.release.store import LOG, Store, code_key, job_key, link_or_copy
from qwen_onnx.release.summary import junit

Say = Callable[[str, str], None]


@dataclass(frozen=True)
class ReleaseOrder:
    """What to release and where.

    Attributes:
        jobs: the whole matrix; ``only`` are patterns of names that pick some of it, none for all.
        output: folder of the release; ``artifacts`` the one that artifacts are built in.
        sources: local weights by model.
        workers: jobs at a time on this machine.
        fresh: take nothing that is there already.
        address: of a Ray cluster, ``auto`` for the one of this machine.
    """

    catalog: Catalog
    jobs: tuple[ReleaseJob, ...]
    output: Path
    artifacts: Path
    cache: Path
    only: tuple[str, ...] = ()
    sources: Mapping[str, Path] = field(default_factory=dict)
    workers: int = 1
    fresh: bool = False
    on: Literal["local", "ray"] = "local"
    address: str = "auto"


def chosen(order: ReleaseOrder) -> tuple[ReleaseJob, ...]:
    """The jobs that ``only`` names.

    Raises:
        ConfigError: a pattern that matches no job, a source for a model that no job builds.
    """
    names = [job.name for job in order.jobs]
    idle = [pattern for pattern in order.only if not fnmatch.filter(names, pattern)]
    faults = [f"--only {pattern}: matches no job; there are {', '.join(names)}" for pattern in idle]
    models = {job.model for job in order.jobs}
    faults += [f"--source {model}=…: no job builds {model}" for model in sorted(order.sources.keys() - models)]
    if faults:
        raise ConfigError(faults)
    return tuple(job for job in order.jobs if not order.only or any(fnmatch.fnmatch(job.name, p) for p in order.only))


def release(order: ReleaseOrder, say: Say) -> tuple[Release, Path]:
    """Run every job that is not finished yet and publish the release; returns it and its folder.

    Args:
        say: told a job's name and what it is at.

    Raises:
        ConfigError: see ``chosen``.
        ReleaseError: a part would replace a whole release; two packages have one name.
        BuildLockedError: another process makes this release.
    """
    jobs = chosen(order)
    complete = len(jobs) == len(order.jobs)
    with build_lock(order.output, wait=False):
        _refuse_part(order.output, complete)
        store = Store.of(order.output, order.cache)
        results = {result.name: result for result in _results(order, jobs, store, say)}
        made = Release(
            passed=all(result.passed for result in results.values()),
            complete=complete,
            qwen_onnx=__version__,
            jobs=tuple(results[job.name] for job in jobs),
        )
        return made, _publish(made, jobs, store, order.output)


def _refuse_part(output: Path, complete: bool) -> None:
    try:
        there = Release.model_validate_json((output / RELEASE).read_bytes())
    except FileNotFoundError as error:
        if output.exists():
            raise ReleaseError("the folder there is not a release", where=str(output), hint="--output") from error
        return
    except ValidationError as error:
        raise ReleaseError(f"{RELEASE} is damaged", where=str(output), hint="move it away, or --output") from error
    if there.complete and not complete:
        raise ReleaseError(
            "a release with every job is there, and --only would replace it by a part",
            where=str(output),
            hint="give the part an --output of its own",
        )


def _results(order: ReleaseOrder, jobs: Sequence[ReleaseJob], store: Store, say: Say) -> Iterator[JobResult]:
    tasks = []
    for job in jobs:
        plan, source = make_plan(order.catalog, job.model, job.target, job.precision), order.sources.get(job.model)
        code = code_key(plan, source)
        found = None if order.fresh else store.found(job, job_key(job, plan, order.cache, source, code))
        if found:
            say(job.name, "finished already")
            yield found
            continue
        tasks.append(
            Task(
                job=job,
                root=order.catalog.root,
                artifacts=order.artifacts,
                cache=order.cache,
                source=source,
                force=order.fresh,
                code=code,
            )
        )
    for result in _executed(order, tasks, store, say):
        say(result.name, "passed" if result.passed else f"FAILED: {result.stage}")
        yield result


def _executed(order: ReleaseOrder, tasks: Sequence[Task], store: Store, say: Say) -> Iterator[JobResult]:
    if order.on == "local" or not tasks:
        return run_local(tasks, store, order.workers, say)
    from qwen_onnx.release.on_ray import run_on_ray

    return run_on_ray(tasks, store, order.address, say)


def _publish(made: Release, jobs: Sequence[ReleaseJob], store: Store, output: Path) -> Path:
    target = output if made.passed else rejected_place(output)
    with staging_folder(output) as staging:
        folder = staging / "release"
        (folder / "logs").mkdir(parents=True)
        for job, result in zip(jobs, made.jobs, strict=True):
            link_or_copy(store.folder(job) / LOG, folder / "logs" / f"{job.slug}.log")
            for package in result.packages:
                _place(store.folder(job) / package.folder, folder / package.folder)
        (folder / RELEASE).write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (folder / JUNIT).write_text(junit(made), encoding="utf-8")
        write_sums(folder)
        put_in_place(folder, target)
    return target


def _place(package: Path, target: Path) -> None:
    if target.exists():
        raise ReleaseError(f"two jobs have a package {target.name}", hint="the matrix may list only one of them")
    for path in sorted(package.rglob("*")):
        if path.is_file():
            place = target / path.relative_to(package)
            place.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(path, place)
