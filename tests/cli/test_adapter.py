"""``generate`` and ``chat`` with an adapter, and ``adapter convert``: as users run them."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

from qwen_onnx.runtime import GenerationConfig, QwenService
from tests.fixtures.adapters import described, own_plan
from tests.fixtures.tools import run_cli


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
