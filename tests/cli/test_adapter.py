"""``generate`` and ``chat`` with an adapter, and ``adapter convert``: as users run them."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen_onnx.runtime import GenerationConfig, QwenService
from qwen_onnx.sources.adapter import CONFIG
from tests.fixtures.adapters import described, make_adapter, own_plan, sign_adapter
from tests.fixtures.tools import rewrite_json, run_cli
from tests.runtime.server.api.test_swapping import changed


def test_generate_and_chat_answer_by_an_adapter(slotted_artifact: Path, adapters: dict[str, Path]) -> None:
    with QwenService(slotted_artifact, threads=1, streams=1, adapters=adapters) as service:
        told = {
            name: service.generate("hello", GenerationConfig(max_new_tokens=12, adapter=name)).text
            for name in (None, *adapters)
        }
    assert len(set(told.values())) == 3
    for name, file in ((None, None), *adapters.items()):
        options = ("--adapter", file) if file else ()
        done = run_cli("generate", slotted_artifact, "hello", "--max-tokens", 12, "--threads", 1, *options)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"hello{told[name]}\n"
    said = [
        run_cli("chat", slotted_artifact, "--max-tokens", 12, "--threads", 1, *options, input="hello\n").stdout
        for options in ((), ("--adapter", adapters["all"]))
    ]
    assert said[0] != said[1]


def test_files_that_are_no_adapter_of_the_artifact_are_refused(
    slotted_artifact: Path, adapters: dict[str, Path], exact_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pickled = tmp_path / "adapter.bin"
    pickled.write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
    for file, words in ((pickled, "is not an adapter in safetensors form"), (tmp_path / "none", "none is missing")):
        for command in (["generate", slotted_artifact, "hello"], ["chat", slotted_artifact]):
            done = run_cli(*command, "--adapter", file, input="hello\n")
            assert done.returncode == 6
            assert words in done.stderr
    without = Path(shutil.copytree(exact_artifact, tmp_path / "without"))
    described(without, tiny_checkpoint, own_plan(tiny_checkpoint, "fp32"))
    done = run_cli("generate", without, "hello", "--adapter", adapters["all"])
    assert done.returncode == 6
    assert "no slots for adapters" in done.stderr
    assert "--adapter-rank" in done.stderr


WRONG = {
    "pickle": "it holds pickled files, which run code when they are loaded: adapter_model.bin",
    "base": "trained on other weights",
    "rank": "its config says rank 5",
}


def wrong_adapter(kind: str, folder: Path) -> Path:
    """A folder of an adapter that nothing may take."""
    make_adapter(folder)
    if kind == "pickle":
        (folder / "adapter_model.bin").write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
    elif kind == "base":
        sign_adapter(folder, "0" * 64)
    else:
        rewrite_json(folder / CONFIG, r=5)
    return folder


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_adapter_is_neither_merged_nor_converted(
    kind: str, slotted_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    adapter = wrong_adapter(kind, tmp_path / "faq")
    source = ("--source", tiny_checkpoint, "--precision", "fp32")
    built = run_cli("optimize", "starter", *source, "--adapter", adapter, "--output", tmp_path / "artifact")
    file = tmp_path / "faq.safetensors"
    converted = run_cli("adapter", "convert", adapter, "--base", slotted_artifact, "--output", file)
    for done in (built, converted):
        assert done.returncode == 4, done.stderr
        assert WRONG[kind] in done.stderr
        assert "next:" in done.stderr
    assert not file.exists()
    assert not (tmp_path / "artifact").exists()


def test_the_merged_checkpoint_is_fetched(tiny_checkpoint: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "faq", modules=("self_attn.o_proj",))
    done = run_cli("fetch", "starter", "--source", tiny_checkpoint, "--adapter", adapter)
    assert done.returncode == 0, done.stderr
    plain, merged = (
        load_file(folder / "model.safetensors") for folder in (tiny_checkpoint, Path(done.stdout.splitlines()[-1]))
    )
    others = {name for name in plain if not np.array_equal(plain[name], merged[name])}
    assert others == {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1)}


def test_a_rank_beyond_the_slots_is_refused_with_what_to_build(slotted_artifact: Path, tmp_path: Path) -> None:
    adapter, file = make_adapter(tmp_path / "faq", rank=9), tmp_path / "faq.safetensors"
    done = run_cli("adapter", "convert", adapter, "--base", slotted_artifact, "--output", file)
    assert done.returncode == 4
    assert "the adapter's rank is 9, the artifact's slots take 8" in done.stderr
    assert "--adapter-rank 9" in done.stderr
    assert not file.exists()


def test_a_server_starts_with_no_wrong_adapter_and_no_two_of_one_name(
    slotted_artifact: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    other = changed(adapters["all"], tmp_path / "other.safetensors", base={"model": "other", "weights": "0" * 64})
    one, two = adapters.values()
    for given, code, words in (
        ((f"faq={other}",), 6, "it belongs to other weights, those of other"),
        ((f"faq={one}", f"faq={two}"), 2, "--adapter faq: given twice"),
        ((f"faq={one}", f"tone={tmp_path / 'none'}"), 6, "none is missing"),
    ):
        options = [part for text in given for part in ("--adapter", text)]
        done = run_cli("serve", slotted_artifact, "--port", 0, *options)
        assert done.returncode == code, done.stderr
        assert words in done.stderr
