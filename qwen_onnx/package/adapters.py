"""A package of an adapter: its file, a record, a card and checksums. Foundry Local loads none; our runtime does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from pydantic import Field

from qwen_onnx.artifact.adapter_file import AdapterRecord, check_adapter_file
from qwen_onnx.artifact.checksums import SUMS, check_sums, package_digest, sha256_of_plain, write_sums
from qwen_onnx.artifact.store import build_lock, put_in_place, staging_folder
from qwen_onnx.bounded import read_bytes, read_description, read_json
from qwen_onnx.errors import ArtifactError, PackageError
from qwen_onnx.package.records import PACKAGE, Package, read_package
from qwen_onnx.package.verify import Check, examine, require_sound
from qwen_onnx.records import Record, Sha256, Verdict

FILE, CARD = "adapter.safetensors", "README.md"
HINT = "make one: qwen-onnx adapter package FILE"
CARD_TEXT = """\
# {id}

A LoRA adapter for an artifact of {model} with slots, made by qwen-onnx. Foundry Local loads no adapters.

| | |
|---|---|
| base | {model}, weights with the digest `{weights}` |
| artifacts | {artifacts} |
| rank, targets | {rank}; {targets} |
| its training | {training} |
| its answers | {claim} |

```sh
qwen-onnx serve ARTIFACT --adapter {name}=FOLDER/adapter.safetensors
```
"""


class AdapterPackageRecord(Record):
    """``package.json`` of an adapter.

    Attributes:
        contents: tells it from the package of a model.
        verdict: on the drift of its answers; ``claim`` is what that proves.
        sha256: of the adapter's file; ``adapter`` is that file's own record.
    """

    schema_version: Literal[1] = 1
    contents: Literal["adapter"] = "adapter"
    id: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,199}:[0-9]{1,9}$")
    verdict: Verdict
    claim: str
    sha256: Sha256
    adapter: AdapterRecord

    @property
    def unverified(self) -> bool:
        """There is no option to package one that did not pass."""
        return False


class AdapterPackage(Record):
    """A package folder and what it says of itself."""

    path: Path
    record: AdapterPackageRecord


def package_adapter(file: Path, folder: Path, version: int = 1) -> AdapterPackage:
    """Make a package in ``folder`` and publish it by one rename.

    Raises:
        ArtifactError: the file is no adapter, or damaged.
        PackageError: its drift was not measured or did not pass; another adapter has its place.
    """
    record = _described(file, version)
    target = folder / record.id.replace(":", "-")
    with build_lock(target, wait=True), staging_folder(target) as staging:
        if target.exists() and _read(target).record.adapter.adapter != record.adapter.adapter:
            raise PackageError(
                f"the package {record.id} is there, of another adapter",
                where=str(target),
                hint=f"--version or another --output keeps both; to replace it, remove {target}",
            )
        made = staging / target.name
        made.mkdir()
        shutil.copyfile(file, made / FILE)
        (made / PACKAGE).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (made / CARD).write_text(_card(record), encoding="utf-8")
        write_sums(made)
        verify_any(made)
        put_in_place(made, target)
    return AdapterPackage(path=target, record=record)


def _described(file: Path, version: int) -> AdapterPackageRecord:
    adapter = check_adapter_file(file)
    if adapter.drift is None or adapter.drift.verdict is not Verdict.PASS:
        verdict = adapter.drift.verdict if adapter.drift else Verdict.UNVERIFIED
        raise PackageError(
            f"the verdict on its drift is {verdict}, only PASS is packaged",
            where=str(file),
            hint="qwen-onnx adapter verify FILE --base ARTIFACT --adapter FOLDER",
        )
    return AdapterPackageRecord(
        id=f"{adapter.base.model}-{adapter.name}:{version}",
        verdict=adapter.drift.verdict,
        claim=_claim(adapter),
        sha256=sha256_of_plain(file),
        adapter=adapter,
    )


def _claim(adapter: AdapterRecord) -> str:
    drift = adapter.drift
    if drift is None:
        return "not measured"
    merged = "the adapter merged into the artifact's own weights" if adapter.against else "the adapter merged"
    found = f"mean KLD {drift.kld_mean:.3g}, at most {drift.kld_upper:.3g}, to PyTorch with {merged}"
    return f"{drift.verdict} in {drift.precision}: {found}, where {drift.kld_limit:.3g} is allowed"


def _card(record: AdapterPackageRecord) -> str:
    adapter = record.adapter
    data = f", data {adapter.data[:12]}" if adapter.data else ""
    return CARD_TEXT.format(
        id=record.id,
        name=adapter.name,
        model=adapter.base.model,
        weights=adapter.base.weights,
        artifacts=f"only the one whose graph has the digest `{adapter.against}`"
        if adapter.against
        else "any with slots",
        rank=adapter.rank,
        targets=", ".join(adapter.targets),
        training=f"{adapter.verdict}{data}",
        claim=record.claim,
    )


def read_any(folder: Path) -> Package | AdapterPackage:
    """What a package says of itself: of a model, or of an adapter.

    Raises:
        PackageError: it is neither.
    """
    return _read(folder) if _holds_adapter(folder) else read_package(folder)


def examine_any(folder: Path, expect: str | None = None) -> list[Check]:
    """Carry out every check of a package."""
    if not _holds_adapter(folder):
        return examine(folder, expect)
    found = {"bytes": _byte_faults(folder, expect), "record": _record_faults(folder)}
    return [Check(name, tuple(faults)) for name, faults in found.items()]


def verify_any(folder: Path, expect: str | None = None) -> Package | AdapterPackage:
    """Check every byte and every statement of a package.

    Raises:
        PackageError: names every fault.
    """
    package = read_any(folder)
    require_sound(folder, examine_any(folder, expect))
    return package


def _holds_adapter(folder: Path) -> bool:
    if not (folder / PACKAGE).is_file():
        return False
    told = read_json(folder / PACKAGE, most_bytes=1 << 20, error=PackageError, hint=HINT)
    return isinstance(told, dict) and told.get("contents") == "adapter"


def _read(folder: Path) -> AdapterPackage:
    record = read_description(
        folder, PACKAGE, AdapterPackageRecord, called="a package", most_bytes=1 << 20, error=PackageError, hint=HINT
    )
    return AdapterPackage(path=folder, record=record)


def _byte_faults(folder: Path, expect: str | None) -> list[str]:
    """Of what lies there: exactly the files of a package, each as it is listed."""
    wanted = {FILE, CARD, PACKAGE, SUMS}
    faults = [f"{path.name} was added" for path in sorted(folder.iterdir()) if path.name not in wanted]
    try:
        check_sums(folder)
        found = package_digest(folder)
    except PackageError as error:
        return [*faults, error.what]
    if expect is not None and found != expect.lower():
        faults.append(f"{SUMS} is {found}, not the expected {expect}")
    return faults


def _record_faults(folder: Path) -> list[str]:
    """Of what it says: of the file the very same that the file says of itself."""
    try:
        record, adapter = _read(folder).record, check_adapter_file(folder / FILE)
        digest = sha256_of_plain(folder / FILE)
        card = read_bytes(folder / CARD, most_bytes=1 << 20, error=PackageError)
    except (PackageError, ArtifactError) as error:
        return [error.what]
    verdict = adapter.drift.verdict if adapter.drift else Verdict.UNVERIFIED
    differing = {
        "sha256": record.sha256 != digest,
        "adapter": record.adapter != adapter,
        "verdict": record.verdict != verdict,
        "claim": record.claim != _claim(adapter),
        "id": record.id.rpartition(":")[0] != f"{adapter.base.model}-{adapter.name}",
    }
    faults = [f"{name}: {PACKAGE} says other things than {FILE}" for name, wrong in differing.items() if wrong]
    return faults if card == _card(record).encode() else [*faults, f"{CARD} is not that of {PACKAGE}"]
