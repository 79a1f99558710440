"""What a conversation's request comes to: prompt ids, a grammar, and how its answer is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.processing.grammars import Calls, Grammar, check_grammar, check_schema
from qwen_onnx.runtime.processing.reasoning import OPEN, is_open
from qwen_onnx.runtime.processing.tool_calls import OPEN as CALL
from qwen_onnx.runtime.server.api.events import Reading
from qwen_onnx.runtime.server.api.shown import Filmed, Played, Shown, attached, filmed, played
from qwen_onnx.runtime.server.fetching import Fetcher
from qwen_onnx.runtime.service.generation import DEFAULT, ChatPrompt
from qwen_onnx.runtime.service.text import Prepared, TextService

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Tool:
    """A function that the model may call; ``parameters`` is a JSON schema."""

    name: str
    description: str | None
    parameters: Mapping[str, Any] | None

    def plain(self) -> dict[str, Any]:
        """For the chat template."""
        told: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            told["description"] = self.description
        return {"type": "function", "function": {**told, "parameters": self.parameters or NO_PARAMETERS}}

    def schema(self) -> dict[str, Any]:
        """Of its arguments, which are an object in any case.

        Raises:
            RequestError: the schema is faulty, or one that no grammar can hold to.
        """
        schema = {"type": "object", **(self.parameters if self.parameters is not None else NO_PARAMETERS)}
        where = f"tools.{self.name}.parameters"
        if schema["type"] != "object":
            raise RequestError(f"the type of {self.name}'s parameters is not object", where=where)
        check_schema(schema, where)
        return schema


@dataclass(frozen=True)
class Asked:
    """A conversation and what its answer may be.

    Args:
        choice: none, auto, required, or a function's name as ``named``.
        parallel: whether there may be several calls.
        schema: JSON schema of the content.
        schema_field: where the request has it, for messages.
        thinking: see ``ChatPrompt``.
        pictures, sounds, videos: in the order of their places in the messages.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Tool] = ()
    choice: Literal["none", "auto", "required"] = "auto"
    named: str | None = None
    parallel: bool = True
    schema: Mapping[str, Any] | None = None
    schema_field: str = "response_format"
    thinking: bool | None = None
    pictures: Sequence[Shown] = ()
    sounds: Sequence[Played] = ()
    videos: Sequence[Filmed] = ()


def understood(
    service: TextService, asked: Asked, fetcher: Fetcher | None = None
) -> tuple[Prepared, str | None, Reading]:
    """Prompt ids, the grammar if there is one, and how to read the answer. Long texts take a while: call in a thread.

    Raises:
        RequestError, PromptTooLongError, TemplateError: what is asked is faulty or beyond this model.
    """
    tools = _tools(asked)
    knows = service.template.variables if service.template else frozenset()
    if service.template and tools and "tools" not in knows:
        raise RequestError("this model has no tool format: its chat template does not know tools", where="tools")
    # Qwen3-Coder's XML calls stand between the same tags
    if service.template and tools and (CALL not in service.template.source or "<function=" in service.template.source):
        raise RequestError("this model's chat template does not use Hermes' tool format", where="tools")
    if service.template and asked.thinking is not None and "enable_thinking" not in knows:
        raise RequestError(
            "this model's thinking cannot be switched: its chat template does not know enable_thinking",
            where="chat_template_kwargs",
        )
    told, pictures = [tool.plain() for tool in tools], attached(asked.pictures, fetcher)
    sounds, videos = played(asked.sounds), filmed(asked.videos)
    chat = ChatPrompt(asked.messages, told, asked.thinking, asked.schema, pictures, sounds, videos)
    # before the template is run, because it refuses a text that is too long before it works on it
    ids = service.prepare(chat, DEFAULT)
    inside = is_open(service.tokenizer.tail(ids))
    may = "enable_thinking" in knows and asked.thinking is not False
    grammar = _grammar(service, asked, tools, "inside" if inside else "may" if may else "no")
    thinks = inside or "enable_thinking" in knows or OPEN in service.tokenizer.added_tokens
    return ids, grammar, Reading(thinks, inside, [tool.name for tool in tools], trusted=grammar is not None)


def _tools(asked: Asked) -> Sequence[Tool]:
    """Those that the model is told of."""
    names = [tool.name for tool in asked.tools]
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice:
        raise RequestError(f"there are two functions named {twice!r}", where="tools")
    if asked.named is not None and asked.named not in names:
        raise RequestError(f"there is no function {asked.named!r} among the tools", where="tool_choice")
    if asked.choice == "required" and not names:
        raise RequestError("tool_choice is required, but there are no tools", where="tool_choice")
    return () if asked.choice == "none" else asked.tools


def _grammar(
    service: TextService, asked: Asked, tools: Sequence[Tool], thinking: Literal["no", "may", "inside"]
) -> str | None:
    forced = asked.named is not None or asked.choice == "required"
    if asked.schema is not None:
        check_schema(asked.schema, asked.schema_field)
    if "grammar" not in service.engine.features:
        if forced or asked.schema is not None:
            what = "tool_choice" if forced else asked.schema_field
            raise RequestError(f"{what} is not supported by this model's engine, which knows no grammars", where=what)
        return None
    if not tools and asked.schema is None:
        return None
    schemas = {tool.name: tool.schema() for tool in tools if asked.named in (None, tool.name)}
    several = asked.parallel and asked.named is None
    calls = Calls(schemas, forced=forced, several=several) if schemas else None
    grammar = Grammar(service.tokenizer.added_tokens).answer(asked.schema, calls, thinking)
    # schemas that are good alone may be too large together
    check_grammar(grammar, "tools" if calls else asked.schema_field)
    return grammar
