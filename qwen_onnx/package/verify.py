"""Check a package, offline: nothing but the folder itself and what it says of itself.

What this cannot find is a package that someone rewrote as a whole, consistently: for that, compare its digest with one
from a place that is trusted (``expect``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen_onnx.artifact.checksums import SUMS, check_sums, package_digest
from qwen_onnx.artifact.manifest import MANIFEST
from qwen_onnx.artifact.names import name_faults
from qwen_onnx.errors import ArtifactError, PackageError
from qwen_onnx.package.contents import Contents
from qwen_onnx.package.devices_proven import record_faults
from qwen_onnx.package.licences import LICENCE, NOTICE, OWN_LICENCE
from qwen_onnx.package.provenance import PACKAGING, PROVENANCE, VERDICT, verdict_of
from qwen_onnx.package.records import LEFT_BEHIND, PACKAGE, Package, measured_in, read_package
from qwen_onnx.package.rules import FOLDER_NAME, broken_rules
from qwen_onnx.package.sbom import SBOM, listed_files
from qwen_onnx.records import digest_of


@dataclass(frozen=True)
class Check:
    """What one check found; no faults: it passed."""

    name: str
    faults: tuple[str, ...]


def verify_package(folder: Path, expect: str | None = None) -> Package:
    """Check every byte and every statement of a package.

    Args:
        folder: package folder.
        expect: SHA-256 of its ``SHA256SUMS``, from a place that is trusted.

    Raises:
        PackageError: names every fault.
    """
    package = read_package(folder)
    require_sound(folder, examine(folder, expect))
    return package


def examine(folder: Path, expect: str | None = None) -> list[Check]:
    """Carry out every check, whatever the others found."""
    contents = Contents(folder, expect)
    return [Check(name, tuple(_faults(find, contents))) for name, find in CHECKS.items()]


def require_sound(folder: Path, checks: list[Check]) -> None:
    """PackageError with every fault of every check; one that several checks met is told once."""
    faults = list(dict.fromkeys(fault for check in checks for fault in check.faults))
    if faults:
        listing = "".join(f"\n  - {fault}" for fault in faults)
        count = f"{len(faults)} fault{'s' if len(faults) != 1 else ''}"
        raise PackageError(
            f"{count} in the package:{listing}", where=str(folder), hint="get it again, or make it again"
        )


def _faults(find: Callable[[Contents], Iterator[str]], contents: Contents) -> Iterator[str]:
    try:
        yield from find(contents)
    except (PackageError, ArtifactError) as error:
        yield error.what


def _bytes(contents: Contents) -> Iterator[str]:
    """Every file is listed, has the listed SHA-256, and is of a kind that a model needs."""
    for path in sorted(contents.path.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            yield f"{path.relative_to(contents.path).as_posix()}/ was added: a package has no folders"
    yield from name_faults(path.name for path in contents.path.iterdir())
    check_sums(contents.path)


def _expected(contents: Contents) -> Iterator[str]:
    """It is the package that was asked for."""
    found = package_digest(contents.path) if os.path.lexists(contents.path / SUMS) else "missing"
    if contents.expect is not None and found != contents.expect.lower():
        yield f"{SUMS} is {found}, not the expected {contents.expect}"


def _record(contents: Contents) -> Iterator[str]:
    """``package.json`` says what it may."""
    record = contents.record
    if record.measured != (measured := measured_in(contents.files)):
        yield f"{PACKAGE} lists {', '.join(record.measured)} as measured, it is {', '.join(measured)}"


def _manifest(contents: Contents) -> Iterator[str]:
    """The artifact's files are those of its manifest, but for those that packaging is said to have altered."""
    record, manifest, files = contents.record, contents.manifest, contents.files
    for name, sha256 in manifest.files.items():
        found = files.get(name)
        if name in record.altered:
            if found == sha256:
                yield f"{PACKAGE} lists {name} as altered, it is that of the artifact"
        elif found != sha256 and name not in LEFT_BEHIND:
            yield f"{name} is {'missing' if found is None else 'not that of the manifest'}"
    yield from (
        f"{PACKAGE} lists {name} as altered, no artifact has it" for name in set(record.altered) - set(manifest.files)
    )
    pairs = {
        "model": (record.model, manifest.plan.model),
        "target": (record.target, manifest.plan.target),
        "precision": (record.precision, manifest.plan.precision),
        "artifact_key": (record.artifact_key, manifest.key),
        "plan_digest": (record.plan_digest, manifest.plan_digest),
        "verdict": (record.verdict, manifest.verdict),
        "claim": (record.claim, manifest.claim),
    }
    yield from (f"{name}: {PACKAGE} says {one}, the manifest {two}" for name, (one, two) in pairs.items() if one != two)
    # of the JSON as it stands: a newer version of this program may know more fields of a plan
    if digest_of(contents.document(MANIFEST)["plan"]) != manifest.plan_digest:
        yield "the manifest's plan does not have the digest that it says"
    if manifest.claim.startswith("proven") != (manifest.verdict == "PASS"):
        yield f"the manifest claims more or less than {manifest.verdict} proves: {manifest.claim}"


def _report(contents: Contents) -> Iterator[str]:
    """The verdict is that of the report; without one it is UNVERIFIED."""
    from qwen_onnx.verify.records import worst
    from qwen_onnx.verify.report import load_report

    verdict = contents.record.verdict
    if "report.json" not in contents.files:
        if verdict != "UNVERIFIED":
            yield f"the verdict is {verdict}, but there is no report.json"
        return
    report = load_report(contents.path)
    for name, found, said in (("verdict", report.verdict, verdict), ("claim", report.claim, contents.record.claim)):
        if found != said:
            yield f"{name}: {PACKAGE} says {said}, report.json {found}"
    if report.verdict != worst(check.verdict for check in report.checks):
        yield f"report.json says {report.verdict}, its checks do not"


def _devices(contents: Contents) -> Iterator[str]:
    """Each record of a device is of this artifact, and says PASS."""
    yield from record_faults(contents.path)


def _provenance(contents: Contents) -> Iterator[str]:
    """The statement is about these very files and says the same of them."""
    record, statement = contents.record, contents.statement
    about = {name: sha for name, sha in contents.files.items() if name not in (PROVENANCE, PACKAGE)}
    yield from _difference(about, statement.files, PROVENANCE)
    if statement.byproduct(VERDICT) != verdict_of(record):
        yield f"{PROVENANCE} and {PACKAGE} say different things of the verdict"
    if statement.byproduct(PACKAGING) != {"altered": list(record.altered), "measured": list(record.measured)}:
        yield f"{PROVENANCE} and {PACKAGE} say different things of what packaging altered"
    asked = statement.predicate.build_definition.external_parameters
    said = {"model": record.model, "target": record.target, "precision": record.precision}
    said |= {"planDigest": record.plan_digest}
    yield from (
        f"{name}: {PROVENANCE} says {asked.get(name)}, {PACKAGE} {value}"
        for name, value in said.items()
        if asked.get(name) != value
    )
    if statement.predicate.run_details.metadata.invocation_id != record.artifact_key:
        yield f"{PROVENANCE} is about another build"


def _bill(contents: Contents) -> Iterator[str]:
    """The bill of materials lists everything that nobody measured."""
    apart = {*contents.record.measured, SBOM, PACKAGE}
    yield from _difference(
        {k: v for k, v in contents.files.items() if k not in apart}, listed_files(contents.path), SBOM
    )


def _difference(found: dict[str, str], listed: dict[str, str], where: str) -> Iterator[str]:
    yield from (f"{name} is in {where}, but missing" for name in sorted(listed.keys() - found.keys()))
    yield from (f"{name} is not in {where}" for name in sorted(found.keys() - listed.keys()))
    both = sorted(found.keys() & listed.keys())
    yield from (f"{name} is not the one in {where}" for name in both if found[name] != listed[name])


def _licence(contents: Contents) -> Iterator[str]:
    """The licences and notices travel along."""
    for name in (LICENCE, OWN_LICENCE, NOTICE):
        path = contents.path / name
        if not path.is_file() or not path.stat().st_size:
            yield f"{name} is missing"


def _foundry(contents: Contents) -> Iterator[str]:
    """Foundry Local's rules are kept, wherever the folder lies and whatever it is called there."""
    for name, faults in broken_rules(contents.path).items():
        if name != FOLDER_NAME:
            yield from (f"{name}: {fault}" for fault in faults)


CHECKS: dict[str, Callable[[Contents], Iterator[str]]] = {
    "bytes": _bytes,
    "digest": _expected,
    "record": _record,
    "manifest": _manifest,
    "report": _report,
    "devices": _devices,
    "provenance": _provenance,
    "bill of materials": _bill,
    "licences": _licence,
    "foundry": _foundry,
}
