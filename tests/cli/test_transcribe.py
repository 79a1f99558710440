"""``transcribe``: text on standard output, and what is no sound refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_onnx.artifact.manifest import MANIFEST, open_artifact
from qwen_onnx.files import file_checksums
from qwen_onnx.runtime import QwenService
from qwen_onnx.runtime.service.generation import Attached, GenerationConfig
from qwen_onnx.runtime.service.transcription import transcribing
from tests.conftest import run_cli
from tests.fixtures.sounds import as_sound, sweep
from tests.fixtures.speech import speech_artifact

__all__ = ["speech_artifact"]


@pytest.fixture
def built(speech_artifact: Path, tiny_build: Path) -> Path:
    """With the manifest of another build, and its own sums."""
    manifest = open_artifact(tiny_build).manifest
    told = manifest.model_copy(update={"files": file_checksums(speech_artifact, without=MANIFEST)})
    (speech_artifact / MANIFEST).write_text(told.model_dump_json())
    return speech_artifact


def test_the_text_is_printed_and_nothing_else(built: Path, tmp_path: Path) -> None:
    content = as_sound(sweep(1))
    (tmp_path / "it.wav").write_bytes(content)
    with QwenService(built, threads=1, streams=1) as service:
        work = transcribing(service, Attached(content, "it"), language="en", prompt="Ada")
        wanted = service.generate(work.prompt, GenerationConfig(temperature=0, **work.options)).text.strip()
    assert wanted
    options = ("--language", "English", "--prompt", "Ada", "--threads", 1)
    done = run_cli("transcribe", built, tmp_path / "it.wav", *options)
    assert (done.returncode, done.stdout) == (0, f"{wanted}\n"), done.stderr
    for broken, message in ((b"", "not a sound"), (b"Dear Sir", "not a sound"), (content[:-99], "damaged")):
        (tmp_path / "it.wav").write_bytes(broken)
        done = run_cli("transcribe", built, tmp_path / "it.wav")
        assert (done.returncode, done.stdout) == (8, "")
        assert message in done.stderr
        assert "it.wav" in done.stderr


def test_a_model_of_text_is_refused_by_its_name(tiny_build: Path, tmp_path: Path) -> None:
    (tmp_path / "it.wav").write_bytes(as_sound(sweep(1)))
    done = run_cli("transcribe", tiny_build, tmp_path / "it.wav")
    assert done.returncode == 8
    assert "the model 'checkpoint' makes no transcripts; it hears no sounds" in done.stderr
    done = run_cli("transcribe", tiny_build, tmp_path / "nothing.wav")
    assert (done.returncode, done.stdout) == (8, "")
