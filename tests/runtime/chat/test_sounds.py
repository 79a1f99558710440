"""Sounds in the terminal's chat."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime import GenerationConfig, QwenService
from qwen_onnx.runtime.chat.conversation import AUDIO, Conversation
from tests.fixtures.chats import assert_goes_with_the_next_question
from tests.fixtures.pictures import as_file, chart
from tests.fixtures.sounds import as_sound, hiss


def test_a_sound_goes_with_the_next_question_and_is_saved(hearing_artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "a sound.wav"
    path.write_bytes(as_sound(hiss(1)))
    with QwenService(hearing_artifact, threads=1, streams=1) as service:
        assert_goes_with_the_next_question(service, path, AUDIO, least=25, what="sound")
        (tmp_path / "chart.png").write_bytes(as_file(chart(30, 30)))
        chat = Conversation(service, GenerationConfig(max_new_tokens=3), model="tiny")
        with pytest.raises(RequestError, match="the model tiny reads no pictures"):
            chat.attach(tmp_path / "chart.png")


def test_a_model_of_text_says_so(service: QwenService, tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    path.write_bytes(as_sound(hiss(1)))
    chat = Conversation(service, GenerationConfig(max_new_tokens=3), model="tiny")
    with pytest.raises(RequestError, match="the model tiny hears no sounds"):
        chat.attach(path, AUDIO)
