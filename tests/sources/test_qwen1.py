"""Qwen 1.0: weights, config and tokenizer in Qwen2's form, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import Plan, make_plan
from qwen_onnx.catalog.schema import Shape
from qwen_onnx.errors import QwenOnnxError, SourceError, UnsupportedModelError
from qwen_onnx.sources.fetch import fetch
from qwen_onnx.sources.qwen1 import write_qwen2_form
from qwen_onnx.sources.tiktoken import LARGEST, SPECIAL_TOKENS, write_tokenizer
from tests.conftest import rewrite_json
from tests.fixtures.qwen1 import (
    CONTEXT,
    TEXT,
    PublishedQwen1,
    learnt_ranks,
    make_qwen1_checkpoint,
    published_encode,
    write_ranks,
)


@pytest.fixture(scope="module")
def qwen1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen1_checkpoint(tmp_path_factory.mktemp("qwen1") / "checkpoint")


@pytest.fixture(scope="module")
def plan(repository: Path) -> Plan:
    known = make_plan(load_catalog(repository), "starter", "cpu")
    return known.model_copy(update={"architecture": "QWenLMHeadModel", "shape": Shape(hidden_size=64, tied=False)})


def test_the_logits_are_those_of_the_published_equations(qwen1: Path, plan: Plan, tmp_path: Path) -> None:
    found = fetch(plan, tmp_path, local=qwen1, progress=lambda _: None)
    model = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32).eval()
    ids = torch.arange(CONTEXT)[None] % 600
    with torch.inference_mode():
        wanted = PublishedQwen1(qwen1)(ids).logits
        assert 0.7 < float(wanted.std()) < 1.4
        assert float((model(ids).logits - wanted).abs().max()) < 2e-5
    assert model.config.max_position_embeddings == CONTEXT
    assert found.files == fetch(plan, tmp_path, local=qwen1, progress=pytest.fail).files
    assert "qwen.tiktoken" in found.files


@pytest.mark.parametrize("chat", [True, False])
def test_special_tokens_and_the_chat_template(tmp_path: Path, chat: bool) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    write_qwen2_form(make_qwen1_checkpoint(tmp_path / "in", chat=chat), folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ranks = len(learnt_ranks())
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(ranks, ranks + 208))
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["top_p"] == 0.8
    assert "max_window_size" not in generation
    if not chat:
        assert generation["eos_token_id"] == ranks
        assert not (folder / "chat_template.jinja").exists()
        return
    assert generation["eos_token_id"] == [ranks + 2, ranks]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert text == f"{system}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


NASTY = ["", TEXT, "it's  IT'S\r\n\r\n  \tx", "1234", "Zählung e\u0301", "数を\u0000🙏", " \n \n", "ααα…", "model" * 20]


@pytest.mark.parametrize("text", NASTY)
def test_the_tokenizer_does_what_tiktoken_does(qwen1: Path, tmp_path: Path, text: str) -> None:
    write_tokenizer(qwen1 / "qwen.tiktoken", tmp_path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode(text, add_special_tokens=False) == published_encode(text, learnt_ranks())


def unreachable() -> dict[bytes, int]:
    ranks = learnt_ranks()
    return ranks | {b"qqqq": len(ranks)}


RANKS: dict[str, tuple[Callable[[], dict[bytes, int]], str]] = {
    "a gap": (lambda: {t: r + (r > 9) for t, r in learnt_ranks().items()}, "not 0 to n-1"),
    "a byte is missing": (lambda: dict(list(learnt_ranks().items())[1:]) | {b"xy": 0}, "byte 3 has no rank"),
    "no merge reaches it": (unreachable, "not the union of two others"),
}


@pytest.mark.parametrize("name", RANKS)
def test_ranks_that_are_refused(tmp_path: Path, name: str) -> None:
    ranks, message = RANKS[name]
    write_ranks(tmp_path / "qwen.tiktoken", ranks())
    with pytest.raises(UnsupportedModelError, match=message):
        write_tokenizer(tmp_path / "qwen.tiktoken", tmp_path)


@pytest.mark.parametrize("line", ["YQ== x", "YQ==", "Y 1", "é 1"])
def test_a_damaged_tiktoken_file_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "qwen.tiktoken").write_text(f"AA== 0\n{line}\n")
    with pytest.raises(SourceError, match=r"qwen.tiktoken is damaged in line 2"):
        write_tokenizer(tmp_path / "qwen.tiktoken", tmp_path)


def test_a_tiktoken_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "qwen.tiktoken").open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(SourceError, match=r"has more than 33,554,432 bytes"):
        write_tokenizer(tmp_path / "qwen.tiktoken", tmp_path)


def add_tensor(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    save_file(load_file(shard) | {"transformer.h.0.mlp.w3.weight": torch.ones(2, 2)}, shard)


def drop_tensor(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    del tensors["transformer.h.1.attn.c_attn.bias"]
    save_file(tensors, shard)


BREAKS: dict[str, tuple[Callable[[Path], object], type[QwenOnnxError], str]] = {
    "no tiktoken": (lambda f: (f / "qwen.tiktoken").unlink(), UnsupportedModelError, "no qwen.tiktoken"),
    "partial rotary": (lambda f: rewrite_json(f / "config.json", rotary_pct=0.25), UnsupportedModelError, "rotary_pct"),
    "biases": (lambda f: rewrite_json(f / "config.json", no_bias=False), UnsupportedModelError, "no_bias"),
    "wide heads": (lambda f: rewrite_json(f / "config.json", kv_channels=32), UnsupportedModelError, "kv_channels"),
    "quantised": (
        lambda f: rewrite_json(f / "config.json", quantization_config={"bits": 4}),
        UnsupportedModelError,
        "already quantised",
    ),
    "other sizes": (lambda f: rewrite_json(f / "config.json", hidden_size=128), UnsupportedModelError, "hidden_size"),
    "unknown tensor": (add_tensor, UnsupportedModelError, "no Qwen 1.0 has a tensor transformer.h.0.mlp.w3.weight"),
    "missing tensor": (drop_tensor, UnsupportedModelError, "lacks 3 weights, in Qwen2's terms .*k_proj.bias"),
    "missing shard": (
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        SourceError,
        "model-00002-of-00002.safetensors is missing",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_checkpoints_that_are_refused(qwen1: Path, plan: Plan, tmp_path: Path, name: str) -> None:
    change, error, message = BREAKS[name]
    broken = Path(shutil.copytree(qwen1, tmp_path / "broken"))
    change(broken)
    with pytest.raises(error, match=message):
        fetch(plan, tmp_path / "cache", local=broken, progress=lambda _: None)
    assert not list((tmp_path / "cache").glob("checkpoints/*"))
