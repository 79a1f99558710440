"""What a package says of itself."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

from pydantic import Field

from qwen_onnx.artifact.kv_scales import KV_SCALES
from qwen_onnx.bounded import read_description
from qwen_onnx.catalog.schema import Kind, Precision, Task
from qwen_onnx.errors import PackageError
from qwen_onnx.records import Record, Verdict
from qwen_onnx.runtime.engines.devices import PROVIDERS

PACKAGE = "package.json"
# of the artifact, what a user of the package has no use for: paths and times of the machine that built it; Olive's
# bookkeeping is in older artifacts only
LEFT_BEHIND = ("build.log", "footprint.json", "output_footprint.json", "run_history.txt")
# what a run on a device left, by the device's name
DEVICE_RECORDS = {name: f"device-{name}.json" for name in PROVIDERS}
# what follows the name of a record in that of its signature
SIGNATURE = ".sig"
# figures, or digests of files that hold figures; plots are drawn from them
MEASURED = (
    "manifest.json",
    "report.json",
    "report.html",
    "golden.npz",
    KV_SCALES,
    "README.md",
    "drift.svg",
    "drift-by-text.svg",
    "speed.svg",
    *DEVICE_RECORDS.values(),
    *(f"{name}{SIGNATURE}" for name in DEVICE_RECORDS.values()),
    "provenance.intoto.json",
    "SHA256SUMS",
)
Profile = Literal["sdk2", "cli1"]


def measured_in(files: Collection[str]) -> tuple[str, ...]:
    """Which of a package's files hold measurements."""
    return tuple(name for name in MEASURED if name in files or name == "SHA256SUMS")


class PackageRecord(Record):
    """``package.json``: what the package is and what may be said of it.

    Attributes:
        id: Foundry Local's id, ``<name>:<version>``; the folder is called ``<name>-<version>``.
        profile: ``sdk2`` for foundry-local-sdk 2, ``cli1`` for the drop-in folders of the older command line.
        artifact_key: build key of the artifact that is inside.
        verdict: of that artifact's verification, and ``claim`` what it proves.
        unverified: packaged with ``--allow-unverified`` though the verdict is not PASS.
        kind, tasks: of the model, from its recipe.
        measured: files that hold what was measured or when, of ``MEASURED``: the others are the same bytes in every
            build of the same inputs.
        altered: files of the artifact that packaging changed or dropped; the others are as its manifest lists them.
    """

    schema_version: Literal[1] = 1
    id: str
    profile: Profile
    model: str
    target: str
    precision: Precision
    artifact_key: str
    plan_digest: str
    verdict: Verdict
    claim: str
    unverified: bool
    kind: Kind | None = None
    tasks: tuple[Task, ...] = ()
    measured: tuple[str, ...] = Field(default=())
    altered: tuple[str, ...] = Field(default=())


class Package(Record):
    """A package folder and what it says of itself."""

    path: Path
    record: PackageRecord


def read_package(folder: Path) -> Package:
    """Read ``package.json``; the bytes of the other files are compared by ``package.verify``.

    Raises:
        PackageError: it is missing or not ours.
    """
    hint = "make one: qwen-onnx package ARTIFACT"
    record = read_description(
        folder, PACKAGE, PackageRecord, called="a package", most_bytes=1 << 20, error=PackageError, hint=hint
    )
    return Package(path=folder, record=record)
