"""Only the bytes that were verified leave, whatever happens to the file in the meantime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.errors import PublishError
from qwen_onnx.publish.addresses import HubAddress, LayoutAddress, RegistryAddress
from qwen_onnx.publish.bundle import BLOCK, Bundle, CheckedFile, Item, checked_blocks, open_bundle
from qwen_onnx.publish.huggingface import send_to_huggingface
from qwen_onnx.publish.layout import send_to_layout
from qwen_onnx.publish.modelscope import send_to_modelscope
from qwen_onnx.publish.registry import send_to_registry
from qwen_onnx.sources.transfer import STEP, teller
from tests.fixtures.fake_hubs import sha256
from tests.publish.conftest import publish, pull


def quiet(_: str) -> None:
    """No progress."""


def item_of(path: Path, content: bytes) -> Item:
    path.write_bytes(content)
    return Item(path.name, path, len(content), sha256(content))


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_a_file_as_it_was_is_sent_whole(tmp_path: Path, size: int) -> None:
    content = bytes(index * 7 % 251 for index in range(size))
    item, told = item_of(tmp_path / "file", content), []
    assert b"".join(checked_blocks(item, told.append)) == content
    assert sum(told) == size
    with CheckedFile(item) as file:
        assert file.read() == content
        assert file.seek(0) == 0
        assert b"".join(iter(lambda: file.read(1000), b"")) == content


@pytest.mark.parametrize("change", [lambda data: data[:-1] + b"!", lambda data: data[:-1], lambda data: data + b"!"])
def test_a_changed_file_is_never_sent_whole(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    content = b"x" * (2 * BLOCK + 5)
    item, sent = item_of(tmp_path / "file", content), []
    item.path.write_bytes(change(content))
    with pytest.raises(PublishError, match="changed after it was verified"):
        sent.extend(checked_blocks(item))
    assert sum(map(len, sent)) < len(change(content))
    with CheckedFile(item) as file, pytest.raises(PublishError, match="changed after it was verified"):
        list(iter(lambda: file.read(BLOCK), b""))


def test_large_files_say_how_far_they_are() -> None:
    said: list[str] = []
    tell = teller("weights", 3 * STEP, said.append)
    for _ in range(6):
        tell(STEP // 2)
    assert said == ["weights: 67 of 201 MB", "weights: 134 of 201 MB", "weights: 201 of 201 MB"]
    teller("small", 10, said.append)(10)
    assert len(said) == 3


@pytest.fixture
def changed_since(package: Path) -> Bundle:
    """A package that was verified and then changed, in its smallest and in its largest file."""
    bundle = open_bundle(package)
    for name in ("tokenizer.json", "model.onnx.data"):
        content = (package / name).read_bytes()
        (package / name).write_bytes(content[:-1] + b"!")
    return bundle


def test_a_layout_keeps_its_tag(passing_package: Path, changed_since: Bundle, tmp_path: Path) -> None:
    old = publish(passing_package, f"oci:{tmp_path}/layout:v1")
    index = (tmp_path / "layout/index.json").read_bytes()
    blobs = set((tmp_path / "layout/blobs/sha256").iterdir())
    for blob in blobs:
        blob.unlink()
    with pytest.raises(PublishError, match="changed after it was verified"):
        send_to_layout(changed_since, LayoutAddress(tmp_path / "layout", "v1"), quiet)
    assert (tmp_path / "layout/index.json").read_bytes() == index
    publish(passing_package, f"oci:{tmp_path}/layout:v1")
    pull(f"oci:{tmp_path}/layout:v1", "--output", tmp_path / "got", "--expect", old["digest"])


def test_a_registry_gets_no_tag(registry: Any, changed_since: Bundle) -> None:
    address = RegistryAddress(f"127.0.0.1:{registry.port}", "models/tiny", "v1")
    with pytest.raises(PublishError, match="changed after it was verified"):
        send_to_registry(changed_since, address, quiet, plain_http=False)
    assert not registry.manifests


def test_a_hub_gets_no_commit(hub: Any, changed_since: Bundle) -> None:
    send = send_to_huggingface if hub.variable == "HF_TOKEN" else send_to_modelscope
    with pytest.raises(PublishError, match="changed after it was verified"):
        send(changed_since, HubAddress(hub.address[:2], "org/tiny", None), quiet, private=False)
    assert len(hub.repositories["org/tiny"]) == 1
    assert sha256((changed_since.package.path / "model.onnx.data").read_bytes()) not in hub.stored
