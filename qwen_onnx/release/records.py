"""What a job and a release hand back."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qwen_onnx.catalog.schema import Precision
from qwen_onnx.package.records import Profile
from qwen_onnx.records import MeasuredVerdict, Record, Verdict

RELEASE = "release.json"
JUNIT = "junit.xml"


class GateResult(Record):
    """One gate: what was asked, what the report says, with its one-sided 95 % bounds where it has any.

    ``verdict`` is INCONCLUSIVE when the bounds do not decide or the report has no such figure; only PASS passes.
    """

    name: str
    limit: float | str
    measured: float | str | None = None
    lower: float | None = None
    upper: float | None = None
    verdict: MeasuredVerdict

    @property
    def told(self) -> str:
        """What was measured and what was asked for."""
        bounds = f" [{self.lower!r}, {self.upper!r}]" if self.lower != self.upper else ""
        measured = "not measured" if self.measured is None else f"{self.measured!r}{bounds}"
        return f"{measured}, asked for {self.limit!r}"


class PackageResult(Record):
    """One verified package.

    Attributes:
        folder: relative to the release.
        digest: SHA-256 of its ``SHA256SUMS``, which pins every byte.
        size_bytes: sum over its files.
    """

    id: str
    profile: Profile
    folder: str
    digest: str
    size_bytes: int


class JobResult(Record):
    """What became of one job.

    Attributes:
        key: digest of everything that decides the outcome: job, plan, weights, package versions and code; None when
            the job failed: nothing of it is taken again.
        passed: every step, every gate and every package.
        stage: the step that failed, None when none did; ``fault`` says how and ``exit_code`` is its exit code.
        verdict: of the verification; None when the artifact was not built.
        figures: what the report measured, unrounded.
        peak_bytes: most resident memory of the job's processes together, sampled.
        cached: found finished, nothing was run.
        worker: ``local``, or Ray's id of the machine.
    """

    name: str
    model: str
    target: str
    precision: Precision
    key: str | None
    passed: bool
    stage: str | None = None
    fault: str | None = None
    exit_code: int = 0
    verdict: Verdict | None = None
    claim: str | None = None
    artifact_key: str | None = None
    artifact_bytes: int | None = None
    figures: dict[str, float] = Field(default_factory=dict)
    gates: tuple[GateResult, ...] = ()
    packages: tuple[PackageResult, ...] = ()
    seconds: float
    peak_bytes: int = 0
    cached: bool = False
    worker: str = "local"


class Release(Record):
    """``release.json``.

    Attributes:
        complete: every job of the matrix is in it; ``--only`` leaves some out.
    """

    schema_version: Literal[1] = 1
    passed: bool
    complete: bool
    qwen_onnx: str
    jobs: tuple[JobResult, ...]
