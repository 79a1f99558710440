"""The bill of materials: the model, its source weights and what shaped it, as CycloneDX 1.6.

https://cyclonedx.org/docs/1.6/json/. It holds nothing measured: the same inputs give the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_onnx.artifact.manifest import Manifest, SourceRecord
from qwen_onnx.bounded import read_json
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.errors import ConfigError, PackageError
from qwen_onnx.package.records import PackageRecord
from qwen_onnx.records import digest_of

if TYPE_CHECKING:
    from cyclonedx.model.component import Component
    from packageurl import PackageURL

SBOM = "sbom.cdx.json"
MODEL, WEIGHTS = "model", "source-weights"
HUGGINGFACE, PYPI_WHEEL = "huggingface:", re.compile(r"wheel (?P<name>[^ =]+)==(?P<version>\S+)")


def write_sbom(folder: Path, record: PackageRecord, manifest: Manifest, files: Mapping[str, str]) -> None:
    """Write ``sbom.cdx.json``.

    Args:
        files: SHA-256 by name of what the package delivers and nobody measured.
    """
    text = json.dumps(bill(record, manifest, files), indent=2, ensure_ascii=False)
    (folder / SBOM).write_text(text + "\n", encoding="utf-8")


def bill(record: PackageRecord, manifest: Manifest, files: Mapping[str, str]) -> dict[str, Any]:
    """The bill as JSON; its serial number is a UUIDv5 of all the rest."""
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.output.json import JsonV1Dot6

    model, weights = _model(record, manifest, files), _weights(manifest)
    packages = [_package(name, version) for name, version in manifest.packages.items()]
    bom = Bom(metadata=BomMetaData(component=model), components=[weights, *packages])
    bom.register_dependency(model, [weights, *packages])
    made: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    # the library knows no model cards yet, and gives each bill the time and a random number
    made["metadata"]["component"]["modelCard"] = _card(manifest.plan)
    del made["serialNumber"], made["metadata"]["timestamp"]
    if stamp := timestamp():
        made["metadata"]["timestamp"] = stamp
    made["serialNumber"] = uuid.uuid5(uuid.NAMESPACE_URL, digest_of(made)).urn
    return made


def timestamp() -> str | None:
    """``SOURCE_DATE_EPOCH`` (https://reproducible-builds.org/specs/source-date-epoch/) in RFC 3339, if it is set.

    Raises:
        ConfigError: it is no whole number of seconds.
    """
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    if not seconds:
        return None
    if not re.fullmatch(r"\d{1,11}", seconds):
        raise ConfigError(
            [f"SOURCE_DATE_EPOCH: {seconds!r} is not a number of seconds"], hint="unset SOURCE_DATE_EPOCH"
        )
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _model(record: PackageRecord, manifest: Manifest, files: Mapping[str, str]) -> Component:
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component, ComponentType

    name, _, version = record.id.rpartition(":")
    graph = next((file for file in files if file.endswith(".onnx")), None)
    facts = {
        "artifact_key": record.artifact_key,
        "plan_digest": record.plan_digest,
        "target": record.target,
        "precision": record.precision,
        "hashed": graph or "",
    }
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=name,
        version=version,
        bom_ref=MODEL,
        description=f"{manifest.plan.title} as ONNX, {record.precision}, for {record.target}",
        licenses=_licences(manifest.plan.license),
        hashes=_hashes(files[graph]) if graph else [],
        components=_files(MODEL, files),
        properties=[Property(name=f"qwen-onnx:{key}", value=value) for key, value in facts.items()],
    )


def _weights(manifest: Manifest) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    source = manifest.source
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=source.origin,
        version=source.revision,
        bom_ref=WEIGHTS,
        purl=purl_of(source),
        licenses=_licences(manifest.plan.license),
        components=_files(WEIGHTS, source.files),
    )


def _package(name: str, version: str) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    purl = package_purl(name, version)
    return Component(
        type=ComponentType.LIBRARY, name=name, version=version, bom_ref=str(purl), purl=purl, licenses=_own(name)
    )


def package_purl(name: str, version: str) -> PackageURL:
    """Package URL of a Python package."""
    from packageurl import PackageURL

    return PackageURL(type="pypi", name=name, version=version)


def purl_of(source: SourceRecord) -> PackageURL | None:
    """Package URL of the weights' source; a local one has none."""
    from packageurl import PackageURL

    if source.origin.startswith(HUGGINGFACE):
        owner, _, name = source.origin.removeprefix(HUGGINGFACE).partition("/")
        return PackageURL(type="huggingface", namespace=owner, name=name, version=source.revision)
    wheel = PYPI_WHEEL.fullmatch(source.origin)
    return package_purl(wheel["name"], wheel["version"]) if wheel else None


def _own(name: str) -> Iterable[Any]:
    return _licences("Apache-2.0") if name == "qwen-onnx" else []


def _licences(licence: str | None) -> list[Any]:
    from cyclonedx.model.license import DisjunctiveLicense
    from cyclonedx.spdx import is_supported_id

    if licence is None:
        return []
    return [DisjunctiveLicense(id=licence) if is_supported_id(licence) else DisjunctiveLicense(name=licence)]


def _hashes(sha256: str) -> list[Any]:
    from cyclonedx.model import HashAlgorithm, HashType

    return [HashType(alg=HashAlgorithm.SHA_256, content=sha256)]


def _files(owner: str, files: Mapping[str, str]) -> list[Component]:
    from cyclonedx.model.component import Component, ComponentType

    return [
        Component(type=ComponentType.FILE, name=name, bom_ref=f"{owner}/{name}", hashes=_hashes(sha256))
        for name, sha256 in sorted(files.items())
    ]


def _card(plan: Plan) -> dict[str, Any]:
    return {
        "modelParameters": {
            "task": "text-generation",
            "architectureFamily": "transformer",
            "modelArchitecture": plan.architecture,
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "considerations": {
            "technicalLimitations": [
                f"{plan.context} tokens of prompt and answer",
                f"judged at most by: {plan.verification.text}",
            ]
        },
    }


def listed_files(folder: Path) -> dict[str, str]:
    """SHA-256 by name of the files that the bill in ``folder`` says the model is made of.

    Raises:
        PackageError: there is no bill, or it is not one of ours.
    """
    made = read_json(folder / SBOM, most_bytes=4 << 20, error=PackageError)
    try:
        components = made["metadata"]["component"]["components"]
        found = {item["name"]: item["hashes"][0]["content"] for item in components}
    except (KeyError, TypeError, IndexError) as error:
        raise PackageError(f"{SBOM} is damaged: {error!r}", where=str(folder)) from error
    if not all(isinstance(part, str) for pair in found.items() for part in pair):
        raise PackageError(f"{SBOM} is damaged: a name or a hash is not text", where=str(folder))
    return found
