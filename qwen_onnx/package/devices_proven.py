"""Records of an artifact that was proven on devices, taken along by its packages.

``verify --device`` leaves them beside the artifact, as ``ARTIFACT.DEVICE.json``; in a package they are
``device-DEVICE.json``. Each holds the digest of the artifact that was run, which is that of the package's manifest.
Signatures of them go along, see ``signatures``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_onnx.artifact.manifest import MANIFEST
from qwen_onnx.bounded import read_record
from qwen_onnx.errors import PackageError
from qwen_onnx.files import sha256_of
from qwen_onnx.package.records import DEVICE_RECORDS, SIGNATURE
from qwen_onnx.processes.progress import progress

if TYPE_CHECKING:
    from qwen_onnx.verify.device import DeviceReport

MOST_BYTES = 1 << 20


def copy_device_records(artifact: Path, folder: Path) -> None:
    """Copy every record of ``artifact`` that says PASS of these very bytes into the package in ``folder``."""
    for device, name in DEVICE_RECORDS.items():
        file = artifact.with_name(f"{artifact.name}.{device}.json")
        if not file.exists():
            continue
        if faults := list(_faults(file, device, artifact)):
            progress(f"{file.name} stays out of the package: {'; '.join(faults)}")
        else:
            shutil.copyfile(file, folder / name)
            if (signature := file.with_name(file.name + SIGNATURE)).exists():
                shutil.copyfile(signature, folder / f"{name}{SIGNATURE}")


def device_records(folder: Path) -> list[DeviceReport]:
    """What the package in ``folder`` says of the devices that it ran on.

    Raises:
        PackageError: a record is damaged.
    """
    return [read_record_of_device(folder / name) for name in DEVICE_RECORDS.values() if (folder / name).exists()]


def record_faults(folder: Path) -> Iterator[str]:
    """What is wrong with the records of devices in a package.

    Raises:
        PackageError: a record is damaged.
    """
    for device, name in DEVICE_RECORDS.items():
        if (folder / name).exists():
            yield from (f"{name}: {fault}" for fault in _faults(folder / name, device, folder))
        elif (folder / f"{name}{SIGNATURE}").exists():
            yield f"{name}{SIGNATURE}: what it signs is not there"


def _faults(file: Path, device: str, folder: Path) -> Iterator[str]:
    from qwen_onnx.verify.golden import GOLDEN
    from qwen_onnx.verify.records import worst

    try:
        report = read_record_of_device(file)
    except PackageError as error:
        yield error.what
        return
    if report.device != device:
        yield f"it is of the device {report.device}"
    if report.digest != sha256_of(folder / MANIFEST):
        yield "it is of other bytes than the artifact's"
    if not (folder / GOLDEN).exists() or report.golden != sha256_of(folder / GOLDEN):
        yield "it was judged by other answers than the artifact's"
    if report.verdict != "PASS":
        yield f"the verdict is {report.verdict}"
    if report.verdict != worst(check.verdict for check in report.checks):
        yield f"it says {report.verdict}, its checks do not"


def read_record_of_device(file: Path) -> DeviceReport:
    """A record of a device; PackageError when it is damaged."""
    from qwen_onnx.verify.device import DeviceReport

    return read_record(file, DeviceReport, most_bytes=MOST_BYTES, error=PackageError)
