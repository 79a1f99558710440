"""Slots in a graph: in every layer, on the command line, and not where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from qwen_onnx.artifact.adapter_slots import slots_of_graph
from qwen_onnx.artifact.manifest import read_manifest
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import make_plan
from qwen_onnx.catalog.slots import slotted
from qwen_onnx.errors import ConfigError, ExportError
from qwen_onnx.export.passes.lora_slots.graph import insert_slots
from qwen_onnx.export.readback.onnx import read_graph
from qwen_onnx.runtime import Engine
from tests.conftest import REPOSITORY, run_cli
from tests.fixtures.adapters import make_adapter


@pytest.mark.parametrize("kind", ["tiny_artifact", "exact_artifact"])
def test_every_matrix_of_a_layer_has_a_slot(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source: Path = request.getfixturevalue(kind)
    slots = insert_slots(source / "model.onnx", tmp_path / "slotted", 8)
    assert slots == slots_of_graph(tmp_path / "slotted" / "model.onnx")
    told = [(slot.layer, slot.name.rpartition(".")[2], slot.inputs, slot.outputs) for slot in slots.slots]
    one = [("qkv_proj", 64, 128), ("o_proj", 64, 64), ("gate_proj", 64, 128), ("up_proj", 64, 128)]
    assert told == [(layer, *sizes) for layer in (0, 1) for sizes in [*one, ("down_proj", 128, 64)]]
    assert slots.slots[0].places() == {"q_proj": (0, 64), "k_proj": (64, 96), "v_proj": (96, 128)}
    # a slot is no matrix of the model
    facts = [read_graph(folder / "model.onnx") for folder in (source, tmp_path / "slotted")]
    assert facts[0]["floats"] == facts[1]["floats"]
    assert facts[0]["nodes"] == facts[1]["nodes"]
    assert {path.name for path in source.iterdir()} == {path.name for path in (tmp_path / "slotted").iterdir()}


def test_a_graph_that_lacks_a_matrix_takes_no_slots(exact_artifact: Path, tmp_path: Path) -> None:
    model = onnx.load(str(exact_artifact / "model.onnx"), load_external_data=False)
    found = next(node for node in model.graph.node if node.name == "/model/layers.1/mlp/up_proj/MatMul")
    found.name = "/model/layers.1/mlp/other/MatMul"
    (tmp_path / "genai_config.json").write_bytes((exact_artifact / "genai_config.json").read_bytes())
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(ExportError, match="layer 1 lacks up_proj"):
        insert_slots(tmp_path / "model.onnx", tmp_path / "slotted", 8)
    assert not (tmp_path / "slotted").exists()


def test_a_plan_says_what_takes_no_slots() -> None:
    catalog = load_catalog(REPOSITORY)
    plain = make_plan(catalog, "starter", "cpu")
    plan = slotted(plain, 16)
    assert list(plan.olive["passes"])[-1] == "slots"
    assert plan.digest != plain.digest
    assert plan.name == plain.name
    for model, target, rank, told in (
        ("starter", "cpu", 0, "rank"),
        ("starter", "cpu", 513, "rank"),
        ("starter", "cuda", 16, "CPUExecutionProvider"),
        ("qwen3-30b-a3b", "cpu", 16, "takes no slots"),
    ):
        with pytest.raises(ConfigError, match=told) as caught:
            slotted(make_plan(catalog, model, target), rank)
        assert "--adapter-rank" in str(caught.value)


@pytest.mark.slow
def test_the_command_line_builds_converts_and_refuses(tiny_checkpoint: Path, tmp_path: Path) -> None:
    artifact, file = tmp_path / "artifact", tmp_path / "faq.safetensors"
    built = run_cli(
        "optimize", "starter", "--precision", "fp32", "--source", tiny_checkpoint, "--output", artifact,
        "--adapter-rank", "8", "--no-verify",
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert read_manifest(artifact).plan.olive["passes"]["slots"] == {"type": "LoraSlots", "rank": 8}
    assert list(Engine(artifact, threads=1).generate([5, 6], max_new_tokens=4, stop_on_eos=False))
    peft = make_adapter(tmp_path / "faq")
    made = run_cli("adapter", "convert", peft, "--base", artifact, "--output", file)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["rank"] == 4
    again = run_cli("adapter", "convert", peft, "--base", artifact, "--output", file)
    assert again.returncode == 4
    assert "there is a file already" in again.stderr
    # refused before a server listens
    served = run_cli("serve", artifact, "--adapter", f"Faq={file}", "--port", "0")
    assert served.returncode == 2
    assert "a name has" in served.stderr
