"""Where a package comes from: an in-toto statement with SLSA provenance, unsigned.

https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, https://slsa.dev/spec/v1.0/provenance. The
records here are the part of both that we write; in-toto's own Python package turns every number into a float.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field, JsonValue
from pydantic.alias_generators import to_camel

from qwen_onnx import __version__
from qwen_onnx.artifact.manifest import Manifest
from qwen_onnx.bounded import read_record
from qwen_onnx.errors import PackageError
from qwen_onnx.git import Checkout, this_checkout
from qwen_onnx.package.records import PackageRecord
from qwen_onnx.package.sbom import package_purl, purl_of, timestamp
from qwen_onnx.records import Record

PROVENANCE = "provenance.intoto.json"
BUILD_TYPE = "urn:qwen-onnx:build:1"
ARTIFACT, VERDICT, PACKAGING = "artifact", "verdict", "packaging"


class _Camel(Record):
    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True, validate_by_alias=True)


class Resource(_Camel):
    """in-toto's ResourceDescriptor; one of ``name``, ``uri`` and ``digest`` is there."""

    name: str | None = None
    uri: str | None = None
    digest: dict[str, str] | None = None
    annotations: dict[str, JsonValue] | None = None


class BuildDefinition(_Camel):
    """What was asked for, and all that went in."""

    build_type: str = BUILD_TYPE
    external_parameters: dict[str, JsonValue]
    internal_parameters: dict[str, JsonValue]
    resolved_dependencies: tuple[Resource, ...]


class Builder(_Camel):
    """Who built: this program, on a machine that nobody vouches for."""

    id: str
    version: dict[str, str]


class Metadata(_Camel):
    """``invocation_id`` is the build key; times only by ``SOURCE_DATE_EPOCH``."""

    invocation_id: str
    finished_on: str | None = None


class RunDetails(_Camel):
    """``byproducts`` hold the verdict, the artifact's key, and what packaging did to its files."""

    builder: Builder
    metadata: Metadata
    byproducts: tuple[Resource, ...]


class Predicate(_Camel):
    """SLSA provenance 1."""

    build_definition: BuildDefinition
    run_details: RunDetails


class Statement(_Camel):
    """An in-toto statement; ``subject`` lists every file of the package that was there before the statement."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(default="https://in-toto.io/Statement/v1", alias="_type")
    subject: tuple[Resource, ...] = Field(min_length=1)
    predicate_type: Literal["https://slsa.dev/provenance/v1"] = "https://slsa.dev/provenance/v1"
    predicate: Predicate

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 by name of the subjects."""
        return {item.name or "": (item.digest or {}).get("sha256", "") for item in self.subject}

    def byproduct(self, name: str) -> dict[str, JsonValue]:
        """What is noted of the byproduct ``name``; nothing when there is none."""
        return next((item.annotations or {} for item in self.predicate.run_details.byproducts if item.name == name), {})


def write_provenance(folder: Path, record: PackageRecord, manifest: Manifest, files: Mapping[str, str]) -> None:
    """Write ``provenance.intoto.json`` about ``files``, SHA-256 by name."""
    made = statement(record, manifest, files)
    text = made.model_dump_json(indent=1, by_alias=True, exclude_none=True)
    (folder / PROVENANCE).write_text(text + "\n", encoding="utf-8")


def statement(record: PackageRecord, manifest: Manifest, files: Mapping[str, str]) -> Statement:
    """The statement on ``files``; it names no time and no place of this machine."""
    definition = BuildDefinition(
        external_parameters={
            "model": record.model,
            "target": record.target,
            "precision": record.precision,
            "planDigest": record.plan_digest,
            "plan": manifest.plan.model_dump(mode="json"),
            "package": {"id": record.id, "profile": record.profile},
        },
        internal_parameters={"python": manifest.python},
        resolved_dependencies=(*_weights(manifest), *_code(manifest), *_packages(manifest)),
    )
    details = RunDetails(
        builder=Builder(id=str(package_purl("qwen-onnx", __version__)), version={"qwen-onnx": __version__}),
        metadata=Metadata(invocation_id=manifest.key, finished_on=timestamp()),
        byproducts=(
            Resource(name=ARTIFACT, annotations={"key": record.artifact_key, "planDigest": record.plan_digest}),
            Resource(name=VERDICT, annotations=verdict_of(record)),
            Resource(name=PACKAGING, annotations={"altered": list(record.altered), "measured": list(record.measured)}),
        ),
    )
    subject = tuple(Resource(name=name, digest={"sha256": sha256}) for name, sha256 in sorted(files.items()))
    return Statement(subject=subject, predicate=Predicate(build_definition=definition, run_details=details))


def verdict_of(record: PackageRecord) -> dict[str, JsonValue]:
    """What the statement says of the proof."""
    return {"verdict": record.verdict, "claim": record.claim, "unverified": record.unverified}


def _weights(manifest: Manifest) -> list[Resource]:
    source, purl = manifest.source, purl_of(manifest.source)
    whole = Resource(name=source.origin, uri=str(purl) if purl else None, annotations={"revision": source.revision})
    files = [
        Resource(name=f"{source.origin}/{name}", digest={"sha256": sha256}) for name, sha256 in source.files.items()
    ]
    return [whole, *files]


def _code(manifest: Manifest) -> list[Resource]:
    """The commits that built and that packaged, where they were checkouts."""
    found = {"built by": manifest.checkout, "packaged by": this_checkout()}
    return [_checkout(role, checkout) for role, checkout in found.items() if checkout]


def _checkout(role: str, checkout: Checkout) -> Resource:
    return Resource(
        name="qwen-onnx", digest={"gitCommit": checkout.revision}, annotations={"role": role, "dirty": checkout.dirty}
    )


def _packages(manifest: Manifest) -> list[Resource]:
    return [Resource(name=name, uri=str(package_purl(name, version))) for name, version in manifest.packages.items()]


def read_statement(folder: Path) -> Statement:
    """The statement in ``folder``; PackageError when it is missing or not one of ours."""
    return read_record(folder / PROVENANCE, Statement, most_bytes=4 << 20, error=PackageError)
