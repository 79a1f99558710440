"""Chat templates in jinja2's sandbox, and prompts in which users cannot forge control tokens.

A special token that appears inside a message is replaced by a marker before rendering. Afterwards the marker
becomes the token's text again, encoded as ordinary characters; all else is encoded as one text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, meta
from jinja2 import TemplateError as JinjaError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen_onnx.bounded import read_bytes, read_object
from qwen_onnx.errors import ArtifactError, RequestError, TemplateError
from qwen_onnx.runtime.processing.tokenizer import TextTokenizer, check_size, check_text
from qwen_onnx.runtime.service.generation import Message

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
PRIVATE_USE = range(0xE000, 0xF8FF)
# levels of nesting in messages and tools: far fewer than exhaust Python's stack, far more than schemas have
MOST_LEVELS = 100
MOST_BYTES = 4 << 20


class ChatTemplate:
    """The chat template of an artifact.

    Raises:
        ArtifactError: it has no template, or one that does not parse.
    """

    def __init__(self, folder: Path) -> None:
        source, config = _read(folder)
        if not isinstance(source, str):
            raise ArtifactError("the model has no chat template", where=str(folder), hint="use plain generation")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        self._tokens = {name: _token_text(config[name]) for name in names if config.get(name)}
        self.source = source
        self._template = _compile(source, folder)
        # what it reads beside the messages: ``tools``, ``enable_thinking``
        self.variables = frozenset(meta.find_undeclared_variables(self._template.environment.parse(source)))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt as text.

        Raises:
            TemplateError: no messages, or the template refuses them.
        """
        if not messages:
            raise TemplateError("there are no messages", where="messages", hint="send at least one")
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._tokens, **variables
            )
        except (JinjaError, TypeError, KeyError, ValueError, OverflowError) as error:
            raise TemplateError(f"the chat template refuses these messages: {error}", where="messages") from error

    def encode(
        self, messages: Sequence[Message], tokenizer: TextTokenizer, context_length: int, **variables: Any
    ) -> list[int]:
        """Token ids of the prompt; special tokens inside the messages or the variables stay text.

        Raises:
            TemplateError: see ``render``.
            RequestError: lone surrogates, too deep nesting; PromptTooLongError: more text than the context can hold.
        """
        check_depth([list(messages), variables])
        texts = list(_strings([list(messages), variables]))
        check_size(sum(map(len, texts)), context_length)
        for text in texts:
            check_text(text)
        forged = _pattern(tokenizer.special_tokens)
        if not any(forged.search(text) for text in texts):
            return tokenizer.encode(self.render(messages, **variables), allow_special=True, add_special_tokens=False)
        marker = _unused_character(texts)
        found: list[str] = []

        def hide(match: re.Match[str]) -> str:
            found.append(match.group())
            return f"{marker}{len(found) - 1}{marker}"

        hidden = _mapped({"messages": list(messages), **variables}, lambda text: forged.sub(hide, text))
        rendered = self.render(**hidden)
        ids: list[int] = []
        for index, piece in enumerate(re.split(f"{marker}(\\d+){marker}", rendered)):
            text = found[int(piece)] if index % 2 else piece
            ids += tokenizer.encode(text, allow_special=index % 2 == 0, add_special_tokens=False)
        return ids


def has_template(folder: Path) -> bool:
    """Whether a model can chat; ArtifactError when the tokenizer's files cannot be read."""
    return _read(folder)[0] is not None


def _read(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Source of the template, if there is one, and ``tokenizer_config.json``."""
    config_path = folder / TOKENIZER_CONFIG
    config = read_object(config_path, most_bytes=MOST_BYTES, error=ArtifactError)
    separate = folder / TEMPLATE_FILE
    if not os.path.lexists(separate):
        return config.get("chat_template"), config
    try:
        source = read_bytes(separate, most_bytes=MOST_BYTES, error=ArtifactError).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"the tokenizer's files cannot be read: {error}", where=str(config_path)) from error
    return source, config


def _token_text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _compile(source: str, folder: Path) -> Template:
    """With the globals that transformers gives to templates."""

    def fail(message: str) -> NoReturn:
        raise JinjaError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(source)
    except JinjaError as error:
        raise ArtifactError(f"the chat template does not parse: {error}", where=str(folder)) from error


def _pattern(tokens: Mapping[str, int]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def check_depth(value: Any) -> None:
    """RequestError for nesting that would exhaust the stack: a tool call's arguments are JSON within JSON."""
    level = [value]
    for _ in range(MOST_LEVELS):
        if not level:
            return
        inner = [item.values() if isinstance(item, Mapping) else item for item in level]
        level = [each for item in inner if not isinstance(item, str) and isinstance(item, Collection) for each in item]
    raise RequestError(f"the messages nest more than {MOST_LEVELS} levels", where="messages", hint="flatten them")


def _strings(value: Any) -> Sequence[str]:
    """All text, names too: those in schemas and arguments are the user's."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _strings(item)]
    return []


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of nested messages with every string changed, names too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return value


def _unused_character(texts: Sequence[str]) -> str:
    used = set().union(*map(set, texts))
    unused = next((chr(code) for code in PRIVATE_USE if chr(code) not in used), None)
    if unused is None:
        raise TemplateError("the messages use every private character of Unicode", where="messages")
    return unused
