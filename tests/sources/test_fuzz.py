"""Files of strangers that a build reads: each gives a record or a deliberate error, never anything else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from qwen_onnx.catalog.schema import Shape
from qwen_onnx.catalog.sources import HubSource
from qwen_onnx.errors import QwenOnnxError
from qwen_onnx.sources.checkpoint import INDEX_FILE, check_config, contradictions, read_json, shards
from qwen_onnx.sources.hub import HubReader
from qwen_onnx.sources.qwen1 import qwen2_settings
from tests.fixtures.fake_server import Handler, running
from tests.sources.strange import BOUNDED, documents

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 288,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default"},
    "text_config": None,
}
QWEN1 = CONFIG | {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "num_key_value_heads": None,
    "intermediate_size": 128,
    "seq_length": 256,
    "layer_norm_epsilon": 1e-6,
    "kv_channels": 32,
}
INDEX = {"metadata": {"total_size": 3}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
HUGGINGFACE = [
    {"type": "file", "path": "config.json", "size": 3, "oid": "0" * 40},
    {"type": "file", "path": "a.safetensors", "size": 9, "oid": "0" * 40, "lfs": {"oid": "1" * 64, "size": 9}},
]
MODELSCOPE = {
    "Data": {
        "Files": [
            {"Type": "blob", "Path": "config.json", "Size": 3, "Sha256": "0" * 64},
            {"Type": "blob", "Path": "a.safetensors", "Size": 9, "Sha256": "1" * 64},
        ]
    }
}


@pytest.mark.parametrize("valid", [CONFIG, QWEN1], ids=["qwen2", "qwen1"])
def test_configs(valid: dict[str, Any], tmp_path: Path) -> None:
    accepted = 0

    @BOUNDED
    @given(documents(valid))
    def check(document: bytes) -> None:
        nonlocal accepted
        (tmp_path / "config.json").write_bytes(document)
        with contextlib.suppress(QwenOnnxError):
            config = read_json(tmp_path / "config.json")
            check_config(config, valid["architectures"][0], "config.json")
            contradictions(config, Shape(layers=2, hidden_size=64))
            if valid is QWEN1:
                qwen2_settings(config)
            accepted += 1

    check()
    assert accepted, "not every mutation is a fault"


@BOUNDED
@given(document=documents(INDEX))
def test_indexes_of_shards(document: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_bytes(document)
    with contextlib.suppress(QwenOnnxError):
        for shard in shards(tmp_path):
            assert shard.parent == tmp_path
            assert not shard.name.startswith(".")


class Listing(Handler):
    """A hub whose listing is whatever is set."""

    document = b""

    def answer(self, path: str, query: dict[str, str]) -> None:
        self.send(200, self.document)


@pytest.fixture(scope="module")
def hub() -> Iterator[Any]:
    with running(Listing) as fake:
        yield fake


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "valid"), [("huggingface", HUGGINGFACE), ("modelscope", MODELSCOPE)])
def test_listings(kind: Any, valid: Any, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{hub.port}")
    source = HubSource(kind=kind, repo="org/tiny", revision="0" * 40)
    accepted = 0

    with HubReader(source) as reader:

        @BOUNDED
        @given(documents(valid))
        def check(document: bytes) -> None:
            nonlocal accepted
            hub.document = document
            with contextlib.suppress(QwenOnnxError):
                for file in reader.listing():
                    assert "/" not in file.name
                    assert not file.name.startswith(".")
                    assert file.size >= 0
                    accepted += 1

        check()
        hub.document = json.dumps(valid).encode()
        assert [file.name for file in reader.listing()] == ["config.json", "a.safetensors"]
    assert accepted, "not every mutation is a fault"
