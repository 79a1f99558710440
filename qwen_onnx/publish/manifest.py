"""A package as an OCI artifact: https://github.com/opencontainers/image-spec/blob/v1.1.0/manifest.md.

One manifest with our artifact type, the empty configuration, and one layer per file whose name stands in
``org.opencontainers.image.title``, as ORAS writes and reads it. Nothing in it depends on the clock: equal packages
have equal manifests.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from qwen_onnx.errors import PublishError
from qwen_onnx.publish.bundle import Bundle
from qwen_onnx.sources.remote import RemoteFile

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.qwen-onnx.package.v1"
LAYER_TYPE = "application/octet-stream"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
EMPTY = b"{}"
TITLE = "org.opencontainers.image.title"
# https://github.com/opencontainers/distribution-spec: registries take manifests of at least 4 MiB
LARGEST = 4 << 20
Digest = Field(pattern=r"^sha256:[0-9a-f]{64}$")


class Descriptor(BaseModel):
    """A blob: https://github.com/opencontainers/image-spec/blob/v1.1.0/descriptor.md; readers ignore what is new."""

    mediaType: str
    digest: str = Digest
    size: int = Field(ge=0)
    annotations: dict[str, str] = Field(default={})


class ImageManifest(BaseModel):
    """What we read of a manifest."""

    schemaVersion: Literal[2]
    mediaType: Literal["application/vnd.oci.image.manifest.v1+json"]
    artifactType: str = ""
    config: Descriptor
    layers: list[Descriptor]


def digest_text(data: bytes) -> str:
    """``sha256:…`` of some bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def make_manifest(bundle: Bundle) -> bytes:
    """The manifest of a package, as it is stored."""
    record = bundle.package.record
    name, _, version = record.id.partition(":")
    layers = [
        {
            "mediaType": LAYER_TYPE,
            "digest": f"sha256:{item.sha256}",
            "size": item.size,
            "annotations": {TITLE: item.name},
        }
        for item in bundle.items
    ]
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": {"mediaType": EMPTY_TYPE, "digest": digest_text(EMPTY), "size": len(EMPTY)},
        "layers": layers,
        "annotations": {TITLE: name, "org.opencontainers.image.version": version},
    }
    return json.dumps(manifest, indent=1).encode()


def read_manifest(data: bytes, where: str) -> list[RemoteFile]:
    """The files that a manifest announces; ``place`` is the digest of the blob.

    Raises:
        PublishError: it is no manifest of a package.
    """
    try:
        manifest = ImageManifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise PublishError(f"not an OCI image manifest: {place}: {first['msg']}", where=where) from None
    if manifest.artifactType != ARTIFACT_TYPE:
        raise PublishError(f"holds {manifest.artifactType!r}, not a package of qwen-onnx", where=where)
    untitled = [layer.digest for layer in manifest.layers if TITLE not in layer.annotations]
    if untitled:
        raise PublishError(f"a layer without a name: {untitled[0]}", where=where)
    return [
        RemoteFile(layer.annotations[TITLE], layer.size, layer.digest.removeprefix("sha256:"), place=layer.digest)
        for layer in manifest.layers
    ]
