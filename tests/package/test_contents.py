"""What a stranger's package holds, read within limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_onnx.artifact.draft_head import DRAFT_HEAD
from qwen_onnx.errors import TemplateError
from qwen_onnx.package.contents import Contents

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.slow
@pytest.mark.parametrize("source", [LOOP, "{{ 'a' * 1500000000 }}"])
def test_a_template_that_never_ends_is_told(tmp_path: Path, source: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    with pytest.raises(TemplateError, match="stopped"):
        _ = Contents(tmp_path).user_prompt


def test_a_head_that_guesses_tokens_is_one_of_its_graphs(drafting_artifact: Path) -> None:
    """No configuration names it, and what it reads beside it is bounded as for the others."""
    contents = Contents(drafting_artifact)
    assert contents.graph_files == ["model.onnx", DRAFT_HEAD]
    assert set(contents.external) == {"model.onnx.data", f"{DRAFT_HEAD}.data"}
