"""Chat templates that are not Qwen3's: calls as XML, reasoning that the prompt opens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime import QwenService
from qwen_onnx.runtime.server.api.asked import Asked, Tool, understood
from tests.fixtures.servers import served
from tests.fixtures.templates import QWEN3, with_template
from tests.runtime.server.api.test_chat import CITY, HELLO, ask, schema_of


def test_a_template_with_another_tool_format_is_refused(tiny_artifact: Path, tmp_path: Path) -> None:
    """Qwen3-Coder writes calls as XML."""
    template = QWEN3.replace('{"name": "{{ call', "<function={{ call")
    with QwenService(with_template(tiny_artifact, tmp_path / "coder", template), threads=1) as service:
        tool = Tool("now", None, None)
        with pytest.raises(RequestError, match="Hermes' tool format"):
            understood(service, Asked(HELLO, [tool]))
        assert understood(service, Asked(HELLO, [tool], choice="none"))[0]


def test_a_template_that_opens_the_reasoning(tiny_artifact: Path, tmp_path: Path) -> None:
    """Qwen3-Thinking-2507 ends its prompt with the tag: the answer begins inside."""
    template = QWEN3.replace("assistant\n{{ '<think>", "assistant\n<think>\n{{ '<think>")
    assert template != QWEN3
    with served(with_template(tiny_artifact, tmp_path / "thinking", template), "tiny") as client:
        choice = ask(client, seed=1, temperature=1.5).choices[0]
        assert choice.message.content == ""
        assert choice.message.reasoning_content
        closed = ask(client, **schema_of(CITY), logit_bias={"261": 100}, max_tokens=400)
        assert json.loads(closed.choices[0].message.content)["city"]
        assert not getattr(closed.choices[0].message, "reasoning_content", None)
        assert closed.usage.completion_tokens_details.reasoning_tokens == 0
