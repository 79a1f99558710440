"""Chat templates of strangers, and prompts in which users cannot forge control tokens.

A special token that appears inside a message is replaced by a marker before rendering. Afterwards the marker
becomes the token's text again, encoded as ordinary characters; all else is encoded as one text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError as JinjaError

from qwen_onnx.bounded import is_deeper, read_bytes, read_object
from qwen_onnx.errors import ArtifactError, RequestError, TemplateError
from qwen_onnx.processes.limited import Limited, LimitReached, Limits
from qwen_onnx.runtime.processing import rendering
from qwen_onnx.runtime.processing.tokenizer import TextTokenizer, check_size, check_text

Message = Mapping[str, Any]
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
PRIVATE_USE = range(0xE000, 0xF8FF)
# levels of nesting in messages and tools: far fewer than exhaust Python's stack, far more than schemas have
MOST_LEVELS = 100
# bytes of a template and of tokenizer_config.json: the largest known have some 30 kB
MOST_SOURCE, MOST_CONFIG = 256 << 10, 16 << 20


class ChatTemplate:
    """The chat template of an artifact. It runs in a process of its own, which starts when it is first needed.

    Args:
        limits: of that process, for one conversation.

    Raises:
        ArtifactError: it has no template, or one that does not parse.
    """

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        source, config = _read(folder)
        if not isinstance(source, str):
            raise ArtifactError("the model has no chat template", where=str(folder), hint="use plain generation")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        self._tokens = {name: _token_text(name, config[name], folder) for name in names if config.get(name)}
        self.source, self._folder = source, folder
        # the most that one conversation may take, if that is less than the limits
        self.seconds: float | None = None
        self._process = Limited(rendering.__name__, limits)
        _check_syntax(source, folder)

    @cached_property
    def variables(self) -> frozenset[str]:
        """What it reads beside the messages: ``tools``, ``enable_thinking``. Raises TemplateError: see ``render``."""
        return frozenset(self._ask({"source": self.source})["reads"])

    def close(self) -> None:
        """End its process; what is being rendered fails."""
        self._process.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            told: dict[str, Any] = self._process.ask(question, self.seconds)
        except LimitReached as error:
            raise TemplateError(
                f"the chat template was stopped: {error}", where="messages", hint="send less, or use another model"
            ) from error
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"the messages are not JSON: {error}", where="messages") from error
        if "broken" in told:
            raise TemplateError(f"the chat template does not parse: {told['broken']}", where=str(self._folder))
        if "refused" in told:
            raise TemplateError(f"the chat template refuses these messages: {told['refused']}", where="messages")
        return told

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt as text.

        Raises:
            TemplateError: no messages, the template refuses them, or takes more time or memory than the limits give.
        """
        if not messages:
            raise TemplateError("there are no messages", where="messages", hint="send at least one")
        given = {**self._tokens, **variables, "add_generation_prompt": add_generation_prompt}
        # messages may be any mapping
        told = _mapped({**given, "messages": list(messages)}, lambda text: text)
        return str(self._ask({"source": self.source, "variables": told})["text"])

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: TextTokenizer,
        context_length: int,
        *,
        change: Callable[[str], str] = lambda rendered: rendered,
        **variables: Any,
    ) -> list[int]:
        """Token ids of the prompt; special tokens inside the messages or the variables stay text.

        Args:
            change: what becomes of the text that the template made, in which all special tokens are its own.

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
            rendered = change(self.render(messages, **variables))
            check_size(len(rendered), context_length)
            return tokenizer.encode(rendered, allow_special=True, add_special_tokens=False)
        marker = _unused_character(texts)
        found: list[str] = []

        def hide(match: re.Match[str]) -> str:
            found.append(match.group())
            return f"{marker}{len(found) - 1}{marker}"

        hidden = _mapped({"messages": list(messages), **variables}, lambda text: forged.sub(hide, text))
        rendered = change(self.render(**hidden))
        check_size(len(rendered), context_length)
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
    config = read_object(config_path, most_bytes=MOST_CONFIG, error=ArtifactError)
    separate = folder / TEMPLATE_FILE
    if not os.path.lexists(separate):
        return config.get("chat_template"), config
    try:
        source = read_bytes(separate, most_bytes=MOST_CONFIG, error=ArtifactError).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"the tokenizer's files cannot be read: {error}", where=str(config_path)) from error
    return source, config


def _token_text(name: str, token: Any, folder: Path) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ArtifactError(f"{name} of {TOKENIZER_CONFIG} is not a text", where=str(folder))
    return text


def _check_syntax(source: str, folder: Path) -> None:
    """Parsed alone: what compiles a template computes its constants, which may fill the memory."""
    if len(source) > MOST_SOURCE:
        raise ArtifactError(
            f"the chat template has {len(source)} characters, the most is {MOST_SOURCE}", where=str(folder)
        )
    try:
        rendering.ENVIRONMENT.parse(source)
    except (JinjaError, RecursionError) as error:
        raise ArtifactError(f"the chat template does not parse: {error}", where=str(folder)) from error


def _pattern(tokens: Mapping[str, int]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def check_depth(value: Any) -> None:
    """RequestError for nesting that would exhaust the stack: a tool call's arguments are JSON within JSON."""
    if is_deeper(value, MOST_LEVELS):
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
