"""The quantiser on a random model: its mathematics, its budget and what genai makes of its files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from qwen_onnx.errors import ExportError
from qwen_onnx.export import calibration
from qwen_onnx.export.passes.gptq.blocks import choose_blocks, rounding_damage
from qwen_onnx.export.passes.gptq.options import CalibratedGptqOptions
from qwen_onnx.export.passes.gptq.quantize import quantize
from qwen_onnx.export.passes.gptq.sensitivity import choose_int8
from qwen_onnx.export.passes.gptq.solver import gptq, round_to_nearest, search_grid
from qwen_onnx.export.skeleton import Skeleton
from qwen_onnx.export.weights import CheckpointWeights, Scratch
from qwen_onnx.export.workfolder import OWN_TEXT, WorkFolder
from qwen_onnx.files import sha256_of

SMALL = CalibratedGptqOptions(group_size=32, int8_share=0.3, windows=4, window=64, sensitivity_windows=1)

MIXED = CalibratedGptqOptions(bits=8, group_size=32, mixed_blocks=True, windows=4, window=64, sensitivity_windows=1)


@pytest.fixture
def correlated() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [48, 64] and inputs [2048, 64] whose columns depend on each other, as activations do."""
    torch.manual_seed(0)
    inputs = torch.randn(2048, 8) @ torch.randn(8, 64) + 0.1 * torch.randn(2048, 64)
    return torch.randn(48, 64), inputs


def test_gptq_changes_the_outputs_less_than_rounding(correlated: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, inputs = correlated
    rounded = round_to_nearest(weight, 4, 32).dequantize()
    solved = gptq(weight, inputs.T @ inputs, 4, 32, 0.01).dequantize()

    def error(candidate: torch.Tensor) -> float:
        return float(((candidate - weight) @ inputs.T).norm() / (weight @ inputs.T).norm())

    assert error(solved) < 0.5 * error(rounded)


def test_gptq_leaves_its_arguments_alone(correlated: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, inputs = correlated
    hessian = inputs.T @ inputs
    kept = weight.clone(), hessian.clone()
    gptq(weight, hessian, 4, 32, 0.01)
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])


def test_gptq_survives_an_input_that_is_always_zero(correlated: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, inputs = correlated
    inputs[:, 3] = 0
    assert torch.isfinite(gptq(weight, inputs.T @ inputs, 4, 32, 0.01).dequantize()).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_on_a_grid_come_back_exactly(bits: int) -> None:
    torch.manual_seed(1)
    codes = torch.randint(0, 2**bits, (8, 64)).float()
    codes[:, ::32], codes[:, 1::32] = 0, 2**bits - 1
    weight = (codes - 2 ** (bits - 1)) * 0.03125
    found = round_to_nearest(weight, bits, 32)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.dequantize(), weight)


def test_the_searched_grid_is_never_worse_than_min_max() -> None:
    torch.manual_seed(2)
    rows = torch.randn(64, 32) ** 3
    scales, zeros = search_grid(rows, 4)
    span = rows.amax(1, keepdim=True).clamp(min=0) - rows.amin(1, keepdim=True).clamp(max=0)
    # scales are numbers of float16
    plain = (span / 15).half().float()
    assert torch.equal(scales, scales.half().float())
    plain_zeros = torch.round(-rows.amin(1, keepdim=True).clamp(max=0) / plain)

    def error(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        grid = (torch.round(rows / scale) + zero).clamp(0, 15)
        return (((grid - zero) * scale - rows) ** 2).sum(1)

    assert (error(scales, zeros) <= error(plain, plain_zeros) + 1e-6).all()
    assert error(scales, zeros).sum() < error(plain, plain_zeros).sum()


def test_packing_puts_the_first_code_into_the_low_nibble() -> None:
    found = round_to_nearest(torch.linspace(-1, 1, 32)[None], 4, 32)
    packed = found.packed()
    assert packed["qweight"].shape == (1, 16)
    unpacked = torch.stack([packed["qweight"] & 15, packed["qweight"] >> 4], -1).reshape(1, 32)
    assert torch.equal(unpacked.float(), found.codes)
    # an odd number of zero points is padded to whole bytes
    assert packed["qzeros"].shape == (1, 1)


def test_int8_keeps_to_its_share_and_to_whole_attention_inputs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    skeleton = Skeleton(tiny_checkpoint, Scratch(tmp_path / "scratch"))
    ids = torch.randint(2, 200, (2, 64))
    sizes = {
        f"model.layers.{layer}.{name}": module.weight.numel()
        for layer in range(skeleton.count)
        for name, module in skeleton.linears(layer).items()
    }
    chosen = choose_int8(skeleton, ids, SMALL, WorkFolder(tmp_path / "work", "share"))
    assert 0 < sum(sizes[name] for name in chosen) <= SMALL.int8_share * sum(sizes.values())
    for layer in range(2):
        together = {f"model.layers.{layer}.self_attn.{p}_proj" for p in "qkv"}
        assert not chosen & together or together <= chosen
    none = SMALL.model_copy(update={"int8_share": 0.0})
    assert not choose_int8(skeleton, ids, none, WorkFolder(tmp_path / "work", "none"))


def test_the_damage_of_rounded_inputs_is_what_rounding_them_does() -> None:
    torch.manual_seed(3)
    inputs = torch.randn(4096, 64) * torch.linspace(0.1, 4, 64)
    weights = torch.rand(4096, 64)
    found = rounding_damage(inputs, weights, [16, 32, 64])
    for block, damage in found.items():
        parts = inputs.unflatten(1, (-1, block))
        steps = parts.abs().amax(-1, keepdim=True) / 127
        error = ((parts / steps).round() * steps - parts).flatten(1)
        # a little more: the largest of a block, which is rounded to itself, counts too
        assert 1 < damage / (float((error.square() * weights).sum()) / 2) < 1 + 1.5 / block
    assert found[16] < 0.9 * found[32] < 0.81 * found[64]


def test_finer_blocks_go_where_a_channel_stands_out(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """One input of a layer's MLP is forty times as large as before, and its matrices' column is as much smaller."""
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][5] *= 40
    outliers = {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up")}
    for name in outliers:
        tensors[f"{name}.weight"][:, 5] /= 40
    shutil.copytree(tiny_checkpoint, tmp_path / "outlier")
    save_file(tensors, tmp_path / "outlier/model.safetensors", {"format": "pt"})
    skeleton = Skeleton(tmp_path / "outlier", Scratch(tmp_path / "scratch"))
    blocks = choose_blocks(skeleton, torch.randint(2, 200, (2, 64)), MIXED, WorkFolder(tmp_path / "work", "blocks"))
    assert {blocks.get(name) for name in outliers} == {16}
    assert set(blocks.values()) == {16, 64}
    matrices = {
        f"model.layers.{layer}.{name}": module.weight.numel()
        for layer in range(skeleton.count)
        for name, module in skeleton.linears(layer).items()
    }
    matrices["lm_head"] = skeleton.weights.tensor(skeleton.head_name).numel()
    # not one scale more than without
    assert sum(size // blocks.get(name, 32) for name, size in matrices.items()) <= sum(matrices.values()) // 32
    for layer in range(2):
        assert len({blocks.get(f"model.layers.{layer}.self_attn.{part}_proj", 32) for part in "qkv"}) == 1


@pytest.mark.parametrize(("share", "blocks"), [(1.01, None), (0.95, None), (1e-6, 16)])
def test_a_bound_on_the_kld_of_rounding_makes_blocks_finer(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float, blocks: int | None
) -> None:
    """Above what is predicted nothing changes; what no block keeps to has the finest."""

    def chosen(name: str, **told: float) -> tuple[dict[str, int], float]:
        config = MIXED.model_copy(update=told)
        skeleton = Skeleton(tiny_checkpoint, Scratch(tmp_path / "scratch"))
        ids = torch.randint(2, 200, (2, 64), generator=torch.Generator().manual_seed(1))
        found = choose_blocks(skeleton, ids, config, WorkFolder(tmp_path / name, "blocks"))
        return found, float(capsys.readouterr().out.rsplit("activations ", 1)[1])

    usual, predicted = chosen("usual")
    found, kept = chosen("bounded", rounding_kld=share * predicted)
    if blocks:
        assert set(found.values()) == {blocks}
    elif share > 1:
        assert found == usual
    else:
        assert kept <= share * predicted
        assert sum(1 / block for block in found.values()) > sum(1 / block for block in usual.values())


def test_blocks_are_mixed_only_where_there_are_kernels_for_half_and_for_twice() -> None:
    for wrong in ({"group_size": 16}, {"group_size": 128}, {"int8_share": 0.1}):
        with pytest.raises(ValidationError, match="mixed_blocks"):
            CalibratedGptqOptions(mixed_blocks=True, **wrong)
    with pytest.raises(ValidationError, match="rounding_kld: only with mixed_blocks"):
        CalibratedGptqOptions(rounding_kld=0.004)


@pytest.mark.slow
def test_the_checkpoint_says_which_blocks_it_has(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize(tiny_checkpoint, tmp_path / "out", MIXED)
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    weights, found = CheckpointWeights(tmp_path / "out"), set()
    for name in (name.removesuffix(".scales") for name in weights.names() if name.endswith(".scales")):
        block = settings["overrides"].get(name, {}).get("group_size", settings["group_size"])
        found.add(block)
        codes, scales, zeros = (weights.tensor(f"{name}.{part}").shape[1] for part in ("qweight", "scales", "qzeros"))
        assert (codes, zeros) == (block * scales, scales)
    assert found > {32}


@pytest.mark.slow
def test_the_checkpoint_that_it_writes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize(tiny_checkpoint, tmp_path / "out", SMALL)
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    weights = CheckpointWeights(tmp_path / "out")
    eight = {name for name, override in settings["overrides"].items() if override["bits"] == 8}
    assert "lm_head" in eight
    shape = weights.tensor("model.layers.0.mlp.down_proj.qweight").shape
    assert shape == (64, 128 if "model.layers.0.mlp.down_proj" in eight else 64)
    assert "model.layers.0.mlp.down_proj.weight" not in weights
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tiny_checkpoint / "tokenizer.json").read_bytes()


def test_a_matrix_that_does_not_divide_into_blocks_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not a multiple of the block size 128"):
        quantize(tiny_checkpoint, tmp_path / "out", SMALL.model_copy(update={"group_size": 128}))
    assert not (tmp_path / "out").exists()


def test_texts_become_the_ids_that_the_tokenizer_gives(tiny_checkpoint: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    for text in (calibration.multilingual(), "<|im_start|>user\nA\u0301 b<|im_end|>\n"):
        assert calibration._ids(tokenizer, text) == tokenizer(text).input_ids
    # those of the tokenizer's own post-processor too
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A <|im_end|>", special_tokens=[("<|im_end|>", 1)])
    assert calibration._ids(tokenizer, "a") == tokenizer("a").input_ids == [*tokenizer.encode("a")[:-1], 1]


@pytest.mark.slow
def test_every_second_window_is_of_the_users_text(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    monkeypatch.setattr(calibration, "code", calibration.multilingual)
    own = "The invoice is due on Friday. " * 40
    windows = calibration.calibration_ids(tokenizer, 8, 32, seed=3, own=own)
    mine = tokenizer(own).input_ids
    assert all(window in [mine[begin : begin + 32] for begin in range(len(mine))] for window in windows[::2])
    assert [len(window) for window in windows] == [32] * 8
    assert windows[1::2] != windows[::2]
    with pytest.raises(ExportError, match="has 8 tokens and a window takes 32"):
        calibration.calibration_ids(tokenizer, 8, 32, own=tokenizer.decode(mine[:8]))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "own.txt is empty"),
        (b" \n\t\n", "own.txt is empty"),
        (b"abc\xff", "not UTF-8 at byte 3"),
        (b"a" * 4_000_001, "more than 4,000,000 bytes"),
        (None, "own.txt is missing"),
    ],
)
def test_a_text_that_cannot_be_calibrated_on_is_refused(tmp_path: Path, body: bytes | None, told: str) -> None:
    file = tmp_path / "own.txt"
    if body is not None:
        file.write_bytes(body)
    with pytest.raises(ExportError, match=told):
        calibration.read_own_text(file)


def test_a_pass_reads_the_text_that_its_options_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert calibration.own_text(None) is None
    with pytest.raises(ExportError, match="is not there"):
        calibration.own_text("0" * 64)
    (tmp_path / OWN_TEXT).write_text("some text", encoding="utf-8")
    assert calibration.own_text(sha256_of(tmp_path / OWN_TEXT)) == "some text"
    with pytest.raises(ExportError, match="is not there"):
        calibration.own_text("0" * 64)


@pytest.mark.slow
def test_calibration_is_the_same_for_the_same_seed(tiny_checkpoint: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    first = calibration.calibration_ids(tokenizer, 5, 64, seed=3)
    assert [len(window) for window in first] == [64] * 5
    assert first == calibration.calibration_ids(tokenizer, 5, 64, seed=3)
    assert first != calibration.calibration_ids(tokenizer, 5, 64, seed=4)


@pytest.mark.slow
def test_the_shared_head_of_the_artifact_has_two_dimensions(tiny_unpacked: Path) -> None:
    graph = onnx.load(str(tiny_unpacked / "model.onnx"), load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    gather = next(node for node in graph.node if node.op_type == "GatherBlockQuantized")
    assert [len(tensors[name].dims) for name in gather.input[2:]] == [2, 2]
