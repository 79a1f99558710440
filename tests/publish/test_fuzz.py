"""Indexes and manifests of strangers: each gives a list of files or a deliberate error, never anything else."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from hypothesis import given

from qwen_onnx.errors import QwenOnnxError
from qwen_onnx.publish.addresses import LayoutAddress
from qwen_onnx.publish.faults import FAULTS
from qwen_onnx.publish.layout import LayoutSource
from qwen_onnx.publish.manifest import digest_text, read_manifest
from qwen_onnx.sources.remote import require_safe
from tests.sources.strange import BOUNDED, documents

DIGEST = f"sha256:{'0' * 64}"
MANIFEST = {
    "schemaVersion": 2,
    "mediaType": "application/vnd.oci.image.manifest.v1+json",
    "artifactType": "application/vnd.qwen-onnx.package.v1",
    "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": DIGEST, "size": 2},
    "layers": [
        {
            "mediaType": "application/octet-stream",
            "digest": DIGEST,
            "size": 3,
            "annotations": {"org.opencontainers.image.title": name},
        }
        for name in ("package.json", "sub/model.onnx")
    ],
}
STORED = json.dumps(MANIFEST).encode()
INDEX = {
    "schemaVersion": 2,
    "manifests": [
        {"digest": digest_text(STORED), "size": 3, "annotations": {"org.opencontainers.image.ref.name": "v1"}},
        {"digest": DIGEST, "size": 3},
    ],
}


@BOUNDED
@given(document=documents(MANIFEST))
def test_manifests(document: bytes) -> None:
    with contextlib.suppress(QwenOnnxError):
        for file in require_safe(read_manifest(document, "x"), "x", FAULTS):
            assert not Path(file.name).is_absolute()
            assert not any(part.startswith(".") for part in file.name.split("/"))


@BOUNDED
@given(document=documents(INDEX))
def test_indexes(document: bytes, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs/sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    (blobs / digest_text(STORED).removeprefix("sha256:")).write_bytes(STORED)
    (tmp_path / "index.json").write_bytes(document)
    with contextlib.suppress(QwenOnnxError):
        assert [file.name for file in LayoutSource(LayoutAddress(tmp_path, "v1")).listing()]
