"""Quantising layer by layer gives the bytes of quantising in memory, from any shards, after any kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qwen_onnx.errors import ExportError
from qwen_onnx.export import gradients, weights
from qwen_onnx.export.passes.gptq.options import CalibratedGptqOptions
from qwen_onnx.export.passes.gptq.quantize import quantize
from qwen_onnx.export.weights import CheckpointWeights, write_safetensors
from tests.fixtures.unstreamed import quantized_tensors

SMALL = CalibratedGptqOptions(group_size=32, int8_share=0.3, windows=9, window=64, sensitivity_windows=3)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def overrides_of(folder: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found["overrides"]  # type: ignore[return-value]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert sorted(one) == sorted(other)
    return all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


@pytest.fixture(
    scope="module", params=[pytest.param("Qwen2 tied", marks=pytest.mark.release), "Qwen3 untied bfloat16 sharded"]
)
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen2, and a Qwen3 with a head of its own in bfloat16 shards."""
    if request.param == "Qwen2 tied":
        return tiny_checkpoint
    return make_sharded(tiny_checkpoint, tmp_path_factory.mktemp("sharded") / "checkpoint")


def make_sharded(tiny: Path, folder: Path) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(5)
    shape = json.loads((tiny / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = Qwen3Config(
        **{name: shape[name] for name in names}, num_hidden_layers=3, head_dim=32, tie_word_embeddings=False
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.mark.slow
def test_streaming_gives_the_bytes_of_quantising_in_memory(checkpoint: Path, tmp_path: Path) -> None:
    expected, precise = quantized_tensors(checkpoint, SMALL)
    quantize(checkpoint, tmp_path / "out", SMALL)
    assert same(tensors_of(tmp_path / "out"), expected)
    assert precise
    assert {name for name, override in overrides_of(tmp_path / "out").items() if override["bits"] == 8} == {
        *precise,
        "lm_head",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint quantised without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    quantize(tiny_checkpoint, folder, SMALL)
    return folder


@pytest.mark.release
def test_logits_in_pieces_choose_the_same_matrices(
    tiny_checkpoint: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "LOGITS_PIECE", 288 * 7)
    quantize(tiny_checkpoint, tmp_path / "pieces", SMALL)
    assert overrides_of(whole) == overrides_of(tmp_path / "pieces")


@pytest.mark.slow
def test_converting_in_pieces_changes_no_byte(
    tiny_checkpoint: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "PIECE", 64 * 7)
    quantize(tiny_checkpoint, tmp_path / "pieces", SMALL)
    assert same(tensors_of(whole), tensors_of(tmp_path / "pieces"))
    assert overrides_of(whole) == overrides_of(tmp_path / "pieces")


@pytest.mark.slow
def test_the_index_names_every_tensor(whole: Path) -> None:
    assert CheckpointWeights(whole).names() == sorted(tensors_of(whole))


def start(checkpoint: Path, output: Path, kept: Path) -> subprocess.Popen[str]:
    """The quantisation in a process of its own, to be killed."""
    code = (
        "import sys; from pathlib import Path; from qwen_onnx.export.passes.gptq.quantize import quantize\n"
        "from qwen_onnx.export.passes.gptq.options import CalibratedGptqOptions as C\n"
        "quantize(*map(Path, sys.argv[1:3]), C.model_validate_json(sys.argv[3]), Path(sys.argv[4]))"
    )
    arguments = [str(checkpoint), str(output), SMALL.model_dump_json(), str(kept)]
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


def killed_after(line: str, checkpoint: Path, output: Path, kept: Path) -> list[str]:
    """Kill -9 right after the progress line that holds ``line``; returns the lines until then."""
    child = start(checkpoint, output, kept)
    said = []
    for text in child.stdout or ():
        said.append(text)
        if line in text:
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    assert child.returncode == -signal.SIGKILL, said
    return said


@pytest.mark.release
@pytest.mark.parametrize(
    ("line", "again"),
    [
        ("forward through layer 1 of", "forward through layer 1 of"),
        ("backward through layer 1 of", "forward through layer"),
        ("quantised layer 1 of", "quantised layer 1 of"),
    ],
)
def test_a_killed_quantisation_goes_on_behind_what_was_finished(
    line: str, again: str, tiny_checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    killed_after(line, tiny_checkpoint, tmp_path / "out", kept)
    finished = {path: path.stat().st_ino for path in kept.glob("layer-*.safetensors")}
    resumed = start(tiny_checkpoint, tmp_path / "out", kept)
    said = resumed.communicate()[0]
    assert resumed.returncode == 0
    assert again not in said
    assert all(path.stat().st_ino == inode for path, inode in finished.items())
    assert same(tensors_of(tmp_path / "out"), tensors_of(whole))
    assert overrides_of(tmp_path / "out") == overrides_of(whole)


@pytest.mark.slow
def test_a_build_killed_behind_its_last_step_finds_everything_finished(
    tiny_checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("first", "again"):
        quantize(tiny_checkpoint, tmp_path / name, SMALL, kept)
        assert same(tensors_of(tmp_path / name), tensors_of(whole))


@pytest.mark.slow
def test_other_weights_or_settings_never_use_finished_layers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    killed_after("quantised layer 1 of", tiny_checkpoint, tmp_path / "out", kept)
    other = SMALL.model_copy(update={"damp": 0.02})
    quantize(tiny_checkpoint, tmp_path / "out", other, kept)
    quantize(tiny_checkpoint, tmp_path / "whole", other)
    assert same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))


@pytest.mark.release
def test_an_altered_layer_is_made_again(tiny_checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    killed_after("quantised layer 1 of", tiny_checkpoint, tmp_path / "out", kept)
    layer = kept / "layer-0000.safetensors"
    content = bytearray(layer.read_bytes())
    content[-1] ^= 1
    layer.write_bytes(content)
    with pytest.raises(ExportError, match="gone or altered") as caught:
        quantize(tiny_checkpoint, tmp_path / "out", SMALL, kept)
    assert "run the command again" in (caught.value.hint or "")
    quantize(tiny_checkpoint, tmp_path / "out", SMALL, kept)
    assert same(tensors_of(tmp_path / "out"), tensors_of(whole))


@pytest.mark.slow
def test_a_missing_shard_or_weight_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = make_sharded(tiny_checkpoint, tmp_path / "checkpoint")
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.rename(tmp_path / "aside")
    with pytest.raises(ExportError, match=lost.name):
        quantize(folder, tmp_path / "out", SMALL)
    os.rename(tmp_path / "aside", lost)
    index = folder / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    del entries["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    index.write_text(json.dumps(entries))
    with pytest.raises(ExportError, match=r"lacks mlp\.up_proj\.weight"):
        quantize(folder, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_the_loss_is_cross_entropy_against_labels_drawn_from_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    normed, head = torch.randn(50, 64), torch.randn(300, 64)
    leaf = normed.clone().requires_grad_(True)
    logits = leaf @ head.T
    odds = logits.detach().double().softmax(-1).cumsum(-1)
    torch.manual_seed(4)
    labels = (odds > torch.rand(50, 1)).int().argmax(-1)
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), leaf)[0]
    # in pieces of seven positions as in one
    for most in (7 * 300, 50 * 300):
        monkeypatch.setattr(gradients, "LOGITS_PIECE", most)
        torch.manual_seed(4)
        torch.testing.assert_close(gradients._loss_gradient(normed, head), expected, rtol=1e-4, atol=1e-4)


def test_labels_come_as_often_as_the_model_says() -> None:
    # with the identity for a head, what is left of the odds tells the label
    logits = torch.tensor([3.0, -1e4, 0.0, 2.0, -1e4])
    torch.manual_seed(0)
    labels = gradients._loss_gradient(logits.repeat(20_000, 1), torch.eye(5)).argmin(-1)
    found = torch.bincount(labels, minlength=5) / 20_000
    assert found[1] == found[4] == 0
    torch.testing.assert_close(found, logits.softmax(-1), rtol=0, atol=0.015)


def test_safetensors_written_by_map_are_read_by_the_library(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(7, dtype=torch.uint8), "a": torch.randn(3, 5), "c": torch.randn(2)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    assert same(load_file(tmp_path / "x.safetensors"), tensors)


def test_embeddings_and_masks_are_those_of_the_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from qwen_onnx.export.skeleton import Skeleton, call
    from qwen_onnx.export.weights import Scratch

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    skeleton = Skeleton(tiny_checkpoint, Scratch(tmp_path / "scratch"))
    ids = torch.randint(2, 200, (2, 33))
    with torch.no_grad():
        states = skeleton.embed(ids)
        for index, arguments in enumerate(skeleton.arguments(states)):
            with skeleton.layer(index) as layer:
                states = call(layer, states, arguments)
        with skeleton.norm() as norm:
            assert torch.equal(norm(states), model.model(ids).last_hidden_state)
