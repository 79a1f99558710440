"""From peft's form to a file for slots: what does not belong to the artifact is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_onnx.artifact.adapter_file import read_adapter_file
from qwen_onnx.artifact.adapter_slots import slots_of_graph
from qwen_onnx.artifact.manifest import read_manifest
from qwen_onnx.errors import ArtifactError, QwenOnnxError, SourceError, UnsupportedModelError
from qwen_onnx.records import Verdict
from qwen_onnx.runtime.engines.adapters import AdapterSource
from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.sources.adapter import WEIGHTS, TrainedAgainst, open_adapter
from qwen_onnx.sources.fetch import weights_digest
from qwen_onnx.sources.slotted import convert_adapter, host_of
from tests.fixtures.adapters import RANK, make_adapter, sign_adapter

A = "base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight"


def test_the_record_says_what_is_known(slotted_artifact: Path, tmp_path: Path) -> None:
    weights = weights_digest(read_manifest(slotted_artifact).source.files)
    peft, file = make_adapter(tmp_path / "Faq 1", modules=("self_attn.v_proj", "mlp.up_proj")), tmp_path / "a" / "f"
    stranger = convert_adapter(open_adapter(peft), slotted_artifact, file)
    assert (stranger.name, stranger.verdict, stranger.data) == ("faq-1", Verdict.UNVERIFIED, None)
    assert (stranger.rank, stranger.targets, stranger.base.weights) == (RANK, ("up_proj", "v_proj"), weights)
    with pytest.raises(SourceError, match="there is a file already"):
        convert_adapter(open_adapter(peft), slotted_artifact, file)
    sign_adapter(peft, weights)
    own = convert_adapter(open_adapter(peft), slotted_artifact, tmp_path / "own")
    assert (own.name, own.verdict, own.data, own.content) == ("faq", Verdict.PASS, "d" * 64, stranger.content)
    host = host_of(slotted_artifact, read_manifest(slotted_artifact))
    assert read_adapter_file(tmp_path / "own", host).record == own


def test_onnxruntime_genai_answers_as_the_engine_does(slotted_artifact: Path, tmp_path: Path) -> None:
    import onnxruntime_genai as og

    peft, genai = open_adapter(make_adapter(tmp_path / "faq")), tmp_path / "faq.onnx_adapter"
    convert_adapter(peft, slotted_artifact, tmp_path / "faq.safetensors", genai)
    model = og.Model(str(slotted_artifact))
    known = og.Adapters(model)
    known.load(str(genai), "faq")
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=40, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.set_active_adapter(known, "faq")
    generator.append_tokens(list(range(5, 25)))
    for _ in range(8):
        generator.generate_next_token()
    ours = BatchModel(
        slotted_artifact,
        rows=1,
        capacity=64,
        threads=1,
        adapters=[AdapterSource.of("faq", tmp_path / "faq.safetensors")],
    )
    ids = list(range(5, 25))
    told = []
    logits = ours.extend(0, np.array([ids]), [0], adapter="faq")
    for past in range(20, 28):
        told.append(int(logits[0].argmax()))
        logits = ours.extend(0, np.array([[told[-1]]]), [past], adapter="faq")
    assert list(generator.get_sequence(0))[20:] == told
    with pytest.raises(SourceError, match="there is a file already"):
        convert_adapter(peft, slotted_artifact, tmp_path / "another", genai)


def test_an_adapter_of_other_weights_is_refused(slotted_artifact: Path, tmp_path: Path) -> None:
    peft = make_adapter(tmp_path / "faq")
    sign_adapter(peft, "0" * 64)
    with pytest.raises(UnsupportedModelError, match="trained on other weights, those of starter"):
        convert_adapter(open_adapter(peft), slotted_artifact, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_an_adapter_that_was_trained_against_another_artifact_is_refused(
    slotted_artifact: Path, tmp_path: Path
) -> None:
    peft = make_adapter(tmp_path / "faq")
    manifest = read_manifest(slotted_artifact)
    host = host_of(slotted_artifact, manifest)
    for graph in ("0" * 64, host.graph):
        sign_adapter(peft, host.weights, against=TrainedAgainst(artifact="starter/cpu-int4", graph=graph))
        adapter = open_adapter(peft)
        with pytest.raises(UnsupportedModelError, match="repairs the rounding of that artifact's weights"):
            adapter.adapted()
        if graph == host.graph:
            assert convert_adapter(adapter, slotted_artifact, tmp_path / "file").against == host.graph
            continue
        with pytest.raises(UnsupportedModelError, match="trained against starter/cpu-int4, whose graph has the digest"):
            convert_adapter(adapter, slotted_artifact, tmp_path / "file")
        assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("wrong", ["rank", "layer", "shape", "numbers", "twice"])
def test_an_adapter_that_does_not_fit_is_refused(slotted_artifact: Path, tmp_path: Path, wrong: str) -> None:
    peft = make_adapter(tmp_path / "faq", rank=9 if wrong == "rank" else RANK)
    tensors = load_file(peft / WEIGHTS)
    for part, shape in (("A", (RANK, 64)), ("B", (64, RANK))):
        if wrong == "layer":
            tensors[A.format(layer=7, part=part)] = torch.ones(shape)
        if wrong == "twice":
            tensors[A.format(layer=1, part=part).replace("model.model.", "model.")] = torch.ones(shape)
    if wrong == "shape":
        tensors[A.format(layer=1, part="A")] = torch.ones(RANK, 65)
    if wrong == "numbers":
        tensors[A.format(layer=1, part="B")] = torch.full((64, RANK), float("nan"))
    save_file(tensors, peft / WEIGHTS)
    told = {
        "rank": "rank is 9, the artifact's slots take 8",
        "layer": "no slot for model.layers.7.self_attn.q_proj",
        "shape": r"is for \[64, 65\], the artifact's is \[64, 64\]",
        "numbers": "NaN or infinity",
        "twice": "have one slot",
    }[wrong]
    with pytest.raises(UnsupportedModelError, match=told):
        convert_adapter(open_adapter(peft), slotted_artifact, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_pickle_is_refused(slotted_artifact: Path, tmp_path: Path) -> None:
    peft = make_adapter(tmp_path / "faq")
    (peft / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(QwenOnnxError, match="pickled files"):
        convert_adapter(open_adapter(peft), slotted_artifact, tmp_path / "file")


def test_an_artifact_without_slots_or_altered_is_refused(
    slotted_artifact: Path, exact_artifact: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="no slots for adapters"):
        slots_of_graph(exact_artifact / "model.onnx")
    (tmp_path / "graph").write_bytes(b"\xff" * 9)
    with pytest.raises(ArtifactError, match="cannot be read"):
        slots_of_graph(tmp_path / "graph")
    with pytest.raises(ArtifactError, match="there is no artifact"):
        convert_adapter(open_adapter(make_adapter(tmp_path / "faq")), tmp_path / "gone", tmp_path / "file")
