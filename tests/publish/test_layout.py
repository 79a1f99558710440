"""OCI image layouts: what the specification asks for, many tags, and what a forger may try."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.artifact.checksums import SUMS
from tests.publish.conftest import SMALL_FILES, files_of, publish, pull, refused


def blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def manifest_of(layout: Path, tag: str) -> dict[str, Any]:
    index = json.loads((layout / "index.json").read_bytes())
    named = {entry["annotations"]["org.opencontainers.image.ref.name"]: entry for entry in index["manifests"]}
    data = blob(layout, named[tag]["digest"]).read_bytes()
    assert len(data) == named[tag]["size"]
    manifest: dict[str, Any] = json.loads(data)
    return manifest


def forge(layout: Path, tag: str, change: Any) -> None:
    """Change the manifest of a tag and everything that names it."""
    manifest = manifest_of(layout, tag)
    change(manifest)
    data = json.dumps(manifest).encode()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    blob(layout, digest).write_bytes(data)
    index = json.loads((layout / "index.json").read_bytes())
    for entry in index["manifests"]:
        if entry["annotations"]["org.opencontainers.image.ref.name"] == tag:
            entry |= {"digest": digest, "size": len(data)}
    (layout / "index.json").write_text(json.dumps(index))


def test_a_layout_is_what_the_specification_says(passing_package: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    sent = publish(passing_package, f"oci:{layout}:v1")
    assert json.loads((layout / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    manifest = manifest_of(layout, "v1")
    assert manifest["schemaVersion"] == 2
    assert manifest["artifactType"] == "application/vnd.qwen-onnx.package.v1"
    assert manifest["config"]["mediaType"] == "application/vnd.oci.empty.v1+json"
    for descriptor in (manifest["config"], *manifest["layers"]):
        data = blob(layout, descriptor["digest"]).read_bytes()
        assert len(data) == descriptor["size"]
        assert descriptor["digest"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
    titles = {layer["annotations"]["org.opencontainers.image.title"]: layer["digest"] for layer in manifest["layers"]}
    assert titles.keys() == files_of(passing_package).keys()
    assert titles[SUMS] == f"sha256:{sent['digest']}"
    assert {path.name for path in layout.iterdir()} == {"blobs", "index.json", "oci-layout"}


@pytest.mark.slow
def test_tags_share_blobs_and_the_same_package_has_the_same_manifest(
    passing_package: Path, newer_package: Path, tmp_path: Path
) -> None:
    first = publish(passing_package, f"oci:{tmp_path}/layout:v1")
    second = publish(passing_package, f"oci:{tmp_path}/layout:v2")
    assert second["manifest"] == first["manifest"]
    assert second["sent"] == 0
    third = publish(newer_package, f"oci:{tmp_path}/layout:v2")
    assert 0 < third["sent"] < SMALL_FILES
    assert pull(f"oci:{tmp_path}/layout:v1", "--output", tmp_path / "one")["digest"] == first["digest"]
    assert pull(f"oci:{tmp_path}/layout:v2", "--output", tmp_path / "two")["digest"] == third["digest"]
    assert files_of(tmp_path / "two") == files_of(newer_package)


def test_a_damaged_blob_is_replaced_on_the_way_out_and_refused_on_the_way_in(
    passing_package: Path, tmp_path: Path
) -> None:
    address = f"oci:{tmp_path}/layout:v1"
    publish(passing_package, address)
    digest = hashlib.sha256((passing_package / "model.onnx").read_bytes()).hexdigest()
    stored = tmp_path / "layout/blobs/sha256" / digest
    stored.write_bytes(stored.read_bytes()[:-1] + b"!")
    assert "digest other than" in refused("pull", address, "--output", tmp_path / "got")
    assert not (tmp_path / "got").exists()
    assert publish(passing_package, address)["sent"] == stored.stat().st_size
    pull(address, "--output", tmp_path / "got")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../escaped", "cannot be the name"),
        ("/etc/escaped", "cannot be the name"),
        ("a/../../escaped", "cannot be the name"),
        ("a\\..\\escaped", "cannot be the name"),
        ("C:escaped", "cannot be the name"),
        (".hidden", "cannot be the name"),
        ("new\nline", "cannot be the name"),
        ("", "cannot be the name"),
        ("PACKAGE.JSON", "is there twice"),
        ("surplus.txt", "announced and not in SHA256SUMS"),
    ],
)
def test_names_that_lead_elsewhere_or_are_unknown(passing_package: Path, tmp_path: Path, name: str, words: str) -> None:
    layout = tmp_path / "layout"
    publish(passing_package, f"oci:{layout}:v1")

    def change(manifest: dict[str, Any]) -> None:
        manifest["layers"].append(
            {**manifest["config"], "annotations": {"org.opencontainers.image.title": name}},
        )

    forge(layout, "v1", change)
    assert words in refused("pull", f"oci:{layout}:v1", "--output", tmp_path / "got")
    assert not list(tmp_path.rglob("*escaped*"))
    assert not (tmp_path / "got").exists()


def layer(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    """The layer of a file."""
    title = "org.opencontainers.image.title"
    return next(each for each in manifest["layers"] if each["annotations"][title] == name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(artifactType="application/vnd.other"), "not a package of qwen-onnx"),
        (lambda m: m.update(schemaVersion=1), "not an OCI image manifest"),
        (lambda m: m["layers"][0].update(digest="sha256:../../../etc/passwd"), "not an OCI image manifest"),
        (lambda m: m["layers"][0].update(size=-1), "not an OCI image manifest"),
        (lambda m: m["layers"][3].update(size=7), "is longer than the 7 bytes announced"),
        (lambda m: m["layers"][3].update(size=10**7), "ended after"),
        (lambda m: m["layers"][3].update(size=10**15), "the disk is full"),
        (lambda m: layer(m, SUMS).update(size=10**7), "is announced with 10,000,000 bytes"),
        (lambda m: m["layers"].pop(3), "not announced"),
        (lambda m: m["layers"][3].pop("annotations"), "a layer without a name"),
    ],
)
def test_manifests_that_lie(passing_package: Path, tmp_path: Path, change: Any, words: str) -> None:
    layout = tmp_path / "layout"
    publish(passing_package, f"oci:{layout}:v1")
    forge(layout, "v1", change)
    code = 3 if "disk" in words else 11
    assert words in refused("pull", f"oci:{layout}:v1", "--output", tmp_path / "got", code=code)
    assert not (tmp_path / "got").exists()


def test_what_is_no_layout(passing_package: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    assert "is not an OCI layout" in refused("publish", passing_package, f"oci:{tmp_path}/mine:v1")
    assert "there is no OCI layout" in refused("pull", f"oci:{tmp_path}/none:v1", "--output", tmp_path / "got")
    publish(passing_package, f"oci:{tmp_path}/layout:v1")
    assert "0 manifests have this tag" in refused("pull", f"oci:{tmp_path}/layout:v9", "--output", tmp_path / "got")
    (tmp_path / "layout/index.json").write_text("[" * 100_000)
    assert "index.json is damaged" in refused("pull", f"oci:{tmp_path}/layout:v1", "--output", tmp_path / "got")


def test_a_full_disk_is_named(passing_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qwen_onnx.publish.layout.os.fsync", full)
    assert "the disk is full" in refused("publish", passing_package, f"oci:{tmp_path}/layout:v1", code=3)


@pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed: apt-get install skopeo")
def test_skopeo_copies_a_layout(passing_package: Path, tmp_path: Path) -> None:
    publish(passing_package, f"oci:{tmp_path}/layout:v1")
    command = ["skopeo", "copy", f"oci:{tmp_path}/layout:v1", f"oci:{tmp_path}/other:v1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pull(f"oci:{tmp_path}/other:v1", "--output", tmp_path / "got")
    assert files_of(tmp_path / "got") == files_of(passing_package)
