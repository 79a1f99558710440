"""What a log line may hold."""

from __future__ import annotations

import io
import json
import logging

from qwen_onnx.runtime import ChatPrompt
from qwen_onnx.runtime.server.logs import Formatter
from qwen_onnx.runtime.service.told import PromptHash


def test_an_exception_is_told_without_its_message() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Formatter())
    logger = logging.Logger("test")
    logger.addHandler(handler)
    try:
        raise ValueError("zanzibar")
    except ValueError:
        logger.exception("it failed")
    told = json.loads(stream.getvalue())
    assert (told["level"], told["message"]) == ("ERROR", "it failed")
    assert "ValueError" in told["exc_info"]
    assert "test_logs.py" in told["exc_info"]
    assert "zanzibar" not in stream.getvalue()


def test_a_prompt_is_hashed_under_a_key() -> None:
    one, other = PromptHash("k" * 16), PromptHash("l" * 16)
    messages = [{"role": "user", "content": "hello"}]
    assert one.of(messages) == PromptHash("k" * 16).of(messages)
    assert one.of(messages) != other.of(messages)
    assert PromptHash().of("hello") != PromptHash().of("hello")
    prompts = ["hello", [1, 2], messages, ChatPrompt(messages), ChatPrompt(messages, thinking=True)]
    assert len({one.of(prompt) for prompt in prompts}) == len(prompts)
    # what cannot be encoded is refused later; hashing must not fail on it
    assert one.of("\ud800")
