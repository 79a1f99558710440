"""Templates of strangers: what they cost is bounded, and nothing of them runs in this process."""

from __future__ import annotations

import gc
import json
from collections import OrderedDict, UserDict
from collections.abc import Iterator
from pathlib import Path

import jinja2
import pytest

from qwen_onnx.errors import ArtifactError, PromptTooLongError, QwenOnnxError, TemplateError
from qwen_onnx.processes.limited import Limits
from qwen_onnx.runtime.processing.template import MOST_SOURCE, ChatTemplate
from qwen_onnx.runtime.processing.tokenizer import MOST_BYTES, TextTokenizer

QUICK = Limits(memory=64 << 20, cpu_seconds=1, seconds=60)
HELLO = [{"role": "user", "content": "hello"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def template(folder: Path, source: str, limits: Limits = QUICK) -> ChatTemplate:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": source, "eos_token": "<|end|>"}))
    return ChatTemplate(folder, limits)


@pytest.mark.parametrize(
    ("bomb", "expected"),
    [
        (LOOP, "processor time"),
        ("{{ 'a' * 1500000000 }}", "memory"),
        ("{{ ('a' * 99999) * 99999 }}", "memory"),
        ("{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}", "memory"),
        ("{{ raise_exception('a' * 100000) }}", "a{500}\n"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ messages | nothing }}", "No filter named 'nothing'"),
    ],
)
def test_a_bomb_is_refused_and_what_follows_is_rendered(tmp_path: Path, bomb: str, expected: str) -> None:
    found = template(tmp_path, "{% if messages[0].content == 'bomb' %}" + bomb + "{% endif %}{{ messages[0].content }}")
    with pytest.raises(TemplateError, match=expected) as caught:
        found.render([{"role": "user", "content": "bomb"}])
    assert len(str(caught.value)) < 1000
    # what never compiles never renders; the rest is a matter of these messages
    if "nothing" not in bomb:
        assert found.render(HELLO) == "hello"


def test_nothing_of_it_is_compiled_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compile", "from_string"):
        monkeypatch.setattr(jinja2.Environment, name, None)
    found = template(tmp_path, "{{ 'a' * 1500000000 }}{{ tools }}")
    with pytest.raises(TemplateError, match="memory"):
        found.render(HELLO)
    assert found.variables == {"tools"}


def test_what_it_makes_is_bounded(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(TemplateError, match="characters of them, the most is"):
        template(tmp_path, "{{ 'a' * 20000000 }}", Limits()).render(HELLO)
    with pytest.raises(PromptTooLongError, match="100,000 characters"):
        template(tmp_path, "{{ 'a' * 100000 }}").encode(HELLO, TextTokenizer(tiny_checkpoint), 1024)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No garbage is collected: finalizers of other tests would run, and fail, where the stack is nearly used up."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("source", ["{% if %}", "(" * 5000, "{{" + "(" * 5000, "x" * (MOST_SOURCE + 1)])
def test_what_does_not_parse_is_no_template(tmp_path: Path, source: str) -> None:
    if source.startswith("("):
        assert template(tmp_path, source).render(HELLO) == source
        return
    with pytest.raises(ArtifactError, match="chat template"):
        template(tmp_path, source)


def test_it_reads_what_it_names(tmp_path: Path) -> None:
    source = "{{ messages[0]['content'] }}{% set own = 1 %}{{ own }}{{ eos_token }}{% if tools %}{% endif %}"
    found = template(tmp_path, source)
    assert found.variables == {"messages", "eos_token", "tools"}
    assert found.render(HELLO, tools=[]) == "hello1<|end|>"


@pytest.mark.parametrize("message", [OrderedDict(HELLO[0]), UserDict(HELLO[0])])
def test_messages_are_any_mapping(tmp_path: Path, message: dict[str, str]) -> None:
    assert template(tmp_path, "{{ messages[0].content }}").render((message,)) == "hello"


@pytest.mark.parametrize("content", [object(), 10**5000, {1, 2}], ids=["object", "integer", "set"])
def test_messages_that_are_not_json_are_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(TemplateError, match="JSON"):
        template(tmp_path, "{{ messages[0].content }}").render([{"role": "user", "content": content}])


def test_a_conversation_has_no_more_time_than_it_is_given(tmp_path: Path) -> None:
    found = template(tmp_path, LOOP, Limits(cpu_seconds=600, seconds=600))
    found.seconds = 0.5
    with pytest.raises(TemplateError, match=r"more than 0\.5 s"):
        found.render(HELLO)


def test_a_tokenizer_that_is_too_large_is_not_parsed(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ArtifactError, match="more than 67,108,864 bytes"):
        TextTokenizer(tmp_path)
    with (tmp_path / "tokenizer_config.json").open("wb") as file:
        file.truncate(64 << 20)
    with pytest.raises(QwenOnnxError, match="more than"):
        ChatTemplate(tmp_path)


@pytest.mark.parametrize("token", [{"x": 1}, {"content": 7}, [1], 7])
def test_a_special_token_that_is_not_a_text_is_refused(tmp_path: Path, token: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1 }}", "eos_token": token}))
    with pytest.raises(ArtifactError, match=r"eos_token of tokenizer_config\.json is not a text"):
        ChatTemplate(tmp_path)


def test_what_marks_a_turn_for_training_is_its_content_alone(tmp_path: Path) -> None:
    """As transformers' own tag: published templates of Qwen3-ASR have it."""
    marked = "{% for m in messages %}<a>{% generation %}{{- m.content + '</a>' -}}{% endgeneration %}{% endfor %}"
    assert template(tmp_path, marked).render(HELLO) == "<a>hello</a>"
    with pytest.raises(ArtifactError, match="does not parse"):
        template(tmp_path, "{% generation %}never ended")
