"""The graph that is served, in fp32 arithmetic, is PyTorch with the same matrices; each fault of an exporter shows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from qwen_onnx.catalog.schema import Limits, Verification
from qwen_onnx.export.passes.genai_builder.build import build
from qwen_onnx.export.passes.genai_builder.options import GenAIModelBuilderOptions
from qwen_onnx.export.passes.gptq.options import CalibratedGptqOptions
from qwen_onnx.export.passes.gptq.quantize import quantize
from qwen_onnx.verify import Verdict, VerifyOptions, corpus, verify_artifact
from qwen_onnx.verify.graph import Graph
from qwen_onnx.verify.records import CheckResult
from qwen_onnx.verify.scoring import OnnxScorer
from qwen_onnx.verify.teacher import student_of
from tests.fixtures.architectures import MAKERS, make_checkpoint
from tests.fixtures.faults import Change, flipped, lost, missing_norm, other_base, swapped, transposed, with_constants

LIMITS = Limits(kld_mean=0.18, kld_p99=1.5, top1=0.01, ppl_ratio=1.2)
OPTIONS = {"window": 64, "threads": 1}
INT4 = {
    "precision": "int4",
    "block_size": 32,
    "is_symmetric": False,
    "accuracy_level": 4,
    "algo_config": "k_quant_last",
}
MOE = INT4 | {"is_symmetric": True, "qmoe_block_size": 32}
CUDA = INT4 | {"execution_provider": "cuda", "accuracy_level": 0, "fuse_qk_norm_gqa": False}
BUILDS: dict[str, dict[str, object]] = {
    "int4": INT4,
    "fp32": {"precision": "fp32"},
    "cuda": CUDA,
    "cuda-fp16": {"precision": "fp16", "execution_provider": "cuda", "fuse_qk_norm_gqa": False},
    "webgpu": CUDA | {"execution_provider": "webgpu", "accuracy_level": 4},
    "dml": CUDA | {"execution_provider": "dml", "shared_embeddings": False},
}
TENSORRT = {
    "precision": "int4",
    "execution_provider": "NvTensorRtRtx",
    "is_symmetric": True,
    "shared_embeddings": False,
    "fuse_qkv": False,
}


def judged(artifact: Path, checkpoint: Path, check: str = "graph_parity") -> CheckResult:
    options = VerifyOptions(checks=(check,), **OPTIONS)
    report = verify_artifact(artifact, checkpoint, None, LIMITS, level=Verification.NUMERICS_ON_CPU, options=options)
    return next(item for item in report.checks if item.name == check)


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizing megabytes into bytes takes longer than everything else here."""
    texts = {name: [corpus.Document(name, text)] for name, text in (("one", ascii_letters * 4), ("two", digits * 9))}
    monkeypatch.setattr(corpus, "domains", lambda render_chat: texts)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path]]:
    """Artifact and checkpoint of an architecture, built once in each way."""
    root, made = tmp_path_factory.mktemp("parity"), {}

    def make(architecture: str, way: str) -> tuple[Path, Path]:
        checkpoint, artifact = root / architecture, root / f"{architecture}-{way}"
        if architecture not in made:
            made[architecture] = make_checkpoint(architecture, checkpoint)
        if not artifact.exists():
            options = BUILDS[way]
            if way == "int4" and architecture not in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
                options = MOE
            build(checkpoint, artifact, GenAIModelBuilderOptions.model_validate(options))
        return artifact, checkpoint

    return make


SLOW = pytest.mark.slow
SOUND = [
    *((name, way) for name in MAKERS for way in ("int4", "fp32")),
    *(
        (name, way)
        for name in ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
        for way in BUILDS
        if way not in ("int4", "fp32")
    ),
]


def marked(cases: list[tuple[str, str]]) -> list[Any]:
    """All but one are slow; fp32 of what int4 proves too comes before a release."""
    later = [(name, "fp32") for name in MAKERS if name not in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")]
    return [
        case
        if case == ("Qwen3ForCausalLM", "int4")
        else pytest.param(*case, marks=pytest.mark.release if case in later else SLOW)
        for case in cases
    ]


@pytest.mark.parametrize(("architecture", "way"), marked(SOUND))
def test_a_sound_graph_passes(built: Callable[[str, str], tuple[Path, Path]], architecture: str, way: str) -> None:
    found = judged(*built(architecture, way))
    assert found.verdict is Verdict.PASS, found
    assert found.measured["positions"] == 2 * 63
    if way in ("int4", "cuda", "webgpu", "dml"):
        assert found.measured["matrices"] >= 2 * 4
        assert 0.005 < found.measured["row_error"] < 0.5
    decoded = judged(*built(architecture, way), check="kv_decode")
    assert decoded.measured["fp32_kld"] <= 1e-6


NORMS, EXPERTS, Q_NORM = "layers.1.post_attention_layernorm.weight", "layers.0.moe.experts", "attn.q_norm"
FAULTS: dict[str, tuple[str, str, dict[str, Change]]] = {
    "RoPE base": ("Qwen3ForCausalLM", "int4", other_base(10000, 5000)),
    "lost q-norm": ("Qwen3ForCausalLM", "int4", missing_norm(Q_NORM)),
    "flipped weight of a norm": ("Qwen3ForCausalLM", "int4", flipped(NORMS)),
    "RoPE base, fp16": ("Qwen3ForCausalLM", "cuda", other_base(10000, 9000)),
    "lost q-norm, fp16": ("Qwen3ForCausalLM", "cuda", missing_norm(Q_NORM)),
    "flipped weight of a norm, fp16": ("Qwen3ForCausalLM", "cuda-fp16", flipped(NORMS)),
    "lost bias": ("Qwen2ForCausalLM", "int4", lost(r"layers.1.attn.*\.bias")),
    "lost bias, fp16": ("Qwen2ForCausalLM", "webgpu", lost(r"layers.1.attn.*\.bias")),
    "transposed expert": ("Qwen3MoeForCausalLM", "fp32", transposed(f"{EXPERTS}.down_proj.weight")),
    "swapped experts": ("Qwen3MoeForCausalLM", "int4", swapped(f"{EXPERTS}.down_proj.qweight")),
    "rows of experts not in turns": (
        "Qwen3MoeForCausalLM",
        "fp32",
        {f"{EXPERTS}.gate_up_proj.weight": lambda values: np.concatenate([values[:, 0::2], values[:, 1::2]], axis=1)},
    ),
}
QUICK = ("RoPE base", "lost q-norm", "flipped weight of a norm")


@pytest.mark.parametrize("fault", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in FAULTS])
def test_each_fault_of_an_exporter_fails(
    built: Callable[[str, str], tuple[Path, Path]], tmp_path: Path, fault: str
) -> None:
    architecture, way, changes = FAULTS[fault]
    artifact, checkpoint = built(architecture, way)
    found = judged(with_constants(artifact, tmp_path / "faulty", changes), checkpoint)
    assert found.verdict is Verdict.FAIL, found


def test_another_rows_codes_are_not_the_checkpoints(
    built: Callable[[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """PyTorch computes the same with them: what shows is that they are not the checkpoint's."""
    artifact, checkpoint = built("Qwen3ForCausalLM", "int4")
    nodes = [node for node in Graph(artifact / "model.onnx").nodes if node.op_type == "MatMulNBits"]
    codes = next(node.input[1] for node in nodes if "layers.1/mlp/down_proj" in node.name)
    found = judged(with_constants(artifact, tmp_path / "faulty", swapped(codes.replace(".", r"\."))), checkpoint)
    assert found.verdict is Verdict.FAIL
    assert found.measured["max_diff"] <= LIMITS.fp32_max_diff
    assert found.measured["row_error"] > 1
    assert found.measured["worst_matrix"] == "model.layers.1.mlp.down_proj.weight"


def test_the_graph_of_another_architecture_is_named(
    built: Callable[[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    artifact, _ = built("Qwen3ForCausalLM", "int4")
    other = make_checkpoint("Qwen2ForCausalLM", tmp_path / "other")
    found = judged(artifact, other)
    assert found.verdict is Verdict.FAIL
    assert "the graph is not that of its architecture" in found.detail


def test_weights_that_are_not_there_are_told(built: Callable[[str, str], tuple[Path, Path]], tmp_path: Path) -> None:
    artifact, checkpoint = built("Qwen3ForCausalLM", "int4")
    copy = with_constants(artifact, tmp_path / "short", {})
    data = (artifact / "model.onnx.data").read_bytes()
    (copy / "model.onnx.data").unlink()
    (copy / "model.onnx.data").write_bytes(data[: len(data) // 4])
    found = judged(copy, checkpoint)
    assert found.verdict is Verdict.FAIL
    assert "is not in model.onnx.data" in found.detail


def test_data_outside_of_the_folder_are_not_read(
    built: Callable[[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    artifact, checkpoint = built("Qwen3ForCausalLM", "int4")
    copy = with_constants(artifact, tmp_path / "copy", {})
    model = onnx.load(str(copy / "model.onnx"), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"../copy/{entry.value}"
    onnx.save(model, str(copy / "model.onnx"))
    found = judged(copy, checkpoint)
    assert found.verdict is Verdict.FAIL
    assert "is not in ../copy/model.onnx.data" in found.detail


@pytest.mark.slow
def test_weights_in_qdq_form_are_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As TensorRT has them: quantised by our pass, which genai's builder then declares INT4."""
    grid = CalibratedGptqOptions(
        bits=4, head_bits=16, symmetric=True, group_size=32, int8_share=0.0, windows=4, window=64
    )
    quantize(tiny_checkpoint, tmp_path / "quantized", grid)
    build(tmp_path / "quantized", tmp_path / "qdq", GenAIModelBuilderOptions.model_validate(TENSORRT))
    found = judged(tmp_path / "qdq", tiny_checkpoint)
    assert found.verdict is Verdict.PASS, found
    assert found.measured["matrices"] == 2 * 7
    broken = judged(with_constants(tmp_path / "qdq", tmp_path / "faulty", flipped(NORMS)), tiny_checkpoint)
    assert broken.verdict is Verdict.FAIL


def test_the_graph_in_float32_has_no_other_type_but_in_its_weights(
    built: Callable[[str, str], tuple[Path, Path]],
) -> None:
    artifact, _ = built("Qwen3ForCausalLM", "cuda")
    graph = Graph(artifact / "model.onnx")
    assert graph.half
    graph.in_float32()
    assert not graph.half
    levels = {item.i for node in graph.nodes for item in node.attribute if item.name == "accuracy_level"}
    assert levels == {1}
    assert OnnxScorer(artifact, 1, in_float32=True).logits([2, 3]).dtype == np.float32
    # the file is as it was
    assert Graph(artifact / "model.onnx").half
    assert json.loads((artifact / "genai_config.json").read_text())["model"]["type"]


@pytest.mark.parametrize("whole", [False, True])
def test_tables_of_positions_have_the_type_that_the_graph_gives_them(
    whole: bool, built: Callable[[str, str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """genai's builder leaves those of a Qwen2.5-VL in float32 where activations are float16."""
    artifact, checkpoint = built("Qwen3ForCausalLM", "cuda")
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    (cosines,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith("cos_cache")]
    if whole:
        cosines.data_type = onnx.TensorProto.FLOAT
    onnx.save(model, tmp_path / "model.onnx")
    shutil.copy(artifact / "model.onnx.data", tmp_path)
    graph = Graph(tmp_path / "model.onnx")
    assert graph.half
    student = student_of(checkpoint, graph, 1)
    hidden = torch.zeros(1, 9, student.config.hidden_size)
    (table, *_) = student.arguments(hidden)[0]["position_embeddings"]
    assert torch.equal(table, table.half().float()) is not whole
