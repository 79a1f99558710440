"""The HTP's graphs on tiny models: rotation, shapes, cache, grids, readback; what the simulator makes of them:
``tests/runtime/engines/test_qnn.py``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoModelForCausalLM

from qwen_onnx.artifact.htp.folder import QDQ, HtpFolder, graph_file
from qwen_onnx.artifact.htp.grid import Grid
from qwen_onnx.catalog.schema import Readback
from qwen_onnx.errors import ExportError
from qwen_onnx.export.passes.gptq.options import CalibratedGptqOptions
from qwen_onnx.export.passes.gptq.quantize import quantize
from qwen_onnx.export.passes.gptq.solver import gptq, round_to_nearest
from qwen_onnx.export.passes.htp_qdq.decoder import Sizes
from qwen_onnx.export.passes.htp_qdq.export import export
from qwen_onnx.export.passes.htp_qdq.linears import Linears
from qwen_onnx.export.passes.htp_qdq.options import HtpQdqExportOptions
from qwen_onnx.export.passes.rotate_residual.options import RotateResidualOptions
from qwen_onnx.export.passes.rotate_residual.rotate import rotate, rotation
from qwen_onnx.export.readback.common import read_back
from qwen_onnx.export.readback.htp import read_qdq
from qwen_onnx.runtime.engines.runners.qnn import Backend
from tests.fixtures.architectures import VOCABULARY, make_checkpoint

ARCHITECTURES = ("Qwen2ForCausalLM", pytest.param("Qwen3ForCausalLM", marks=pytest.mark.release))
PREFILL, CONTEXT = 16, 64
GPTQ = CalibratedGptqOptions(symmetric=True, group_size=-1, windows=4, window=64, sensitivity_windows=1)
EXPORT = HtpQdqExportOptions(prefill=PREFILL, context=CONTEXT, windows=4, window=64)
ASKED = Readback(
    form="HTP", io_bits=16, body_bits=8, head_bits=8, symmetric=True, soc_model="60", htp_arch="73", provider="qnn"
)
# two whole windows and one of eight tokens
IDS = np.random.default_rng(0).integers(0, VOCABULARY, 2 * PREFILL + 8).tolist()


def torch_logits(checkpoint: Path, weights: dict[str, torch.Tensor] | None = None) -> np.ndarray:
    """Logits [ids, vocabulary] of PyTorch, with some weights replaced."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, value in (weights or {}).items():
            model.get_parameter(f"{name}.weight").copy_(value)
        return model(torch.tensor([IDS])).logits[0].numpy()


def qdq_logits(folder: Path, tokens: int) -> np.ndarray:
    """Logits of the QDQ graphs on the CPU, read by windows of ``tokens``."""
    backend = Backend(folder, 1)
    if tokens == PREFILL:
        return backend.logits(IDS)
    return np.stack([backend.start(IDS[:1]), *(backend.step(token) for token in IDS[1:])])


def quantized(checkpoint: Path, folder: Path, bits: int) -> Path:
    """The checkpoint rotated and quantised."""
    rotate(checkpoint, folder / "rotated", RotateResidualOptions())
    quantize(folder / "rotated", folder / "quantized", GPTQ.model_copy(update={"bits": bits}))
    return folder / "quantized"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp("htp") / "checkpoint")


@pytest.fixture(scope="module")
def int8(checkpoint: Path) -> Path:
    """The exported folder with 8-bit weights; the quantised checkpoint is beside it."""
    folder = checkpoint.parent / "int8"
    export(quantized(checkpoint, folder, 8), folder / "out", EXPORT)
    return folder / "out"


def test_a_rotated_checkpoint_computes_the_same(checkpoint: Path, tmp_path: Path) -> None:
    rotate(checkpoint, tmp_path / "rotated", RotateResidualOptions(seed=3))
    assert np.abs(torch_logits(tmp_path / "rotated") - torch_logits(checkpoint)).max() < 1e-4
    weight = Linears(tmp_path / "rotated").array("model.layers.0.mlp.down_proj.weight")
    assert np.abs(weight - Linears(checkpoint).array("model.layers.0.mlp.down_proj.weight")).max() > 0.1


def test_a_rotation_is_orthogonal_and_follows_its_seed() -> None:
    turn = rotation(48, 1)
    assert torch.allclose(turn @ turn.T, torch.eye(48, dtype=torch.float64), atol=1e-12)
    assert torch.equal(turn, rotation(48, 1))
    assert not torch.allclose(turn, rotation(48, 2))


def test_rotation_spreads_an_outlier_that_one_scale_per_output_cannot_hold() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    weight[:, 5] *= 40
    turned = (weight.double() @ rotation(64, 0)).float()

    def error(matrix: torch.Tensor) -> float:
        return float((round_to_nearest(matrix, 4, -1, symmetric=True).dequantize() - matrix).norm())

    assert error(turned) < 0.7 * error(weight)


def test_a_group_of_minus_one_is_the_whole_row() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(24, 160), torch.randn(512, 160)
    per_row = gptq(weight, inputs.T @ inputs, 4, -1, 0.01, symmetric=True)
    assert per_row.scales.shape == (24, 1)
    same = gptq(weight, inputs.T @ inputs, 4, 160, 0.01, symmetric=True)
    assert torch.equal(per_row.codes, same.codes)
    assert torch.equal(round_to_nearest(weight, 8, -1).scales, round_to_nearest(weight, 8, 160).scales)


def test_the_float_graphs_compute_what_pytorch_does(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path, EXPORT.model_copy(update={"form": "float"}))
    exact, backend = torch_logits(checkpoint), Backend(tmp_path, 1)
    assert np.abs(backend.logits(IDS) - exact).max() < 2e-4
    assert np.abs(backend.start(IDS[:-1]) - exact[-2]).max() < 2e-4
    assert np.abs(backend.step(IDS[-1]) - exact[-1]).max() < 2e-4


@pytest.mark.slow
def test_the_qdq_graph_computes_what_pytorch_does_with_its_weights(int8: Path) -> None:
    """What is left is the rounding of activations to 16 bits."""
    stored = onnx.load(str(int8 / graph_file(PREFILL, QDQ)))
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in stored.graph.initializer}
    names = [name for name in arrays if name.endswith(("_proj", "lm_head"))]
    assert len(names) == 15
    weights = {name: arrays[name].astype(np.float32) * arrays[f"{name}.scale"] for name in names}
    qwen3 = any("q_norm" in name for name in arrays)
    for name in names:
        if name.endswith("q_proj") and not qwen3:
            # the attention's 1/√head_dim is in the scales
            weights[name] *= np.float32(16**0.5)
    dense = {name: torch.from_numpy(value.T.copy()) for name, value in weights.items()}
    difference = np.abs(qdq_logits(int8, PREFILL) - torch_logits(int8.parent / "rotated", dense)).max()
    assert difference < 0.02


@pytest.mark.slow
def test_decoding_through_the_cache_is_prefill(int8: Path) -> None:
    assert np.abs(qdq_logits(int8, 1) - qdq_logits(int8, PREFILL)).max() < 0.005


@pytest.mark.slow
def test_int8_drifts_little_and_an_altered_scale_is_seen(int8: Path, checkpoint: Path, tmp_path: Path) -> None:
    exact = torch_logits(checkpoint)
    assert np.abs(qdq_logits(int8, PREFILL) - exact).max() < 0.5
    described = HtpFolder.read(int8)
    cosines = np.load(int8 / "cosines.npy")
    for path in int8.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "cosines.npy").unlink()
    np.save(tmp_path / "cosines.npy", np.full_like(cosines, described.grids["cos"].zero))
    assert np.abs(qdq_logits(tmp_path, PREFILL) - exact).max() > 0.5


@pytest.mark.slow
def test_more_tokens_than_the_cache_holds_are_refused(int8: Path) -> None:
    backend = Backend(int8, 1)
    assert len(backend.logits([1] * CONTEXT)) == CONTEXT
    with pytest.raises(ValueError, match="65 tokens exceed the context of 64"):
        backend.step(1)


@pytest.mark.slow
def test_the_qdq_graph_is_read_back(int8: Path) -> None:
    facts = read_qdq(int8 / graph_file(1, QDQ))
    assert {weight["bits"] for weight in facts["weights"].values()} == {8}
    assert all(weight["symmetric"] and weight["per_output"] for weight in facts["weights"].values())
    assert facts["activation_bits"] == [16]
    # the residual stream, and the norms that read it
    assert set(facts["float_operators"]) == {"Add", "RMSNormalization"}
    assert facts["interface"]["past_k.0"][1:] == [1, 2, facts["interface"]["past_k.0"][3], CONTEXT]
    with pytest.raises(ExportError, match=rf"window-{PREFILL}\.onnx missing"):
        read_back(int8, ASKED)
    with pytest.raises(ExportError, match="provider is qnn, asked cpu"):
        read_back(int8, ASKED.model_copy(update={"provider": "cpu"}))


@pytest.mark.slow
def test_int4_is_packed_as_onnx_says(checkpoint: Path, tmp_path: Path) -> None:
    source = quantized(checkpoint, tmp_path, 4)
    export(source, tmp_path / "out", EXPORT)
    loaded = onnx.load(str(tmp_path / "out" / graph_file(1, QDQ)))
    tensors = {tensor.name: tensor for tensor in loaded.graph.initializer}
    name = "model.layers.1.mlp.up_proj"
    assert tensors[name].data_type == onnx.TensorProto.INT4
    codes, scales = Linears(source).linear(name).integers()
    assert np.array_equal(numpy_helper.to_array(tensors[name]).astype(np.int8), codes.T)
    assert np.array_equal(numpy_helper.to_array(tensors[f"{name}.scale"]), scales)
    assert read_qdq(tmp_path / "out" / graph_file(1, QDQ))["weights"]["lm_head"]["bits"] == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "expected"),
    [({"group_size": 32}, "scales in a row"), ({"symmetric": False}, "has zero points")],
)
def test_grids_that_the_htp_does_not_take_are_refused(
    checkpoint: Path, tmp_path: Path, changed: dict[str, object], expected: str
) -> None:
    quantize(checkpoint, tmp_path / "other", GPTQ.model_copy(update=changed))
    with pytest.raises(ExportError, match=expected):
        export(tmp_path / "other", tmp_path / "out", EXPORT)


def test_an_unquantised_checkpoint_and_another_attention_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not quantised"):
        Linears(checkpoint).linear("lm_head").integers()
    config = Linears(checkpoint).config
    with pytest.raises(ExportError, match="full attention only, the model has sliding_attention"):
        Sizes.read(config | {"layer_types": ["sliding_attention"] * 2}, PREFILL, CONTEXT)


def test_a_grid_holds_its_ends_and_zero() -> None:
    values = np.array([-1.0, 0.0, 3.0], np.float32)
    grid = Grid.spanning(-1, 3)
    assert np.abs(grid.dequantize(grid.quantize(values)) - values).max() <= grid.scale / 2
    assert grid.dequantize(grid.quantize(np.zeros(1, np.float32)))[0] == 0
    assert grid.quantize(np.array([9.0], np.float32))[0] == 65535
    middle = Grid.spanning(-1, 3, symmetric=True)
    assert middle.zero == 32768
    assert abs(middle.dequantize(middle.quantize(values))[2] - 3) < 1e-4
