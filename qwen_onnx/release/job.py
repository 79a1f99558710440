"""One job, the same on this machine and on a worker of Ray: optimize → gates → package → verify, each in a process.

A job that fails is a result, not an exception: the other jobs go on.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from qwen_onnx.artifact.checksums import package_digest
from qwen_onnx.artifact.manifest import MANIFEST, Manifest, read_manifest
from qwen_onnx.artifact.store import rejected_place
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import Plan, make_plan
from qwen_onnx.errors import QwenOnnxError, ReleaseError
from qwen_onnx.files import folder_bytes
from qwen_onnx.package.records import Profile, read_package
from qwen_onnx.records import Record, Verdict
from qwen_onnx.release.gates import estimates, judge
from qwen_onnx.release.guard import Ended, Order
from qwen_onnx.release.matrix import ReleaseJob
from qwen_onnx.release.process import run_guarded
from qwen_onnx.release.records import GateResult, JobResult, PackageResult
from qwen_onnx.release.store import LOG, PACKAGES, code_key, job_key

Say = Callable[[str], None]
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LAST_LINES = 12
RECIPE = "recipe.yaml"


class Task(Record):
    """A job and where it runs.

    Attributes:
        root: folder with recipes and pipelines.
        artifacts: folder of artifacts, ``<model>/<target>-<precision>`` below it.
        cache: downloads and checkpoints.
        source: local weights instead of the recipe's.
        force: build even when the artifact is there.
        code: ``store.code_key`` of whoever asks; a worker with another one must not answer.
    """

    job: ReleaseJob
    root: Path
    artifacts: Path
    cache: Path
    source: Path | None = None
    force: bool = False
    code: str


class StepError(ReleaseError):
    """A step of a job failed; ``code`` is its exit code."""

    def __init__(self, stage: str, what: str, code: int) -> None:
        super().__init__(what, where=stage)
        self.stage, self.code = stage, code


def run_job(task: Task, folder: Path, say: Say) -> JobResult:
    """Carry out a job; whatever goes wrong with it is told in the result.

    Args:
        folder: fresh folder of this attempt; afterwards it holds the log, the packages and, of a model of the user's
            own, the recipe.
        say: told the name of each step as it begins.
    """
    return _Run(task, folder, say).result()


class _Run:
    def __init__(self, task: Task, folder: Path, say: Say) -> None:
        self.task, self.folder, self.say = task, folder, say
        self.job = task.job
        self.artifact = task.artifacts / self.job.name
        self.begin, self.began, self.peak = time.monotonic(), time.time(), 0
        self.manifest: Manifest | None = None
        self.gates: tuple[GateResult, ...] = ()
        self.figures: dict[str, float] = {}
        self.packages: list[PackageResult] = []

    def result(self) -> JobResult:
        """Every step in turn, up to the first that fails."""
        stage, fault, code, key = None, None, 0, None
        try:
            catalog = load_catalog(self.task.root, self._own_recipes())
            plan = make_plan(catalog, self.job.model, self.job.target, self.job.precision)
            self._check_worker(plan)
            self._optimize()
            self._judge()
            for profile in self.job.packages:
                self._package(profile)
            # after the steps: a download pins what was not pinned before
            key = job_key(self.job, plan, self.task.cache, self.task.source, self.task.code)
        except StepError as error:
            stage, fault, code = error.stage, error.what, error.code
        except QwenOnnxError as error:
            stage, fault, code = "job", str(error), error.exit_code
        return JobResult(
            name=self.job.name,
            model=self.job.model,
            target=self.job.target,
            precision=self.job.precision,
            key=key,
            passed=stage is None,
            stage=stage,
            fault=fault,
            exit_code=code,
            verdict=self.manifest.verdict if self.manifest else None,
            claim=self.manifest.claim if self.manifest else None,
            artifact_key=self.manifest.key if self.manifest else None,
            artifact_bytes=self.manifest.size_bytes if self.manifest else None,
            figures=self.figures,
            gates=self.gates,
            packages=tuple(self.packages),
            seconds=time.monotonic() - self.begin,
            peak_bytes=self.peak,
        )

    def _own_recipes(self) -> list[Path]:
        """The user's own recipe of the model, if it is one, as a file of this attempt."""
        if self.job.recipe is None:
            return []
        file = self.folder / RECIPE
        file.write_text(self.job.recipe, encoding="utf-8")
        return [file]

    def _check_worker(self, plan: Plan) -> None:
        if code_key(plan, self.task.source) != self.task.code:
            raise StepError("job", "this machine's recipes, packages or code differ from the release's", 3)

    def _optimize(self) -> None:
        options = ["--precision", self.job.precision, "--output", str(self.artifact)]
        options += ["--source", str(self.task.source)] if self.task.source else []
        options += ["--recipe", str(self.folder / RECIPE)] if self.job.recipe is not None else []
        options += ["--force"] if self.task.force else []
        options += ["--no-verify"] if self.job.gates.unverified == "allow" else []
        try:
            self._step("optimize", "optimize", self.job.model, "--target", self.job.target, *options)
        except StepError:
            # what was measured and rejected stands beside the artifact's place
            rejected = rejected_place(self.artifact)
            if (rejected / MANIFEST).exists() and (rejected / MANIFEST).stat().st_mtime >= self.began:
                self._read(rejected)
            raise
        self._read(self.artifact)

    def _read(self, artifact: Path) -> None:
        from qwen_onnx.verify.report import load_report

        self.manifest = read_manifest(artifact)
        report = None if self.manifest.verdict is Verdict.UNVERIFIED else load_report(artifact)
        measured = {name: figure.value for name, figure in estimates(report).items()}
        self.figures = {name: value for name, value in measured.items() if math.isfinite(value)}
        self.gates = judge(self.job.gates, self.manifest, report)

    def _judge(self) -> None:
        missed = [gate for gate in self.gates if gate.verdict is not Verdict.PASS]
        if missed:
            told = "; ".join(f"{gate.name} {gate.verdict}: {gate.told}" for gate in missed)
            # as the verdict itself, VerificationError
            raise StepError("gates", told, 7)

    def _package(self, profile: Profile) -> None:
        made = self.folder / PACKAGES / profile
        allow = ["--allow-unverified"] if self.job.gates.unverified == "allow" else []
        options = ["--output", str(made), "--profile", profile, "--version", str(self.job.version), *allow]
        self._step(f"package {profile}", "package", str(self.artifact), *options)
        [package] = [path for path in made.iterdir() if path.is_dir() and not path.name.startswith(".")]
        self._step(f"verify-package {profile}", "verify-package", str(package))
        if self.job.gates.foundry:
            self._step(f"foundry-check {profile}", "foundry-check", str(package))
        for lock in made.glob(".*.lock"):
            lock.unlink()
        self.packages.append(
            PackageResult(
                id=read_package(package).record.id,
                profile=profile,
                folder=package.relative_to(self.folder).as_posix(),
                digest=package_digest(package),
                size_bytes=folder_bytes(package),
            )
        )

    def _step(self, stage: str, *verb: str) -> None:
        """Run a verb of this program within what is left of the job's bounds; StepError unless it exits with 0."""
        self.say(stage)
        log = self.folder / LOG
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ qwen-onnx {' '.join(verb)}\n")
        order = Order(
            command=(sys.executable, "-m", "qwen_onnx.cli.app", *verb),
            folder=self.task.root,
            log=log,
            memory=self.job.memory,
            seconds=self.job.seconds - (time.monotonic() - self.begin),
        )
        ended = run_guarded(order, {"QWEN_ONNX_CACHE": str(self.task.cache), "COLUMNS": "160"})
        self.peak = max(self.peak, ended.peak)
        if ended.broke or ended.code != 0:
            raise StepError(stage, self._why(ended, log), ended.code if ended.code > 0 else 12)

    def _why(self, ended: Ended, log: Path) -> str:
        if ended.broke == "memory":
            return f"took {ended.peak / 1e9:.3f} GB of memory, {self.job.memory / 1e9:.3f} GB are allowed: it was ended"
        if ended.broke == "time":
            took = time.monotonic() - self.begin
            return f"took {took:.1f} s so far, {self.job.seconds:g} s are allowed: it was ended"
        said = ANSI.sub("", log.read_text(encoding="utf-8", errors="replace")).splitlines()[-LAST_LINES:]
        how = f"exit {ended.code}" if ended.code >= 0 else f"signal {-ended.code}"
        start = next((index for index, line in enumerate(said) if line.startswith("error:")), -3)
        return f"{how}: " + "\n".join(said[start:])
