"""Videos in the terminal's chat."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime import GenerationConfig, QwenService
from qwen_onnx.runtime.chat.conversation import IMAGE, VIDEO, Conversation
from tests.fixtures.chats import assert_goes_with_the_next_question
from tests.fixtures.clips import clip_file, frames
from tests.fixtures.pictures import as_file, chart


def test_a_video_goes_with_the_next_question_and_is_saved(seeing_artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "a video.gif"
    path.write_bytes(clip_file(frames(4, 84, 56)))
    with QwenService(seeing_artifact, threads=1, streams=1) as service:
        # two patches in time of 2 × 3 tokens, and the markers at both ends
        assert_goes_with_the_next_question(service, path, VIDEO, least=14, what="GIF, an APNG or a WebP")
        still = tmp_path / "a picture.png"
        still.write_bytes(as_file(chart(56, 56)))
        chat = Conversation(service, GenerationConfig(max_new_tokens=3), model="tiny")
        with pytest.raises(RequestError, match="no frames"):
            chat.attach(still, VIDEO)
        chat.attach(path, VIDEO)
        chat.attach(still, IMAGE)
        chat.ask("Which is it?")
        assert [len(part) for part in (chat.messages[0].videos, chat.messages[0].pictures)] == [1, 1]
        assert chat.answer(lambda kind, text: None, lambda: False).last.completion_tokens == 3


def test_a_model_of_text_says_so(service: QwenService, tmp_path: Path) -> None:
    path = tmp_path / "video.gif"
    path.write_bytes(clip_file(frames(2, 30, 30)))
    chat = Conversation(service, GenerationConfig(max_new_tokens=3), model="tiny")
    with pytest.raises(RequestError, match="the model tiny watches no videos"):
        chat.attach(path, VIDEO)
