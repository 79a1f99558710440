"""The tiny artifact with the tags and the chat template of Qwen3, behind a live server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from qwen_onnx.runtime import QwenService
from tests.conftest import rewrite_json
from tests.fixtures.servers import served

TAGS = ("<tool_call>", "</tool_call>", "<think>", "</think>")

# Our own writing of what Qwen3's template does (tokenizer_config.json of Qwen/Qwen3-0.6B, Apache-2.0): tools in the
# system message, reasoning kept only after the last question, calls and their results in tags, enable_thinking.
QWEN3 = """
{%- if tools or messages[0].role == 'system' -%}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}{{ '\n\n' if tools else '' }}{% endif %}
{%- if tools %}# Tools

<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>{% endif %}<|im_end|>
{% endif -%}
{%- set ns = namespace(last=messages|length, found=false) %}
{%- for m in messages[::-1] %}{% if not ns.found and m.role == 'user' %}
{%- set ns.found = true %}{% set ns.last = messages|length - 1 - loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' %}
{%- set content, thought = m.content, '' %}
{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in m.content %}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = m.content.split('</think>')[-1].lstrip('\n') %}
{%- endif -%}
<|im_start|>assistant
{% if loop.index0 > ns.last and thought %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content }}
{%- for call in m.tool_calls or [] -%}
{{ '' if loop.first and not content else '\n' }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif m.role == 'tool' -%}
<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{{ '<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false else '' }}
{%- endif %}
"""


def with_template(artifact: Path, folder: Path, template: str, tags: tuple[str, ...] = TAGS) -> Path:
    """A copy with another template, and with ``tags`` as tokens of their own where the vocabulary is padded."""
    shutil.copytree(artifact, folder)
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first = len(tokenizer["model"]["vocab"])
    for index, tag in enumerate(tags):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        tokenizer["added_tokens"].append({"id": first + index, "content": tag, **flags})
    rewrite_json(folder / "tokenizer.json", **tokenizer)
    return folder


@pytest.fixture(scope="session")
def qwen3_artifact(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Qwen3."""
    return with_template(tiny_artifact, tmp_path_factory.mktemp("qwen3") / "int4", QWEN3)


@pytest.fixture(scope="session")
def qwen3(qwen3_artifact: Path) -> Iterator[OpenAI]:
    """The openai client before it."""
    with served(qwen3_artifact, "tiny") as connected:
        yield connected


@pytest.fixture(scope="session")
def qwen3_service(qwen3_artifact: Path) -> Iterator[QwenService]:
    """It in this process."""
    with QwenService(qwen3_artifact, threads=1) as running:
        yield running
