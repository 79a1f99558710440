"""genai_config.json says what our targets write and nothing else: no library, no path, no odd number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.artifact.genai_config import GENAI_CONFIG, GenaiConfig
from qwen_onnx.artifact.manifest import open_runnable
from qwen_onnx.errors import ArtifactError, QwenOnnxError
from qwen_onnx.files import sha256_of
from qwen_onnx.runtime.engines.batch.layout import UnsupportedGraphError
from qwen_onnx.runtime.engines.genai import Engine, Shape
from qwen_onnx.runtime.engines.loading import EngineOptions, load_engine
from tests.conftest import run_cli

NPU = json.dumps({"NPU": {"MAX_PROMPT_LEN": "896", "MIN_RESPONSE_LEN": "128"}})
# what each target's builder writes
PROVIDERS: dict[str, dict[str, str]] = {
    "cuda": {"enable_cuda_graph": "0"},
    "dml": {"enable_graph_capture": "1"},
    "webgpu": {"enableGraphCapture": "0", "validationMode": "basic"},
    "NvTensorRtRtx": {"enable_cuda_graph": "1"},
    "OpenVINO": {"device_type": "NPU", "enable_causallm": "True", "load_config": NPU},
    "qnn": {},
    "cpu": {},
}


def settings() -> dict[str, Any]:
    """As the builder writes it for a CPU."""
    return {
        "model": {
            "type": "qwen2",
            "context_length": 64,
            "vocab_size": 288,
            "bos_token_id": 0,
            "eos_token_id": [1, 2],
            "pad_token_id": None,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": 32,
                "hidden_size": 64,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "num_key_value_heads": 1,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": 64, "temperature": 1, "top_p": 1.0, "do_sample": False},
    }


def written(folder: Path, value: Any) -> Path:
    (folder / GENAI_CONFIG).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def decoder(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["model"]["decoder"].update(changes)


def session(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["model"]["decoder"]["session_options"].update(changes)


def provider(name: str, **options: Any) -> Callable[[dict[str, Any]], object]:
    return session(provider_options=[{name: options}])


def names(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["model"]["decoder"]["inputs"].update(changes)


def model(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["model"].update(changes)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a library of operators": (session(custom_ops_library="ops.so"), "custom_ops_library"),
    "any entry of a session": (session(**{"session.load_model_format": "ORT"}), "session.load_model_format"),
    "a profile that is written": (session(enable_profiling="/tmp/profile"), "enable_profiling"),
    "a provider's library": (provider("qnn", backend_path="QnnHtp.so"), "backend_path"),
    "a provider of a library": (provider("plugin", library_path="ep.so"), "plugin"),
    "two providers": (session(provider_options=[{"cpu": {}}, {"cuda": {}}]), "at most 1 item"),
    "two providers in one": (session(provider_options=[{"cpu": {}, "cuda": {}}]), "one provider"),
    "OpenVINO's cache": (provider("OpenVINO", cache_dir="/tmp"), "cache_dir"),
    "OpenVINO's file": (provider("OpenVINO", load_config="/etc/config.json"), "load_config"),
    "OpenVINO's other keys": (provider("OpenVINO", load_config='{"NPU": {"PLUGIN": "x.so"}}'), "load_config"),
    "an absolute graph": (decoder(filename="/etc/model.onnx"), "filename"),
    "a graph above": (decoder(filename="../model.onnx"), "filename"),
    "a graph of Windows": (decoder(filename="C:model.onnx"), "filename"),
    "a hidden graph": (decoder(filename=".model.onnx"), "filename"),
    "another suffix": (decoder(filename="model.so"), "filename"),
    "a pipeline": (decoder(pipeline=[{"one": {"filename": "../x.onnx"}}]), "pipeline"),
    "an encoder": (model(encoder={"filename": "../x.onnx"}), "encoder"),
    "a tokenizer elsewhere": (model(tokenizer_dir="../other"), "tokenizer_dir"),
    "a conversion of printf": (names(past_key_names="past.%n"), "past_key_names"),
    "two conversions": (names(past_key_names="past.%d.%d"), "past_key_names"),
    "a name for all layers": (names(past_value_names="past.value"), "past_value_names"),
    "no name": (names(past_key_names=5), "past_key_names"),
    "no heads": (decoder(num_key_value_heads=0), "num_key_value_heads"),
    "a vocabulary of 1e9": (model(vocab_size=1_000_000_000), "vocab_size"),
    "a context of 1e12": (model(context_length=10**12), "context_length"),
    "a number as text": (model(vocab_size="288"), "vocab_size"),
    "a section": (lambda data: data.update(engine={}), "engine"),
}


@pytest.mark.parametrize("name", PROVIDERS)
def test_what_our_targets_write_is_read(name: str, tmp_path: Path) -> None:
    data = settings()
    session(provider_options=[{name: PROVIDERS[name]}])(data)
    assert GenaiConfig.read(written(tmp_path, data)).provider == name
    assert Shape.read(tmp_path) == Shape(64, 288, frozenset({1, 2}), name)


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_not_stand_there_is_refused_by_every_engine(name: str, tmp_path: Path) -> None:
    change, word = REFUSED[name]
    data = settings()
    change(data)
    written(tmp_path, data)
    for load in (Engine, lambda folder: load_engine(folder, EngineOptions(streams=2, capacity=64, threads=1))):
        with pytest.raises(ArtifactError, match=GENAI_CONFIG) as raised:
            load(tmp_path)
        assert word in raised.value.what


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[" * 100_000, "nested deeper"),
        ('{"model": {}, "model": {}}', "same key twice"),
        ("null", "damaged"),
        ("", "not JSON"),
    ],
)
def test_a_damaged_file_is_a_deliberate_error(text: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=word):
        Shape.read(written(tmp_path, text))


@pytest.mark.parametrize("key", ["past_key_names", "past_value_names"])
def test_a_missing_name_of_the_cache_is_no_reason_to_ask_another_engine(
    key: str, tiny_artifact: Path, tmp_path: Path
) -> None:
    data = json.loads((tiny_artifact / GENAI_CONFIG).read_text())
    del data["model"]["decoder"]["inputs"][key]
    with pytest.raises(ArtifactError, match="lacks a name of the KV cache") as raised:
        load_engine(written(tmp_path, data), EngineOptions(streams=2, capacity=64, threads=1))
    assert not isinstance(raised.value, UnsupportedGraphError)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (model(vocab_size=1 << 20), "logits has 288 where genai_config.json says 1048576"),
        (decoder(num_key_value_heads=2), "has 1 where genai_config.json says 2"),
    ],
)
def test_sizes_are_those_of_the_graph(
    change: Callable[[dict[str, Any]], object], word: str, tiny_artifact: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_artifact.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    data = json.loads((tiny_artifact / GENAI_CONFIG).read_text())
    change(data)
    with pytest.raises(ArtifactError, match=word):
        load_engine(written(folder, data), EngineOptions(streams=2, capacity=64, threads=1))


def changed(artifact: Path, folder: Path, change: Callable[[dict[str, Any]], object], **added: bytes) -> Path:
    """A copy whose manifest lists what was changed and added, as someone who wants to hide it would write it."""
    folder.mkdir()
    for path in artifact.iterdir():
        (folder / path.name).hardlink_to(path)
    for name in (GENAI_CONFIG, "manifest.json"):
        (folder / name).unlink()
    data = json.loads((artifact / GENAI_CONFIG).read_text())
    change(data)
    written(folder, data)
    for name, content in added.items():
        (folder / name).write_bytes(content)
    manifest = json.loads((artifact / "manifest.json").read_text())
    for name in (GENAI_CONFIG, *added):
        manifest["files"][name] = sha256_of(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_an_artifact_that_would_run_code_is_not_opened(tiny_build: Path, tmp_path: Path) -> None:
    """The reproduction of the review: a library, and no names, so that the engine that loads it is asked."""

    def attack(data: dict[str, Any]) -> None:
        session(custom_ops_library="ops.so")(data)
        del data["model"]["decoder"]["inputs"]["past_key_names"]

    library = changed(tiny_build, tmp_path / "library", lambda data: None, **{"ops.so": b"\x7fELF"})
    with pytest.raises(ArtifactError, match=r"'ops.so' is not a name of a file that a model needs"):
        open_runnable(library)
    named = changed(tiny_build, tmp_path / "named", attack)
    with pytest.raises(ArtifactError, match="custom_ops_library"):
        open_runnable(named)
    done = run_cli("generate", named, "x")
    assert done.returncode == ArtifactError.exit_code, done.stderr
    assert "custom_ops_library" in done.stderr


def test_the_graph_is_a_listed_file(tiny_build: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"names other.onnx, which is not a file of it"):
        open_runnable(changed(tiny_build, tmp_path / "other", decoder(filename="other.onnx")))


def test_a_graph_that_reads_outside_does_not_load(tiny_artifact: Path, tmp_path: Path) -> None:
    """ONNX Runtime itself refuses it; packages are refused before that."""
    import onnx

    folder = tmp_path / "model"
    folder.mkdir()
    data = tmp_path / "model.onnx.data"
    data.write_bytes((tiny_artifact / "model.onnx.data").read_bytes())
    written(folder, json.loads((tiny_artifact / GENAI_CONFIG).read_text()))
    for location in ("../model.onnx.data", str(data)):
        graph = onnx.load(tiny_artifact / "model.onnx", load_external_data=False)
        for tensor in graph.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        (folder / "model.onnx").write_bytes(graph.SerializeToString())
        with pytest.raises(QwenOnnxError, match="cannot load the model"):
            load_engine(folder, EngineOptions(streams=2, capacity=64, threads=1))
