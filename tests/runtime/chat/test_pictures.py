"""Pictures in the terminal's chat."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime import GenerationConfig, QwenService
from qwen_onnx.runtime.chat.conversation import IMAGE, Conversation
from tests.fixtures.chats import assert_goes_with_the_next_question
from tests.fixtures.pictures import as_file, chart


def test_a_picture_goes_with_the_next_question_and_is_saved(seeing_artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    path.write_bytes(as_file(chart(90, 60)))
    with QwenService(seeing_artifact, threads=1, streams=1) as service:
        assert_goes_with_the_next_question(service, path, IMAGE, least=3, what="picture")


def test_a_model_of_text_says_so(service: QwenService, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(as_file(chart(30, 30)))
    chat = Conversation(service, GenerationConfig(max_new_tokens=3), model="tiny")
    with pytest.raises(RequestError, match="the model tiny reads no pictures"):
        chat.attach(path)
