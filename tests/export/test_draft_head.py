"""Heads for multi-token prediction: the graph that is exported is transformers' own head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_onnx.artifact.draft_head import DRAFT_HEAD, EMBEDDED, HIDDEN, NEXT
from qwen_onnx.errors import ExportError
from qwen_onnx.export.passes.draft_head.head import FLOAT, write_head
from tests.fixtures.architectures import make_checkpoint
from tests.fixtures.draft_heads import WEIGHTS, add_head, reference_head

TOKENS = 12


@pytest.mark.parametrize("architecture", ["Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"])
@pytest.mark.parametrize(("bits", "most", "least_cosine"), [(FLOAT, 1e-5, 0.999999), (8, 0.2, 0.999), (4, 2.0, 0.98)])
def test_the_head_is_that_of_transformers(
    architecture: str, bits: int, most: float, least_cosine: float, tmp_path: Path
) -> None:
    checkpoint = add_head(make_checkpoint(architecture, tmp_path / "checkpoint"))
    assert write_head(checkpoint, tmp_path, bits)
    model, head = reference_head(checkpoint)
    ids = torch.randint(5, 250, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[-1][:, :-1]
        embedded = model.get_input_embeddings()(ids[:, 1:])
        wanted = head.forward_layer(0, hidden, torch.arange(TOKENS - 1)[None], None, input_ids=ids[:, 1:]).numpy()
    session = ort.InferenceSession(str(tmp_path / DRAFT_HEAD), providers=["CPUExecutionProvider"])
    text = model.config.get_text_config()
    none = np.zeros((1, text.num_key_value_heads, 0, text.head_dim), np.float32)
    given = {
        EMBEDDED: embedded.numpy(),
        HIDDEN: hidden.numpy(),
        "attention_mask": np.ones((1, TOKENS - 1), np.int64),
        "position_ids": np.broadcast_to(np.arange(TOKENS - 1), (3, 1, TOKENS - 1)).copy(),
        "past_key_values.0.key": none,
        "past_key_values.0.value": none,
    }
    found = session.run([NEXT], given)[0]
    assert np.abs(found - wanted).max() < most
    assert (found * wanted).sum() / np.linalg.norm(found) / np.linalg.norm(wanted) > least_cosine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_head(make_checkpoint("Qwen3_5ForConditionalGeneration", tmp_path_factory.mktemp("head") / "checkpoint"))


def test_a_checkpoint_without_one_gets_none(tmp_path: Path) -> None:
    """Its configuration announces one all the same, as published ones do that were fine-tuned without."""
    plain = make_checkpoint("Qwen3_5ForConditionalGeneration", tmp_path / "checkpoint")
    assert not write_head(plain, tmp_path, 8)
    assert not (tmp_path / DRAFT_HEAD).exists()


def altered(checkpoint: Path, folder: Path, name: str, shape: tuple[int, ...] | None) -> Path:
    """A copy with one weight of another shape, or without it."""
    state = load_file(checkpoint / WEIGHTS)
    state.pop(name, None)
    if shape:
        state[name] = torch.zeros(shape)
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name != WEIGHTS:
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "shape"), [("mtp.fc.weight", (64, 64)), ("mtp.layers.0.self_attn.k_proj.weight", (32, 64))]
)
def test_weights_of_other_shapes_are_refused(
    name: str, shape: tuple[int, ...], checkpoint: Path, tmp_path: Path
) -> None:
    folder = altered(checkpoint, tmp_path / "checkpoint", name, shape)
    with pytest.raises(ExportError, match="is not that of its architecture"):
        write_head(folder, tmp_path, 8)
    assert not (tmp_path / DRAFT_HEAD).exists()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mtp.fc.weight", None),
        ("mtp.layers.0.self_attn.q_norm.weight", None),
        ("mtp.layers.0.self_attn.z_proj.weight", (2, 2)),
        ("mtp.layers.1.input_layernorm.weight", (64,)),
        ("mtp.embed_tokens.weight", (288, 64)),
    ],
)
def test_a_head_of_another_form_is_left_out_and_that_is_told(
    name: str, shape: tuple[int, ...] | None, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = altered(checkpoint, tmp_path / "checkpoint", name, shape)
    assert not write_head(folder, tmp_path, 8)
    assert "left out the head for multi-token prediction" in capsys.readouterr().out
    assert not (tmp_path / DRAFT_HEAD).exists()
