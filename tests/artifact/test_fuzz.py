"""Whatever a stranger writes into the files that describe a folder is a record or a deliberate error."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_onnx.artifact.checksums import SUMS, read_sums
from qwen_onnx.artifact.genai_config import GENAI_CONFIG, GenaiConfig
from qwen_onnx.artifact.manifest import MANIFEST, Manifest, SourceRecord, read_manifest
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import make_plan
from qwen_onnx.errors import QwenOnnxError
from qwen_onnx.package.records import PACKAGE, PackageRecord, read_package
from qwen_onnx.runtime.engines.batch.model import KvLayout
from tests.artifact.test_genai_config import settings as genai_settings

BOUNDED = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# values that readers stumble over
ODD: list[Any] = [None, True, 0, -1, 10**12, 1e300, "", "\x1b[2J", "../x", "%s%n", [], [[]], {}, {"a": {}}, "x" * 5000]


@pytest.fixture(scope="module")
def documents(repository: Path) -> dict[str, bytes]:
    """One valid document for each file."""
    plan = make_plan(load_catalog(repository), "starter", "cpu")
    manifest = Manifest(
        key="k",
        plan=plan,
        plan_digest=plan.digest,
        source=SourceRecord(origin="test", revision="1", files={}),
        packages={"torch": "1"},
        python="3",
        files={"model.onnx": "0" * 64},
        size_bytes=1,
        readback={},
        verdict="PASS",
        claim="proven",
        built_seconds=1.0,
    )
    package = PackageRecord(
        id="starter-int4-generic-cpu:1",
        profile="sdk2",
        model="starter",
        target="cpu",
        precision="int4",
        artifact_key="k",
        plan_digest="d",
        verdict="PASS",
        claim="proven",
        unverified=False,
    )
    return {
        GENAI_CONFIG: json.dumps(genai_settings()).encode(),
        MANIFEST: manifest.model_dump_json().encode(),
        PACKAGE: package.model_dump_json().encode(),
        SUMS: b"".join(b"%s  %s\n" % (b"0" * 64, name) for name in (b"a.json", b"b.onnx")),
    }


def read_configuration(folder: Path) -> object:
    """All that is taken from it, not the record alone."""
    config = GenaiConfig.read(folder)
    return config.provider, config.graph_file, KvLayout.read(folder)


READERS: dict[str, Callable[[Path], object]] = {
    GENAI_CONFIG: read_configuration,
    MANIFEST: read_manifest,
    PACKAGE: read_package,
    SUMS: read_sums,
}
NAMES = st.sampled_from(sorted(READERS))


def attempt(folder: Path, name: str, body: bytes) -> bool:
    """Whether it is read; anything but a record and a deliberate error fails the test."""
    (folder / name).write_bytes(body)
    try:
        READERS[name](folder)
    except QwenOnnxError:
        return False
    return True


def test_the_documents_are_valid(documents: dict[str, bytes], tmp_path: Path) -> None:
    assert all(attempt(tmp_path, name, body) for name, body in documents.items())


@BOUNDED
@given(name=NAMES, body=st.binary(max_size=300))
def test_any_bytes(name: str, body: bytes, tmp_path: Path) -> None:
    attempt(tmp_path, name, body)


@BOUNDED
@given(name=NAMES, data=st.data())
def test_damaged_bytes(name: str, data: st.DataObject, documents: dict[str, bytes], tmp_path: Path) -> None:
    whole = documents[name]
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(len(whole), start + 40)))
    attempt(tmp_path, name, whole[:start] + data.draw(st.binary(max_size=20)) + whole[end:])


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every object or list of a document with each of its keys."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in pairs for place in ((value, key), *places(inner))]


@BOUNDED
@given(name=NAMES.filter(lambda name: name != SUMS), data=st.data())
def test_a_valid_document_with_odd_values(
    name: str, data: st.DataObject, documents: dict[str, bytes], tmp_path: Path
) -> None:
    document = json.loads(documents[name])
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(document)))
        # a copy: a later turn may put something into it, and would into itself
        odd = copy.deepcopy(data.draw(st.sampled_from(ODD)))
        if data.draw(st.booleans()):
            container[key] = odd
        elif isinstance(container, dict):
            container[data.draw(st.sampled_from(["", "custom_ops_library", "\0", key + "x"]))] = odd
        else:
            del container[key:]
    attempt(tmp_path, name, json.dumps(document).encode())
