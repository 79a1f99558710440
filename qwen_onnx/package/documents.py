"""Everything in a package that is for people and auditors: licences, model card, bill of materials, provenance."""

from __future__ import annotations

from pathlib import Path

from qwen_onnx.artifact.checksums import sums_of
from qwen_onnx.artifact.manifest import Manifest
from qwen_onnx.files import sha256_of
from qwen_onnx.package.card import write_card
from qwen_onnx.package.licences import write_licences
from qwen_onnx.package.provenance import PROVENANCE, write_provenance
from qwen_onnx.package.records import LEFT_BEHIND, PackageRecord, measured_in
from qwen_onnx.package.sbom import SBOM, write_sbom


def write_documents(folder: Path, record: PackageRecord, manifest: Manifest) -> PackageRecord:
    """Write the documents beside the model's files; call it last before ``package.json``.

    Args:
        folder: holds the artifact's files and what Foundry Local reads.
        manifest: of the artifact.

    Returns:
        The record, with the files that hold measurements and those that packaging altered.

    Raises:
        PackageError: a licence is missing.
    """
    write_licences(folder, manifest)
    write_card(folder, record, manifest)
    delivered = sums_of(folder)
    kept = {name: digest for name, digest in manifest.files.items() if name not in LEFT_BEHIND}
    altered = tuple(sorted(name for name, digest in kept.items() if delivered.get(name) != digest))
    measured = measured_in([*delivered, PROVENANCE])
    record = record.model_copy(update={"altered": altered, "measured": measured})
    write_sbom(folder, record, manifest, {name: sha for name, sha in delivered.items() if name not in measured})
    write_provenance(folder, record, manifest, {**delivered, SBOM: sha256_of(folder / SBOM)})
    return record
