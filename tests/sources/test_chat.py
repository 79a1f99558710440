"""The chat template of a checkpoint, which a stranger wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.errors import SourceError, VerificationError
from qwen_onnx.export.calibration import calibration_ids
from qwen_onnx.processes.limited import Limits
from qwen_onnx.sources.chat import CheckpointTemplate
from qwen_onnx.verify.baseline import CheckpointTokenizer
from tests.fixtures.models import byte_tokenizer

HELLO = [{"role": "user", "content": "hello \N{SNOWMAN}"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
MEMORY = "{{ 'a' * 1500000000 }}"


def with_template(source: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = source
    return tokenizer


@pytest.mark.parametrize("source", [None, "{{ bos_token }}{{ messages | tojson }}{{ eos_token }}{{ tools is none }}"])
def test_it_renders_as_transformers_does(source: str | None) -> None:
    tokenizer = with_template(source) if source else byte_tokenizer()
    template = CheckpointTemplate(tokenizer)
    for prompt in (False, True):
        expected = tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=prompt)
        assert template.render(HELLO, prompt=prompt) == expected


@pytest.mark.slow
def test_bombs_and_refusals_are_told() -> None:
    source = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}{{ raise_exception('not so') }}"
    template = CheckpointTemplate(with_template(source), Limits(cpu_seconds=1, seconds=60))
    with pytest.raises(SourceError, match="stopped: it took more than 1 s of processor time"):
        template.render([{"role": "user", "content": "loop"}])
    with pytest.raises(SourceError, match="does not render: not so"):
        template.render(HELLO)


@pytest.mark.slow
def test_neither_calibration_nor_verification_renders_a_bomb_by_itself(tmp_path: Path) -> None:
    tokenizer = with_template(MEMORY)
    with pytest.raises(SourceError, match="stopped: it needs more than 512 MiB"):
        calibration_ids(tokenizer, 4, 16)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(VerificationError, match="stopped: it needs more than 512 MiB"):
        CheckpointTokenizer(tmp_path).render(HELLO)
