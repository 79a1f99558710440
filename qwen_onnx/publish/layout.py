"""OCI image layouts on disk: https://github.com/opencontainers/image-spec/blob/v1.1.0/image-layout.md.

``oras copy --from-oci-layout PATH:TAG`` and ``skopeo copy oci:PATH:TAG`` read them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_onnx.artifact.store import build_lock, noticing_full_disk
from qwen_onnx.bounded import read_object
from qwen_onnx.errors import PublishError
from qwen_onnx.files import sha256_of
from qwen_onnx.publish.addresses import LayoutAddress
from qwen_onnx.publish.bundle import Bundle, Item, checked_blocks
from qwen_onnx.publish.folder import blocks_of
from qwen_onnx.publish.manifest import (
    ARTIFACT_TYPE,
    EMPTY,
    LARGEST,
    MANIFEST_TYPE,
    digest_text,
    make_manifest,
    read_manifest,
)
from qwen_onnx.publish.receipt import Receipt
from qwen_onnx.sources.remote import RemoteFile
from qwen_onnx.sources.transfer import Progress, teller

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
REF_NAME = "org.opencontainers.image.ref.name"
MARK = b'{"imageLayoutVersion":"1.0.0"}'


def send_to_layout(bundle: Bundle, address: LayoutAddress, progress: Progress) -> Receipt:
    """Put a package into a layout, which is made when it is not there; the index comes last, by one rename.

    Raises:
        PublishError: the folder is no layout, or a file changed since it was verified.
    """
    layout = address.path
    _refuse_foreign(layout)
    with build_lock(layout, wait=True), noticing_full_disk(layout.parent):
        for folder in (layout / "ingest", layout / "blobs/sha256"):
            folder.mkdir(parents=True, exist_ok=True)
        sent = present = 0
        for item in bundle.items:
            if _add_file(layout, item, progress):
                sent += item.size
            else:
                present += item.size
        manifest = make_manifest(bundle)
        for data in (EMPTY, manifest):
            _replace(layout, _blob(layout, digest_text(data)), data)
        _replace(layout, layout / "oci-layout", MARK)
        _replace(layout, layout / "index.json", _index_with(layout, address.tag, manifest))
        # leftovers of a killed run
        for path in (layout / "ingest").iterdir():
            path.unlink()
        (layout / "ingest").rmdir()
    return Receipt(bundle.digest, str(address), sent, present, manifest=digest_text(manifest))


def _refuse_foreign(layout: Path) -> None:
    ours = {"ingest", "blobs", "oci-layout", "index.json"}
    if layout.exists() and (not layout.is_dir() or {path.name for path in layout.iterdir()} - ours):
        raise PublishError("exists and is not an OCI layout", where=str(layout), hint="choose another folder")


def _blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def _add_file(layout: Path, item: Item, progress: Progress) -> bool:
    """Copy a file to its digest, unless it is there whole."""
    final = _blob(layout, f"sha256:{item.sha256}")
    if final.is_file() and sha256_of(final) == item.sha256:
        return False
    progress(f"{item.name} ({item.size / 1e6:,.1f} MB)")
    staged = layout / "ingest" / item.sha256
    with staged.open("wb") as output:
        for block in checked_blocks(item, teller(item.name, item.size, progress)):
            output.write(block)
        output.flush()
        os.fsync(output.fileno())
    staged.replace(final)
    return True


def _replace(layout: Path, path: Path, data: bytes) -> None:
    staged = layout / "ingest" / path.name
    with staged.open("wb") as output:
        output.write(data)
        output.flush()
        os.fsync(output.fileno())
    staged.replace(path)


def _index_with(layout: Path, tag: str, manifest: bytes) -> bytes:
    """The index with ``tag`` on this manifest; what other tags point at stays."""
    path = layout / "index.json"
    index: dict[str, Any] = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": []}
    if path.exists():
        index = _read_index(layout)
    index["manifests"] = [entry for entry in index["manifests"] if _tag(entry) != tag] + [
        {
            "mediaType": MANIFEST_TYPE,
            "digest": digest_text(manifest),
            "size": len(manifest),
            "annotations": {REF_NAME: tag},
            "artifactType": ARTIFACT_TYPE,
        }
    ]
    return json.dumps(index, indent=1).encode()


def _tag(entry: dict[str, Any]) -> str | None:
    tag = (entry.get("annotations") or {}).get(REF_NAME)
    return tag if isinstance(tag, str) else None


def _read_index(layout: Path) -> dict[str, Any]:
    path = layout / "index.json"
    if not path.exists():
        raise PublishError("there is no OCI layout", where=str(layout), hint="qwen-onnx publish PACKAGE oci:…")
    index = read_object(path, most_bytes=LARGEST, error=PublishError, what="index.json is damaged: it")
    entries = index.get("manifests")
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise PublishError("index.json is damaged: a manifest without a digest", where=str(path))
    return index


def _is_entry(entry: Any) -> bool:
    """Whether it has a digest, and annotations, if any, by name."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("digest"), str)
        and isinstance(entry.get("annotations"), dict | None)
    )


class LayoutSource:
    """A tag of a layout."""

    def __init__(self, address: LayoutAddress) -> None:
        self._address = address

    def listing(self) -> list[RemoteFile]:
        """The files of the tagged manifest.

        Raises:
            PublishError: no such layout or tag, or the manifest is not what the index announces.
        """
        layout, where = self._address.path, str(self._address)
        digests = [e["digest"] for e in _read_index(layout)["manifests"] if _tag(e) == self._address.tag]
        if len(digests) != 1:
            raise PublishError(f"{len(digests)} manifests have this tag", where=where)
        data = self._small_blob(digests[0])
        return read_manifest(data, where)

    def _small_blob(self, digest: str) -> bytes:
        path = self._checked(digest)
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST or digest_text(data) != digest:
            raise PublishError("the manifest is not what the index announces", where=str(path))
        return data

    def _checked(self, digest: str) -> Path:
        hexadecimal = digest.removeprefix("sha256:")
        path = self._address.path / "blobs/sha256" / hexadecimal
        if len(hexadecimal) != 64 or not hexadecimal.isalnum() or path.is_symlink() or not path.is_file():
            raise PublishError(f"the blob {digest!r} is missing", where=str(self._address.path))
        return path

    @contextmanager
    def read(self, file: RemoteFile, offset: int) -> Iterator[Iterator[bytes]]:
        """The bytes of a layer from ``offset`` on."""
        yield blocks_of(self._checked(file.place), offset)
