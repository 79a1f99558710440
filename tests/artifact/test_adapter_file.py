"""Files of adapters are strangers' input: what does not fit the slots is refused before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_onnx.artifact.adapter_file import LENGTH, RECORD, Host, read_adapter_file, write_adapter_file
from qwen_onnx.artifact.adapter_slots import METADATA, Part, Slot, Slots, read_slots
from qwen_onnx.errors import ArtifactError

WEIGHTS = "a" * 64
QKV = Slot(
    layer=0,
    name="model.layers.0.attn.qkv_proj",
    inputs=8,
    parts=(Part(matrix="q_proj", outputs=8), Part(matrix="k_proj", outputs=4), Part(matrix="v_proj", outputs=4)),
)
DOWN = Slot(layer=0, name="model.layers.0.mlp.down_proj", inputs=12, parts=(Part(matrix="down_proj", outputs=8),))
SLOTS = Slots(rank=4, slots=(QKV, DOWN))
HOST = Host(SLOTS, WEIGHTS, graph="e" * 64)
TOLD: dict[str, Any] = {
    "name": "faq",
    "base": {"model": "starter", "weights": WEIGHTS},
    "rank": 2,
    "targets": ["q_proj", "v_proj"],
    "verdict": "PASS",
    "adapter": "b" * 64,
}


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    draw = np.random.default_rng(0).standard_normal
    return {QKV.a: draw((8, 4), np.float32), QKV.b: draw((4, 16), np.float32)}


def written(folder: Path, *, more: dict[str, Any] | None = None, **told: Any) -> Path:
    write_adapter_file(folder / "faq.safetensors", tensors() | (more or {}), **{**TOLD, **told})
    return folder / "faq.safetensors"


def edited(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a file and nothing behind it."""
    content = file.read_bytes()
    end = LENGTH + int.from_bytes(content[:LENGTH], "little")
    header = json.loads(content[LENGTH:end])
    edit(header)
    body = json.dumps(header).encode()
    file.write_bytes(len(body).to_bytes(LENGTH, "little") + body + content[end:])


def test_what_was_written_is_read_back_and_is_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    file = written(tmp_path, against=HOST.graph)
    found = read_adapter_file(file, HOST)
    assert (found.record.name, found.record.against) == ("faq", HOST.graph)
    assert found.bytes == (8 * 4 + 4 * 16) * 4
    for name, tensor in load_file(file).items():
        np.testing.assert_array_equal(tensor, tensors()[name])
        np.testing.assert_array_equal(found.tensors[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    # one that fits every artifact of its base is read by whoever does not know the field
    assert b"against" in file.read_bytes()
    assert b"against" not in written(tmp_path).read_bytes()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"base": {"model": "other", "weights": "c" * 64}}, "belongs to other weights, those of other"),
        ({"against": "c" * 64}, "trained against another artifact, whose graph has the digest cccccccccccc"),
        ({"rank": 5}, "its rank is 5, the artifact's slots take 4"),
        ({"rank": 3}, r"has A \[8, 4\] and B \[4, 16\]"),
        ({"rank": 1}, r"has A \[8, 4\]"),
        ({"verdict": "FAIL"}, "training ended with FAIL"),
        ({"more": {"lm_head.weight": np.ones((2, 2), np.float32)}}, "'lm_head.weight' is no slot"),
        ({"more": {DOWN.a: np.ones((12, 2), np.float32)}}, "A or B alone"),
        ({"more": {DOWN.a: np.ones((11, 2), np.float32), DOWN.b: np.ones((2, 8), np.float32)}}, "down_proj has A"),
        ({"more": {QKV.a: np.full((8, 4), np.nan, np.float32)}}, "NaN or infinity"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, told: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_adapter_file(written(tmp_path, **told), HOST)


def _record(**changes: Any) -> Callable[[dict[str, Any]], object]:
    def edit(header: dict[str, Any]) -> None:
        told = json.loads(header["__metadata__"][RECORD])
        header["__metadata__"][RECORD] = json.dumps({**told, **changes})

    return edit


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no record": (lambda header: header.pop("__metadata__"), "does not say what it was made for"),
    "unknown key": (_record(turbo=1), "turbo"),
    "other rank": (_record(rank=[2]), "its header is damaged: rank"),
    "half": (lambda header: header[QKV.a].update(dtype="F16"), "dtype"),
    "one dimension": (lambda header: header[QKV.a].update(shape=[32]), "shape"),
    "negative": (lambda header: header[QKV.a].update(shape=[-8, -4]), "shape"),
    "overlap": (lambda header: header[QKV.b].update(data_offsets=[0, 256]), "does not lie where its shape says"),
    "beyond": (lambda header: header[QKV.b].update(data_offsets=[128, 1 << 50]), "does not lie where"),
    "gone": (lambda header: (header.pop(QKV.a), header.pop(QKV.b)), "holds no weights"),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_faulty_header_is_refused(tmp_path: Path, fault: str) -> None:
    file, (edit, message) = written(tmp_path), HEADERS[fault]
    edited(file, edit)
    with pytest.raises(ArtifactError, match=message):
        read_adapter_file(file, HOST)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-4], "bytes of weights, its header says"),
        (lambda content: content + b"\0" * 4, "bytes of weights, its header says"),
        (lambda content: content[:-1] + b"\1", "truncated or altered"),
        (lambda content: b"\x80\x04" + content, "not an adapter in safetensors form"),
        (lambda content: (1 << 40).to_bytes(8, "little") + content[8:], "not an adapter in safetensors form"),
        (lambda content: content[:8] + b"[" * 200 + content[208:], "nested deeper|not JSON"),
        (lambda content: b"", "not an adapter in safetensors form"),
    ],
)
def test_damaged_bytes_are_refused(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    file = written(tmp_path)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ArtifactError, match=message):
        read_adapter_file(file, HOST)


def test_a_link_is_no_adapter(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(written(tmp_path))
    with pytest.raises(ArtifactError, match="not a plain file"):
        read_adapter_file(link, HOST)


def test_a_damaged_list_of_slots_is_refused() -> None:
    text = SLOTS.model_dump_json()
    assert read_slots({METADATA: text}, "a graph") == SLOTS
    for broken in ("", "[]", text.replace('"inputs":8', '"inputs":0'), text.replace('"rank":4', '"rank":4,"more":1')):
        with pytest.raises(ArtifactError, match="list of slots"):
            read_slots({METADATA: broken}, "a graph")
    with pytest.raises(ArtifactError, match="no slots for adapters"):
        read_slots({}, "a graph")
