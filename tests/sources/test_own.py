"""A row made of what a checkpoint says of itself, and checkpoints of which none can be made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.catalog.load import Catalog, load_catalog
from qwen_onnx.catalog.plan import UNCATALOGUED, Plan, make_plan
from qwen_onnx.catalog.sources import FolderSource
from qwen_onnx.errors import ConfigError, QwenOnnxError, SourceError, UnsupportedModelError
from qwen_onnx.sources.card import base_of, licence_of
from qwen_onnx.sources.facts import LARGEST_SMALL
from qwen_onnx.sources.fetch import fetch
from qwen_onnx.sources.own import choose

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
    "rope_scaling": None,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}


@pytest.fixture(scope="module")
def catalog(repository: Path) -> Catalog:
    return load_catalog(repository)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a plan needs of a checkpoint; its weights are a name."""
    made = tmp_path / "My-Finetune"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"")
    (made / "config.json").write_text(json.dumps(CONFIG))
    return made


def plan_of(catalog: Catalog, folder: Path, target: str = "cpu", precision: str | None = None, **changes: Any) -> Plan:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    found = choose(catalog, str(folder), folder.parent / "cache", lambda _: None)
    assert found.folder == folder
    return make_plan(found.catalog, found.model, target, precision)


def refused(catalog: Catalog, folder: Path, words: str, **changes: Any) -> QwenOnnxError:
    with pytest.raises(SourceError, match=words) as caught:
        plan_of(catalog, folder, **changes)
    return caught.value


def test_a_row_of_a_config(catalog: Catalog, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: Qwen/Qwen3-0.6B\n---\n# Mine\n")
    plan = plan_of(catalog, folder)
    assert (plan.model, plan.title, plan.architecture) == ("my-finetune", "My-Finetune", "Qwen3ForCausalLM")
    assert (plan.context, plan.license, plan.parameters) == (40960, "Apache-2.0", 470_202_368)
    assert plan.sources == (FolderSource(kind="folder", name="My-Finetune"),)
    assert plan.shape.layers == 20
    assert plan.catalogued is False
    assert plan.about
    assert plan.about.kind == "base"
    assert str(folder) not in plan.model_dump_json(), "a plan is of no machine"


def test_every_record_says_that_it_is_not_in_the_catalogue(catalog: Catalog, folder: Path) -> None:
    plan = plan_of(catalog, folder)
    assert json.loads(plan.model_dump_json())["catalogued"] is False
    assert Plan.model_validate_json(plan.model_dump_json()).digest == plan.digest
    assert UNCATALOGUED in plan.claim("PASS")
    ours = make_plan(catalog, "qwen3-0.6b", "cpu")
    assert "catalogued" not in ours.model_dump(), "the digests of the catalogue are what they were"
    assert UNCATALOGUED not in ours.claim("PASS")


def test_a_shape_of_the_catalogue_with_other_weights_is_named_by_its_folder(catalog: Catalog, folder: Path) -> None:
    plan = plan_of(catalog, folder, num_hidden_layers=28)
    ours = make_plan(catalog, "qwen3-0.6b", "cpu")
    assert plan.shape.layers == ours.shape.layers
    assert plan.parameters == ours.parameters
    assert (plan.model, plan.catalogued) == ("my-finetune", False)
    assert plan.olive == ours.olive
    assert plan.limits == ours.limits


@pytest.mark.parametrize(("layers", "like"), [(4, "qwen3-0.6b"), (60, "qwen3-1.7b"), (600, "qwen3-8b")])
def test_limits_follow_the_size(catalog: Catalog, folder: Path, layers: int, like: str) -> None:
    assert plan_of(catalog, folder, num_hidden_layers=layers).limits == make_plan(catalog, like, "cpu").limits


def test_transformers_5_writes_the_number_of_experts_under_another_name(catalog: Catalog, folder: Path) -> None:
    kind = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "moe_intermediate_size": 768}
    old, new = (plan_of(catalog, folder, **kind, **{name: 128}) for name in ("num_experts", "num_local_experts"))
    assert old.shape.experts == 128
    assert old == new


def test_a_mixture_is_built_as_the_catalogue_builds_mixtures(catalog: Catalog, folder: Path) -> None:
    kind = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    plan = plan_of(catalog, folder, **kind, **EXPERTS)
    wanted = dict(make_plan(catalog, "qwen3-30b-a3b", "cpu").olive["passes"])
    # fewer weights than the row's get more bits
    wanted["quantize"] = {**wanted["quantize"], "bits_per_weight": 5.2}
    assert plan.olive["passes"] == wanted
    with pytest.raises(ConfigError, match="was proven on the CPU only"):
        plan_of(catalog, folder, "cuda", **kind, **EXPERTS)


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        (None, "base"),
        ("{{ messages }}", "chat"),
        ("{% if enable_thinking %}<think>{% endif %}", "hybrid"),
        ("assistant <think>\n", "thinking"),
    ],
)
@pytest.mark.parametrize("own_file", [True, False])
def test_the_kind_is_that_of_the_chat_template(
    catalog: Catalog, folder: Path, template: str | None, kind: str, own_file: bool
) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1}))
    if template and own_file:
        (folder / "chat_template.jinja").write_text(template)
    elif template:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    plan = plan_of(catalog, folder)
    assert plan.about
    assert plan.about.kind == kind


def test_the_context_is_where_attention_goes_on_as_the_export_does(catalog: Catalog, folder: Path) -> None:
    chunks = {"original_max_position_embeddings": 262144, "chunk_size": 262144}
    assert (
        plan_of(catalog, folder, max_position_embeddings=1010000, dual_chunk_attention_config=chunks).context == 262144
    )
    assert plan_of(catalog, folder, "npu-qnn").context == 1024


def test_yarn_is_part_of_the_model(catalog: Catalog, folder: Path) -> None:
    plan = plan_of(catalog, folder, max_position_embeddings=131072, rope_scaling=YARN)
    assert (plan.context, plan.rope) == (131072, "yarn")
    assert "rope" not in plan_of(catalog, folder).model_dump()
    hybrid = {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "rope_scaling": YARN}
    refused(catalog, folder, r"scaled \(yarn\), which the export of a Qwen3NextForCausalLM does not", **hybrid)
    seeing = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "rope_scaling": YARN}
    refused(catalog, folder, r"scaled \(yarn\), which the export of a Qwen2_5_VLForConditionalGeneration", **seeing)


@pytest.mark.parametrize(
    ("changes", "words", "hint"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings is missing", ""),
        ({"rope_scaling": YARN | {"factor": "4"}}, "factor is 4, not a number from 1", ""),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings is 0", ""),
        ({"rope_scaling": YARN | {"beta_fast": -1}}, "beta_fast is -1", ""),
        ({"rope_parameters": {"rope_type": "dynamic"}}, r"its RoPE is scaled \(dynamic\)", "config.json"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN},
            "scales its RoPE in two ways: rope_parameters default, rope_scaling yarn",
            "remove the one",
        ),
        ({"use_sliding_window": True, "sliding_window": 4096}, "sliding window", "config.json"),
        ({"max_position_embeddings": None}, "max_position_embeddings is missing", "config.json"),
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            "a LlamaForCausalLM, which cannot be built; the nearest",
            "Qwen3For",
        ),
        ({"architectures": ["Qwen2ForRewardModel"]}, "cannot be built yet: it gives a score", "qwen-onnx list"),
        (
            {"architectures": ["Qwen3ASRForConditionalGeneration"]},
            "model_type is 'qwen3', not 'qwen3_asr'",
            "the model's own config.json",
        ),
        ({"architectures": None}, "names no architecture", '"Qwen3ForCausalLM"'),
        ({"architectures": [], "model_type": "gpt2"}, "names no architecture", "own config.json"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2', not 'qwen3'", ""),
        ({"hidden_size": 0}, "hidden_size is 0", ""),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing", ""),
        ({"decoder_sparse_step": "x"}, "decoder_sparse_step is x", ""),
        ({"layer_types": "full"}, "layer_types is not a list of names", ""),
        ({"mlp_only_layers": [[]]}, "mlp_only_layers is not a list of numbers", ""),
        ({"num_attention_heads": 16, "num_key_value_heads": 3}, "not a multiple", ""),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"already quantised \(AWQ\)", "unquantised"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"\(GPTQ\)", "unquantised"),
        ({"quantization_config": {"load_in_4bit": True}}, r"\(bitsandbytes\)", "unquantised"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, r"\(compressed-tensors\)", "unquantised"),
        ({"quantization_config": {"quant_method": "new"}}, r"\(new\)", "unquantised"),
        ({"quantization_config": [1]}, r"\(an unnamed method\)", "unquantised"),
        ({"quantization_config": {"quant_method": "fp8"}}, "FP8 without the block size", "unquantised"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}}, "FP8 without", ""),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"\(MLX\)", "unquantised"),
    ],
)
def test_a_config_that_cannot_be_built(
    catalog: Catalog, folder: Path, changes: dict[str, Any], words: str, hint: str
) -> None:
    error = refused(catalog, folder, words, **changes)
    assert hint in (error.hint or "")
    assert error.where == str(folder)


def test_what_a_quantised_model_was_made_of_is_in_the_hint(catalog: Catalog, folder: Path) -> None:
    (folder / "README.md").write_text("---\nbase_model:\n- Qwen/Qwen3-4B\n---\n")
    error = refused(catalog, folder, "AWQ", quantization_config={"quant_method": "awq"})
    assert "qwen-onnx optimize Qwen/Qwen3-4B" in (error.hint or "")


@pytest.mark.parametrize(
    ("names", "words", "hint"),
    [
        (["model.Q4_K_M.gguf"], "only GGUF files", "*.safetensors"),
        (["pytorch_model.bin"], "only pickled weights, which run code", "save_pretrained"),
        (["pytorch_model-00001-of-00002.bin", "training_args.bin"], "only pickled weights", "save_pretrained"),
        ([], "it holds no weights", "*.safetensors"),
        (["model.safetensors", "modules.json"], "an embedding model", "qwen-onnx list"),
        (["model.safetensors", "genai_config.json"], "an ONNX artifact", "qwen-onnx chat"),
    ],
)
def test_a_folder_that_is_no_checkpoint(
    catalog: Catalog, folder: Path, names: list[str], words: str, hint: str
) -> None:
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(b"")
    assert hint in (refused(catalog, folder, words).hint or "")


def test_an_adapter_is_to_be_merged(catalog: Catalog, folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-0.6B", "peft_type": "LORA"}')
    (folder / "config.json").unlink()
    with pytest.raises(UnsupportedModelError, match="it belongs to Qwen/Qwen3") as caught:
        choose(catalog, str(folder), folder, lambda _: None)
    assert f"qwen-onnx optimize Qwen/Qwen3-0.6B --adapter {folder}" in (caught.value.hint or "")


@pytest.mark.parametrize("base", ["x'); import os #/y", "../../x", "a/b/c", 3, None])
def test_an_adapter_puts_nothing_of_its_own_into_a_command(catalog: Catalog, folder: Path, base: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    assert "optimize BASE --adapter" in (refused(catalog, folder, "an adapter").hint or "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "is not an object"),
        ("[" * 100_000, "nested deeper"),
        ('{"a": 1, "a": 2}', "same key twice"),
        ('{"x": "' + "y" * LARGEST_SMALL + '"}', "bytes"),
        ("\udcff", "is not UTF-8"),
    ],
    ids=["half", "list", "deep", "twice", "large", "bytes"],
)
def test_a_config_of_a_stranger_is_bounded(catalog: Catalog, folder: Path, text: str, words: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SourceError, match=words):
        choose(catalog, str(folder), folder, lambda _: None)


def test_what_is_no_folder(catalog: Catalog, folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    for path, words in (
        (tmp_path / "nowhere", "there is no such folder"),
        (folder / "model.safetensors", "a file, not a checkpoint folder"),
        (folder, "config.json is missing"),
    ):
        with pytest.raises(SourceError, match=words):
            choose(catalog, str(path), tmp_path, lambda _: None)
    (folder / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(SourceError, match="leads out of the checkpoint"):
        choose(catalog, str(folder), tmp_path, lambda _: None)


def test_its_weights_are_fetched_from_the_folder_alone(catalog: Catalog, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))
    found = choose(catalog, str(folder), tmp_path, lambda _: None)
    plan = make_plan(found.catalog, found.model, "cpu")
    assert plan.about
    assert (plan.context, plan.about.kind) == (8192, "chat")
    checkpoint = fetch(plan, tmp_path / "cache", local=found.folder, progress=lambda _: None)
    assert checkpoint.path == folder
    with pytest.raises(SourceError, match="the weights of tiny are in a folder of that name") as caught:
        fetch(plan, tmp_path / "cache", progress=lambda _: None)
    assert "path/to/tiny" in (caught.value.hint or "")
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"vocab_size": 320})
    )
    with pytest.raises(UnsupportedModelError, match="contradicts its recipe"):
        fetch(plan, tmp_path / "cache", local=folder, progress=lambda _: None)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "Apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "MIT"),
        ('---\ntags:\n- x\nlicense: "apache-2.0"\n---\n', "Apache-2.0"),
        ("---\nlicense:\n- mit\n---\n", "MIT"),
        ("---\nlicense: [mit]\n---\n", "MIT"),
        ("---\nlicense: other\nlicense_name: qwen-research\nlicense_link: LICENSE\n---\n", "LicenseRef-Qwen-Research"),
        ("---\nlicense: other\nlicense_name: tongyi-qianwen\n---\n", "LicenseRef-Tongyi-Qianwen"),
        ("---\nlicense: llama3.1\n---\n", "LicenseRef-Llama3.1"),
        ("---\nlicense: other\n---\n", None),
        ("---\ntags: [license]\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("---\nlicense: mit", None),
        ("---\nlicense: m i t\n---\n", None),
        ("---\n  license: mit\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_as_far_as_it_is_stated(card: str, licence: str | None) -> None:
    assert licence_of(card) == licence


def test_what_a_model_was_made_of() -> None:
    assert base_of("---\nbase_model: Qwen/Qwen3-4B\n---\n") == "Qwen/Qwen3-4B"
    assert base_of("---\nbase_model: [Qwen/Qwen3-4B, x/y]\n---\n") is None
    assert base_of("---\nbase_model: $(rm -r .)/x\n---\n") is None
