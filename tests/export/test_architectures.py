"""Every architecture through the exporter and the runtime, on tiny seeded models, against PyTorch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen_onnx.catalog.schema import Readback
from qwen_onnx.errors import ExportError, UnsupportedModelError
from qwen_onnx.export.architectures.stock import builder
from qwen_onnx.export.passes.genai_builder.build import build
from qwen_onnx.export.passes.genai_builder.mapped_model import UNUSED
from qwen_onnx.export.passes.genai_builder.repairs import ROUTER_WEIGHTS
from qwen_onnx.export.readback.onnx import compare, read_graph
from qwen_onnx.runtime.engines.genai import Engine
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.loading import EngineOptions, load_engine
from qwen_onnx.sources.qwen1 import ARCHITECTURE as QWEN1
from qwen_onnx.sources.qwen1 import write_qwen2_form
from qwen_onnx.verify.scoring import OnnxScorer
from tests.conftest import rewrite_json
from tests.fixtures.architectures import MAKERS, make_checkpoint
from tests.fixtures.dequantized import with_weights_of
from tests.fixtures.media import FP32, INT4
from tests.fixtures.qwen1 import PublishedQwen1, make_qwen1_checkpoint
from tests.runtime.engines.batch.test_engine import Heard

# longer than one piece of the runtime's prefill, so that all states go from one piece to the next
PROMPT = np.random.default_rng(0).integers(2, 256, 150).tolist()
CONTINUATION = np.random.default_rng(1).integers(2, 256, 8).tolist()


ASKED = {
    "body_bits": 4,
    "head_bits": 8,
    "block_size": 32,
    "symmetric": True,
    "accuracy_level": 1,
    "prune_lm_head": True,
}
EXPERTS = {"bits": 4, "block_size": 32, "symmetric": True}


class Case(NamedTuple):
    """A tiny checkpoint and its two exports; ``original`` is what was published, where that has another form."""

    architecture: str
    original: Path
    checkpoint: Path
    fp32: Path
    int4: Path

    def published(self) -> Any:
        """The original in PyTorch; for Qwen 1.0 by its equations, since its code is remote."""
        return PublishedQwen1(self.original) if self.architecture == QWEN1 else self.model()

    def model(self) -> Any:
        """The checkpoint in PyTorch."""
        return AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32).eval()


# dense and sparse; the others are built and compared by the slow tests
QUICK = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


# every operator of theirs is in another one
LATER = ("Qwen2ForCausalLM", "Qwen3_5ForConditionalGeneration")


def cases(*architectures: str) -> list[Any]:
    """Parameters of ``case``."""
    return [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.release if name in LATER else pytest.mark.slow)
        for name in architectures
    ]


@pytest.fixture(scope="module", params=cases(QWEN1, *MAKERS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("architecture")
    original = checkpoint = folder / "checkpoint"
    if request.param == QWEN1:
        original = make_qwen1_checkpoint(folder / "original")
        checkpoint.mkdir()
        write_qwen2_form(original, checkpoint)
    else:
        make_checkpoint(request.param, checkpoint)
    for name, config in (("fp32", FP32), ("int4", INT4)):
        build(checkpoint, folder / name, config)
    return Case(request.param, original, checkpoint, folder / "fp32", folder / "int4")


@torch.inference_mode()
def torch_logits(model: Any, ids: list[int]) -> np.ndarray:
    """[tokens, vocabulary]."""
    return np.asarray(model(torch.tensor([ids]), use_cache=False).logits[0])


def torch_greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """Greedy continuation, each token from one run over all before it."""
    found = list(ids)
    for _ in range(count):
        found.append(int(torch_logits(model, found)[-1].argmax()))
    return found[len(ids) :]


def assert_same(folder: Path, model: Any, limit: float) -> None:
    """Runtime, plain session and PyTorch agree: prefill, then token by token through the states, and greedily."""
    everything = [*PROMPT, *CONTINUATION]
    wanted = torch_logits(model, everything)
    assert 0.7 < wanted.std() < 1.4
    engine = Engine(folder, threads=1)
    forced = engine.forced_logits(PROMPT, CONTINUATION)
    assert np.abs(forced - wanted[len(PROMPT) - 1 :]).max() <= limit
    assert np.abs(OnnxScorer(folder, threads=1).logits(everything) - wanted).max() <= limit
    assert list(engine.generate(PROMPT, max_new_tokens=12, stop_on_eos=False)) == torch_greedy(model, PROMPT, 12)


def test_fp32_equals_pytorch(case: Case) -> None:
    assert_same(case.fp32, case.published(), 2e-4)


def test_int4_equals_pytorch_with_the_dequantized_weights(case: Case) -> None:
    model = case.model()
    unquantised = torch_logits(model, PROMPT)
    matrices = with_weights_of(model, case.int4 / "model.onnx")
    assert matrices >= 4 * model.config.get_text_config().num_hidden_layers + 1
    assert np.abs(torch_logits(model, PROMPT) - unquantised).max() > 0.05
    assert_same(case.int4, model, 1e-4)


def test_a_batch_answers_as_lone_runs_do(case: Case) -> None:
    """As it is served: by rows of one batch, whatever its layers remember."""
    reference = Engine(case.int4, threads=1)
    served = load_engine(case.int4, EngineOptions(streams=3, capacity=512, threads=1))
    assert served.stats().kind == "batch"
    requests = [TokenRequest(tuple(PROMPT[start:]), 12, stop_on_eos=False) for start in (0, 90, 140)]
    heard = [Heard(served, request) for request in requests]
    for request, one in zip(requests, heard, strict=True):
        assert one.tokens() == list(reference.generate(request.prompt_ids, max_new_tokens=12, stop_on_eos=False))
    served.close()


def test_every_graph_holds_what_was_asked_for(case: Case) -> None:
    facts = read_graph(case.int4 / "model.onnx")
    sparse = "moe" in case.architecture.lower() or "Next" in case.architecture
    found = compare(facts, Readback.model_validate(ASKED | ({"experts": EXPERTS} if sparse else {})))
    layers = case.model().config.get_text_config().num_hidden_layers
    assert found["experts"] == ([{"accuracy_level": 1, **EXPERTS, "count": layers}] if sparse else [])


@pytest.mark.slow
def test_weights_of_the_language_model_alone_are_enough(tmp_path: Path) -> None:
    """Qwen-AgentWorld is published so: its config.json announces a vision tower that its files do not hold."""
    checkpoint = make_checkpoint("Qwen3_5MoeForConditionalGeneration", tmp_path / "checkpoint")
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    weights = load_file(checkpoint / "model.safetensors")
    text = {name: tensor for name, tensor in weights.items() if not name.startswith(UNUSED)}
    assert len(text) < len(weights)
    save_file(text, checkpoint / "model.safetensors", metadata={"format": "pt"})
    build(checkpoint, tmp_path / "fp32", FP32)
    assert_same(tmp_path / "fp32", whole, 2e-4)
    again = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    assert np.abs(torch_logits(again, PROMPT) - torch_logits(whole, PROMPT)).max() <= 1e-5


def rewrite_graph(folder: Path, copy: Path, change: Callable[[Any], None]) -> Path:
    """A copy of an export whose graph ``change`` edited; the weights stay as they are."""
    shutil.copytree(folder, copy)
    loaded = onnx.load(str(copy / "model.onnx"), load_external_data=False)
    change(loaded.graph)
    onnx.save(loaded, str(copy / "model.onnx"))
    return copy


@pytest.mark.parametrize("case", cases("Qwen2MoeForCausalLM"), indirect=True)
def test_without_the_repair_qmoe_normalises_what_it_must_not(case: Case, tmp_path: Path) -> None:
    """What onnxruntime 1.32 does with normalize_routing_weights=0 alone. When this fails, the repair may go."""

    def unrepair(graph: Any) -> None:
        for node in graph.node:
            if node.op_type == "QMoE":
                del node.input[ROUTER_WEIGHTS:]

    unrepaired = rewrite_graph(case.int4, tmp_path / "unrepaired", unrepair)
    model = case.model()
    with_weights_of(model, case.int4 / "model.onnx")
    found = OnnxScorer(unrepaired, threads=1).logits(PROMPT)
    assert np.abs(found - torch_logits(model, PROMPT)).max() > 0.1
    for layer in model.model.layers:
        layer.mlp.gate.norm_topk_prob = True
    assert np.abs(found - torch_logits(model, PROMPT)).max() <= 1e-4


@pytest.mark.parametrize("case", cases("Qwen2MoeForCausalLM"), indirect=True)
def test_experts_are_read_back_and_compared_with_the_plan(case: Case) -> None:
    facts, asked, experts = read_graph(case.int4 / "model.onnx"), ASKED, EXPERTS
    wrong = [
        ({"experts": experts | {"block_size": 64}}, "QMoE: block_size is 32, asked 64"),
        ({"experts": experts | {"symmetric": False}}, "QMoE: symmetric is True, asked False"),
        ({"experts": experts | {"bits": 8}}, "QMoE: bits is 4, asked 8"),
        ({}, "is a mixture of experts, the plan says nothing of one"),
    ]
    for change, message in wrong:
        with pytest.raises(ExportError, match=message):
            compare(facts, Readback.model_validate(asked | change))
    with pytest.raises(ExportError, match="has float experts"):
        compare(read_graph(case.fp32 / "model.onnx"), Readback.model_validate(asked | {"experts": experts}))
    lower = {name: node | {"accuracy_level": 0} for name, node in facts["experts"].items()}
    with pytest.raises(ExportError, match="QMoE: accuracy_level is 0, asked 1"):
        compare(facts | {"experts": lower}, Readback.model_validate(asked | {"experts": experts}))
    with pytest.raises(ExportError, match="the graph holds no QMoE"):
        compare(facts | {"experts": {}}, Readback.model_validate(asked | {"experts": experts}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"architectures": ["Qwen9ForCausalLM"]}, UnsupportedModelError, "no exporter for Qwen9ForCausalLM"),
        ({"quantization_config": {"quant_method": "olive"}}, ExportError, "has no codes that this exporter reads"),
        ({"decoder_sparse_step": 2}, ExportError, "mixes dense and sparse layers"),
        ({"mlp_only_layers": [0]}, ExportError, "mixes dense and sparse layers"),
    ],
)
@pytest.mark.parametrize("case", cases("Qwen3MoeForCausalLM"), indirect=True)
def test_checkpoints_that_cannot_be_built_are_refused(
    case: Case, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    refused(case, tmp_path, change, error, message)


@pytest.mark.parametrize("case", cases("Qwen3NextForCausalLM"), indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [({"norm_topk_prob": False}, "normalised routing weights"), ({"mlp_only_layers": [0]}, "mixes dense and sparse")],
)
def test_a_qwen3_next_of_another_form_is_refused(
    case: Case, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    refused(case, tmp_path, change, ExportError, message)


def refused(case: Case, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str) -> None:
    """The case's checkpoint with other facts in its config is not built."""
    broken = Path(shutil.copytree(case.checkpoint, tmp_path / "broken"))
    rewrite_json(broken / "config.json", **change)
    with pytest.raises(error, match=message):
        build(broken, tmp_path / "out", FP32)


@pytest.mark.parametrize(
    "case", cases("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM"), indirect=True
)
def test_the_stock_builder_does_not_know_these(case: Case, tmp_path: Path) -> None:
    """When this fails, genai has learnt an architecture, and our class for it may go."""
    common = ("", str(case.checkpoint), str(tmp_path / "out"), "fp32", "cpu", str(tmp_path / "cache"))
    with pytest.raises(NotImplementedError, match="not currently supported"):
        builder.create_model(*common, **builder.parse_extra_options(*common, []))


@pytest.mark.slow
@pytest.mark.parametrize(
    "scaling",
    [
        pytest.param({"factor": 4.0}, marks=pytest.mark.release),
        {"factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.2},
        pytest.param({"factor": 2.0, "truncate": False}, marks=pytest.mark.release),
    ],
)
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3MoeForCausalLM"])
def test_yarn_is_that_of_pytorch(architecture: str, scaling: dict[str, Any], tmp_path: Path) -> None:
    """Of genai's own the first fails with an assertion, and the second differs in the first digit."""
    checkpoint = make_checkpoint(architecture, tmp_path / "checkpoint")
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, trust_remote_code=False).eval()
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 256, **scaling}
    rewrite_json(checkpoint / "config.json", rope_parameters=rope)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, trust_remote_code=False).eval()
    assert np.abs(torch_logits(model, PROMPT) - torch_logits(plain, PROMPT)).max() > 0.01, "it changes something"
    build(checkpoint, tmp_path / "fp32", FP32)
    assert_same(tmp_path / "fp32", model, 2e-4)
