"""Training against an artifact: the base has its rounded weights, and the adapter belongs to it alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen_onnx.artifact.genai_config import GENAI_CONFIG
from qwen_onnx.artifact.manifest import MANIFEST, read_manifest
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import make_plan
from qwen_onnx.catalog.training import load_training
from qwen_onnx.errors import ArtifactError, TrainingError, UnsupportedModelError
from qwen_onnx.finetune.against import open_against
from qwen_onnx.finetune.encode import IGNORED, Encoded
from qwen_onnx.finetune.job import FinetuneJob, finetune, prepare
from qwen_onnx.runtime.engines.adapters import AdapterSource
from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.sources.adapter import open_adapter
from qwen_onnx.sources.fetch import folder_checksums, weights_digest
from qwen_onnx.sources.slotted import convert_adapter, host_of
from tests.conftest import REPOSITORY, make_tiny_checkpoint, rewrite_json
from tests.fixtures.adapters import described, own_plan, with_slots
from tests.fixtures.dequantized import with_weights_of

TRAINING = load_training(REPOSITORY, overrides=["epochs=4", "rank=4", "learning_rate=1e-2", "warmup=0", "every=4"])


@pytest.fixture(scope="module")
def rounded(tiny_artifact: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in int4, with slots for adapters of rank 8."""
    folder = tmp_path_factory.mktemp("rounded") / "int4"
    return with_slots(tiny_artifact, tiny_checkpoint, folder, precision="int4")


def model_of(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def test_the_base_gets_the_weights_of_the_artifact(rounded: Path, tiny_checkpoint: Path) -> None:
    found, expected, plain = (model_of(tiny_checkpoint) for _ in range(3))
    open_against(rounded, TRAINING).put_weights(found, tiny_checkpoint)
    assert with_weights_of(expected, rounded / "model.onnx") > 2 * 4
    ours, theirs, before = (dict(model.model.layers.named_parameters()) for model in (found, expected, plain))
    matrices = [name for name in ours if name.endswith("proj.weight")]
    assert len(matrices) == 2 * 7
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)
        assert torch.equal(tensor, before[name]) == (name not in matrices), name
    torch.testing.assert_close(found.lm_head.weight, expected.lm_head.weight, rtol=0, atol=1e-6)


def test_a_head_that_is_rounded_alone_gets_weights_of_its_own(rounded: Path, tiny_checkpoint: Path) -> None:
    model, against = model_of(tiny_checkpoint), open_against(rounded, TRAINING)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    table = model.model.embed_tokens.weight.detach().clone()
    against.put_weights(model, tiny_checkpoint)
    shared = model.lm_head.weight is model.model.embed_tokens.weight
    assert shared != against.parts_tables
    assert torch.equal(model.model.embed_tokens.weight, table) == against.parts_tables
    assert not torch.equal(model.lm_head.weight, table)


@pytest.mark.slow
def test_an_adapter_is_trained_on_these_weights_and_is_served_with_them_alone(
    rounded: Path, slotted_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    lines = [f'{{"instruction": "What is {number}?", "output": "It is {number}."}}' for number in range(20)]
    (tmp_path / "faq.jsonl").write_text("\n".join(lines))
    plan = make_plan(load_catalog(REPOSITORY), "starter", "cpu")
    places = (tmp_path / "faq.jsonl", tmp_path / "adapters/faq", "faq", tmp_path / "cache")
    job = FinetuneJob(plan, TRAINING, *places, source=tiny_checkpoint, against=rounded)
    ready = prepare(job)
    report, folder = finetune(job, ready)
    made, host = report.manifest, host_of(rounded, read_manifest(rounded))
    assert made.against is not None
    assert made.against.graph == host.graph
    assert "with the weights of checkpoint/cpu-int4" in report.claim
    assert host.graph in (folder / "report.html").read_text()
    # the loss before anything is learnt is that of the rounded model, and not that of the checkpoint
    losses = {}
    for name, files in (("rounded", rounded), ("plain", None)):
        model = model_of(tiny_checkpoint)
        if files:
            with_weights_of(model, files / "model.onnx")
        losses[name] = held_out_loss(model, ready.rows.held_out)
    assert made.loss_before == pytest.approx(losses["rounded"], abs=1e-4)
    assert abs(losses["plain"] - losses["rounded"]) > 1e-3
    adapter = open_adapter(folder)
    with pytest.raises(UnsupportedModelError, match="trained against checkpoint/cpu-int4"):
        convert_adapter(adapter, slotted_artifact, tmp_path / "other")
    file = tmp_path / "faq.safetensors"
    assert convert_adapter(adapter, rounded, file).against == host.graph
    source = AdapterSource.of("faq", file)
    assert BatchModel(rounded, rows=1, capacity=64, threads=1, adapters=[source]).adapters.told()[0].name == "faq"
    with pytest.raises(ArtifactError, match="trained against another artifact"):
        BatchModel(slotted_artifact, rows=1, capacity=64, threads=1, adapters=[source])


def held_out_loss(model: Any, rows: list[Encoded]) -> float:
    """Mean over the trained tokens of all rows, in nats."""
    total = count = 0.0
    for row in rows:
        labels = torch.tensor(row.labels[1:])
        with torch.inference_mode():
            logits = model(torch.tensor([row.ids])).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != IGNORED).sum())
    return total / count


def test_an_artifact_of_other_weights_is_refused(rounded: Path, tmp_path: Path) -> None:
    other = weights_digest(folder_checksums(make_tiny_checkpoint(tmp_path / "other", seed=1)))
    with pytest.raises(TrainingError, match="built from other weights") as caught:
        open_against(rounded, TRAINING).require_base(other)
    assert "qwen-onnx finetune" in str(caught.value)


def test_artifacts_that_nothing_can_be_trained_against_are_refused(
    rounded: Path, slotted_artifact: Path, tiny_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="there is no artifact"):
        open_against(tmp_path / "none", TRAINING)
    with pytest.raises(TrainingError, match="holds no rounded weights"):
        open_against(slotted_artifact, TRAINING)
    with pytest.raises(TrainingError, match="rank is 16, the artifact's slots take 8") as caught:
        open_against(rounded, load_training(REPOSITORY))
    assert caught.value.hint == "--set rank=8"
    without = Path(shutil.copytree(tiny_artifact, tmp_path / "without"))
    with pytest.raises(ArtifactError, match="no slots for adapters"):
        open_against(described(without, tiny_checkpoint, own_plan(tiny_checkpoint, "int4")), TRAINING)
    device = Path(shutil.copytree(rounded, tmp_path / "device"))
    rewrite_json(device / GENAI_CONFIG, model=on_openvino(device))
    (device / MANIFEST).unlink()
    with pytest.raises(TrainingError, match="takes no adapters, and its weights are in that device's form"):
        open_against(described(device, tiny_checkpoint, read_manifest(rounded).plan), TRAINING)


def on_openvino(folder: Path) -> dict[str, object]:
    model = json.loads((folder / GENAI_CONFIG).read_text())["model"]
    model["decoder"]["session_options"]["provider_options"] = [{"OpenVINO": {"device_type": "NPU"}}]
    return dict(model)


def test_an_altered_artifact_is_refused(rounded: Path, tmp_path: Path) -> None:
    altered = Path(shutil.copytree(rounded, tmp_path / "altered"))
    with (altered / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        open_against(altered, TRAINING)
