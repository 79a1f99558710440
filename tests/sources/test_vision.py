"""Checkpoints that see as a text model with a tower: what their configs may say, and weights under other names."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_onnx.errors import SourceError, UnsupportedModelError
from qwen_onnx.sources.checkpoint import INDEX_FILE, SINGLE_FILE
from qwen_onnx.sources.text_form import write_text_form
from qwen_onnx.sources.vision_config import PREPROCESSOR, QWEN3_VL, QWEN3_VL_MOE, VISION_CONFIG, tower_of

# Qwen3-VL-2B's, as it is published
CONFIG: dict[str, Any] = {
    "architectures": [QWEN3_VL],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": True,
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "intermediate_size": 4096,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2048,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}
PLAIN = {
    "model.language_model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.language_model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
    "model.visual.patch_embed.proj.weight": "visual.patch_embed.proj.weight",
    "model.visual.blocks.0.attn.qkv.weight": "visual.blocks.0.attn.qkv.weight",
    "model.visual.merger.linear_fc1.weight": "visual.merger.linear_fc1.weight",
    "model.visual.merger.linear_fc2.weight": "visual.merger.linear_fc2.weight",
    "lm_head.weight": "lm_head.weight",
}


def changed(**changes: Any) -> dict[str, Any]:
    """``CONFIG`` with other values; a name with two underscores leads into a part of it."""
    config = copy.deepcopy(CONFIG)
    for name, value in changes.items():
        *parts, last = name.split("__")
        place = config
        for part in parts:
            place = place[part]
        place[last] = value
    return config


def make_published(folder: Path, *, shards: int, names: tuple[str, ...] = tuple(PLAIN)) -> Path:
    """The files of a checkpoint with two rows in each weight, whose numbers are all different."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / PREPROCESSOR).write_text("{}")
    where = {}
    for shard in range(shards):
        file = SINGLE_FILE if shards == 1 else f"model-0000{shard + 1}-of-0000{shards}.safetensors"
        own = {name: np.full((2, 3), index, np.float32) for index, name in enumerate(names) if index % shards == shard}
        save_file(own, folder / file)
        where |= dict.fromkeys(own, file)
    if shards > 1:
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def test_the_published_tower_is_read() -> None:
    tower = tower_of(CONFIG, "here")
    assert (tower.depth, tower.width, tower.heads, tower.inner) == (24, 1024, 16, 4096)
    assert (tower.patch, tower.merge, tower.positions, tower.window) == (16, 2, 48, 0)
    assert tower.deepstack == (5, 11, 17)
    assert tower.sections == (24, 20, 20)
    assert (tower.output, tower.features) == (2048, 4 * 2048)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config__deepstack_visual_indexes": [5, 24]}, "deepstack_visual_indexes is not a list of layers"),
        ({"vision_config__deepstack_visual_indexes": "all"}, "deepstack_visual_indexes is not a list of layers"),
        ({"vision_config__deepstack_visual_indexes": [11, 5]}, "deepstack_visual_indexes is empty or does not rise"),
        ({"vision_config__deepstack_visual_indexes": [5, 5]}, "deepstack_visual_indexes is empty or does not rise"),
        ({"vision_config__deepstack_visual_indexes": []}, "deepstack_visual_indexes is empty"),
        ({"text_config__num_hidden_layers": 2}, "names more layers than the text model has"),
        ({"vision_config__num_position_embeddings": 2300}, "not the number of places of a square"),
        ({"vision_config__num_position_embeddings": 10**9}, "num_position_embeddings is 1000000000"),
        ({"vision_config__hidden_act": "quick_gelu"}, "hidden_act is quick_gelu"),
        ({"vision_config__out_hidden_size": 2560}, "gives 2560 dimensions, the text model has 2048"),
        ({"text_config__rope_scaling": {"rope_type": "default"}}, "no mrope_section"),
        (
            {"text_config__rope_scaling": {"mrope_section": [24, 20, 20], "mrope_interleaved": False}},
            "mrope_interleaved is not that of the published",
        ),
        (
            {"text_config__rope_scaling": {"mrope_section": [24, 20, 20], "rope_type": "yarn", "factor": 3.0}},
            r"RoPE is scaled \(yarn\)",
        ),
    ],
)
def test_a_tower_that_cannot_be_right_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        tower_of(changed(**change), "here")


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_get_the_names_of_a_text_model_and_stay_the_same(tmp_path: Path, shards: int) -> None:
    published = make_published(tmp_path / "published", shards=shards)
    before = {path.name: path.read_bytes() for path in published.iterdir()}
    (folder := tmp_path / "text").mkdir()
    write_text_form(published, folder)
    found = {name: array for path in folder.glob("*.safetensors") for name, array in load_file(path).items()}
    assert sorted(found) == sorted(PLAIN.values())
    for index, name in enumerate(PLAIN.values()):
        assert np.array_equal(found[name], np.full((2, 3), index, np.float32))
    if shards > 1:
        told = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
        assert {name: name in load_file(folder / file) for name, file in told.items()} == dict.fromkeys(found, True)
    assert {path.name: path.read_bytes() for path in published.iterdir()} == before
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Qwen3ForCausalLM"], "qwen3")
    assert (config["head_dim"], config["deepstack_layers"], config["torch_dtype"]) == (128, 3, "bfloat16")
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000000, "mrope_section": [24, 20, 20]}
    assert json.loads((folder / VISION_CONFIG).read_text()) == CONFIG


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (tuple(PLAIN)[1:], "lacks model.embed_tokens.weight"),
        ((*PLAIN, "visual.merger.linear_fc1.weight"), "two weights of the checkpoint have one name"),
    ],
)
def test_other_weights_than_the_architecture_has_are_refused(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    published = make_published(tmp_path / "published", shards=1, names=names)
    (folder := tmp_path / "text").mkdir()
    with pytest.raises(UnsupportedModelError, match=message):
        write_text_form(published, folder)


@pytest.mark.parametrize(
    "head", [b"\xff" * 8, (9).to_bytes(8, "little") + b"not JSON!", (2).to_bytes(8, "little") + b"[]"]
)
def test_a_shard_with_a_damaged_header_is_refused(tmp_path: Path, head: bytes) -> None:
    published = make_published(tmp_path / "published", shards=3)
    next(published.glob("*-00002-*")).write_bytes(head)
    (folder := tmp_path / "text").mkdir()
    with pytest.raises(SourceError, match="header"):
        write_text_form(published, folder)


MOE: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 5, "hidden_size": 8}
EXPERTS = "model.language_model.layers.0.mlp.experts"
STACKS = {
    f"{EXPERTS}.gate_up_proj": np.arange(3 * 10 * 8).reshape(3, 10, 8).astype(np.float16),
    f"{EXPERTS}.down_proj": np.arange(3 * 8 * 5).reshape(3, 8, 5).astype(np.float16),
}


def make_mixture(folder: Path, stacks: dict[str, Any] = STACKS, **text: Any) -> Path:
    """As ``make_published``, with three experts of one layer."""
    make_published(folder, shards=1)
    config = changed(vision_config__out_hidden_size=8, architectures=[QWEN3_VL_MOE], model_type="qwen3_vl_moe")
    config["text_config"] |= MOE | text
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(folder / SINGLE_FILE) | stacks, folder / SINGLE_FILE)
    return folder


@pytest.mark.parametrize("published", [True, False])
def test_stacked_experts_get_the_layout_of_a_qwen3_moe(tmp_path: Path, published: bool) -> None:
    """From Qwen's own, with inputs before outputs, and from that of transformers."""
    turned = {name: np.ascontiguousarray(array.transpose(0, 2, 1)) for name, array in STACKS.items()}
    folder = make_mixture(tmp_path / "published", turned if published else STACKS)
    (text := tmp_path / "text").mkdir()
    write_text_form(folder, text)
    found = load_file(text / SINGLE_FILE)
    for name, array in STACKS.items():
        assert np.array_equal(found[name.replace("model.language_model.", "model.")], array)
    assert np.array_equal(found["lm_head.weight"], np.full((2, 3), 6, np.float32))
    config = json.loads((text / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Qwen3MoeForCausalLM"], "qwen3_moe")
    assert (config["num_experts"], config["moe_intermediate_size"], config["norm_topk_prob"]) == (3, 5, True)


@pytest.mark.parametrize(
    ("text", "stack", "message"),
    [
        ({"num_experts": None}, {}, "a mixture needs experts: there are None"),
        ({"num_experts_per_tok": 4}, {}, "there are 3, 4 of them for a token"),
        ({"moe_intermediate_size": 4}, {}, r"down_proj is \[3, 8, 5\], its config says \[3, 8, 4\]"),
        ({"num_experts": 4}, {}, r"is \[3, 8, 5\], its config says \[4, 8, 5\] or \[4, 5, 8\]"),
        (
            {"moe_intermediate_size": 8},
            {"gate_up_proj": (3, 16, 8), "down_proj": (3, 8, 8)},
            r"down_proj is \[3, 8, 8\], which does not tell inputs from outputs",
        ),
    ],
)
def test_experts_that_cannot_be_right_are_refused(
    tmp_path: Path, text: dict[str, Any], stack: dict[str, tuple[int, ...]], message: str
) -> None:
    stacks = STACKS | {f"{EXPERTS}.{kind}": np.zeros(shape, np.float16) for kind, shape in stack.items()}
    folder = make_mixture(tmp_path / "published", stacks, **text)
    (made := tmp_path / "text").mkdir()
    with pytest.raises(UnsupportedModelError, match=message):
        write_text_form(folder, made)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [([-2, 238], "damaged at"), ([0, 2], "damaged at"), ("all", "damaged at"), ([10**12, 10**12 + 480], "too early")],
)
def test_experts_that_are_not_where_their_header_says_are_refused(tmp_path: Path, offsets: Any, message: str) -> None:
    turned = {name: np.ascontiguousarray(array.transpose(0, 2, 1)) for name, array in STACKS.items()}
    folder = make_mixture(tmp_path / "published", turned)
    raw = (folder / SINGLE_FILE).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header[f"{EXPERTS}.gate_up_proj"]["data_offsets"] = offsets
    (made := tmp_path / "text").mkdir()
    names = dict.fromkeys(name for name in header if name != "__metadata__")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE_FILE)}))
    text = json.dumps(header).encode()
    (folder / SINGLE_FILE).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    with pytest.raises(SourceError, match=message):
        write_text_form(folder, made)
