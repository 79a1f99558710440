"""Grammars against llguidance's matcher: what an answer may be, with tags as tokens and as characters."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from llguidance import LLMatcher, LLTokenizer

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime import QwenService
from qwen_onnx.runtime.processing.grammars import ANY_OBJECT, Calls, Grammar, check_schema

FLAG = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
REFERS = {"type": "object", "properties": {"x": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"const": 1}}, "required": ["x"]}
BOTH = {"f": FLAG, "g": NOTHING}
F = '<tool_call>\n{"name": "f", "arguments": {"a": true}}\n</tool_call>'
G = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
JSON = '{"a": false}'
Thinking = Literal["no", "may", "inside"]


@pytest.fixture(params=["tokens", "characters"])
def verdict(request: pytest.FixtureRequest, qwen3_service: QwenService) -> Any:
    """Whether a text is a whole answer."""
    tokenizer = qwen3_service.tokenizer
    added = tokenizer.added_tokens if request.param == "tokens" else {}
    core = LLTokenizer(tokenizer._trusted.to_str(), n_vocab=288, eos_token=1)

    def judge(text: str, schema: Any, calls: Calls | None, thinking: Thinking = "no") -> bool:
        matcher = LLMatcher(core, Grammar(added).answer(schema, calls, thinking), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = tokenizer.encode(text, allow_special=request.param == "tokens", add_special_tokens=False)
        if request.param == "characters":
            ids = [token for character in text for token in tokenizer.encode(character, add_special_tokens=False)]
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return judge


@pytest.mark.parametrize(
    ("text", "schema", "calls", "thinking", "good"),
    [
        (JSON, FLAG, None, "no", True),
        ("{ \n}", ANY_OBJECT, None, "no", True),
        ("[]", ANY_OBJECT, None, "no", False),
        ('{"a": 1}', FLAG, None, "no", False),
        (JSON + "x", FLAG, None, "no", False),
        (f"<think>\nhm\n</think>\n\n{JSON}", FLAG, None, "may", True),
        (JSON, FLAG, None, "may", True),
        (f"<think>\nhm\n</think>\n\n{JSON}", FLAG, None, "no", False),
        (f"hm\n</think>\n\n{JSON}", FLAG, None, "inside", True),
        (JSON, FLAG, None, "inside", False),
        (F, None, Calls(BOTH, forced=True), "no", True),
        (f"{F}\n{G}", None, Calls(BOTH, forced=True), "no", True),
        (f"{F}\n{G}", None, Calls(BOTH, forced=True, several=False), "no", False),
        ("text", None, Calls(BOTH, forced=True), "no", False),
        (G, None, Calls({"f": FLAG}, forced=True), "no", False),
        (f"<think>x</think>{F}", None, Calls(BOTH, forced=True), "may", True),
        ("text", None, Calls(BOTH), "no", True),
        ("", None, Calls(BOTH), "no", True),
        (f"text\n{F}\n{G}\nmore", None, Calls(BOTH), "no", True),
        (f"text\n{F}", None, Calls(BOTH, several=False), "no", True),
        (f"{F}\n{G}", None, Calls(BOTH, several=False), "no", False),
        ("<tool_call>\nf(1)", None, Calls(BOTH), "no", False),
        (f"<think>x</think>text {G}", None, Calls(BOTH), "may", True),
        (JSON, FLAG, Calls(BOTH), "no", True),
        (f"{G}\n{F}", FLAG, Calls(BOTH), "no", True),
        ("text", FLAG, Calls(BOTH), "no", False),
        ('<tool_call>\n{"name": "r", "arguments": {"x": 1}}\n</tool_call>', None, Calls({"r": REFERS}), "no", True),
    ],
)
def test_what_an_answer_may_be(
    verdict: Any, text: str, schema: Any, calls: Calls | None, thinking: Thinking, good: bool
) -> None:
    assert verdict(text, schema, calls, thinking) is good


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "foo"}, "Invalid type: foo"),
        ({"$ref": "#/$defs/x"}, "does not exist"),
        ({"not": {}}, "Unimplemented keys"),
        ({"type": "string", "pattern": "(?=a)"}, "look-ahead"),
        ({"enum": []}, "Unsatisfiable"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_in_llguidances_words(schema: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        check_schema(schema, "here")
    assert caught.value.where == "here"
