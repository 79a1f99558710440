"""Sounds in the terminal's chat."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime import GenerationConfig, QwenService
from qwen_onnx.runtime.chat.conversation import AUDIO, Conversation
from tests.fixtures.pictures import as_file, chart
from tests.fixtures.sounds import as_sound, hiss


def test_a_sound_goes_with_the_next_question_and_is_saved(hearing_artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "a sound.wav"
    path.write_bytes(as_sound(hiss(1)))
    with QwenService(hearing_artifact, threads=1, streams=1) as service:
        chat = Conversation(service, GenerationConfig(max_new_tokens=3), model="tiny")
        chat.attach(path, AUDIO)
        chat.ask("What is it?")
        chat.fit()
        outcome = chat.answer(lambda kind, text: None, lambda: False)
        alone = Conversation(service, chat.config, model="tiny")
        alone.ask("What is it?")
        without = alone.answer(lambda kind, text: None, lambda: False)
        assert outcome.last.prompt_tokens >= without.last.prompt_tokens + 25
        assert not chat.attached
        chat.save(tmp_path / "chat.json")
        other = Conversation(service, chat.config, model="tiny")
        other.load(tmp_path / "chat.json")
        assert other.messages == chat.messages
        assert other.prompt() == chat.prompt()
        with pytest.raises(RequestError, match="missing"):
            chat.attach(tmp_path / "none.wav", AUDIO)
        (tmp_path / "page.wav").write_text("<html>")
        with pytest.raises(RequestError, match="not a sound"):
            chat.attach(tmp_path / "page.wav", AUDIO)
        (tmp_path / "chart.png").write_bytes(as_file(chart(30, 30)))
        with pytest.raises(RequestError, match="the model tiny reads no pictures"):
            chat.attach(tmp_path / "chart.png")


def test_a_model_of_text_says_so(service: QwenService, tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    path.write_bytes(as_sound(hiss(1)))
    chat = Conversation(service, GenerationConfig(max_new_tokens=3), model="tiny")
    with pytest.raises(RequestError, match="the model tiny hears no sounds"):
        chat.attach(path, AUDIO)
