"""Bodies of POST /v1/chat/completions: https://platform.openai.com/docs/api-reference/chat/create"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.processing.grammars import ANY_OBJECT
from qwen_onnx.runtime.server.api.asked import Asked, Tool
from qwen_onnx.runtime.server.api.parts import (
    STANDS_FOR,
    AudioPart,
    ImagePart,
    TextPart,
    UserPart,
    VideoPart,
    VideoUrlPart,
)
from qwen_onnx.runtime.server.api.protocol import FIRST_FAULT, NO_CHANGE, SamplingFields, Schema, Strict
from qwen_onnx.runtime.server.api.shown import Filmed, Played, Shown, bounded, bounded_sounds, bounded_videos
from qwen_onnx.runtime.service.budget import BUDGET

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


Content = str | Annotated[list[TextPart], FIRST_FAULT]
Name = Annotated[str | None, Field(description="Handed to the chat template, which may not use it.")]
UserContent = str | Annotated[list[Annotated[UserPart, Field(discriminator="type")]], FIRST_FAULT]
# lm-eval says it of whole messages
Type = Annotated[Literal["text"] | None, Field(description=NO_CHANGE)]


def joined(content: str | Sequence[Any] | None) -> str:
    """Texts of the parts as one; pictures, sounds and videos have none."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(getattr(part, "text", "") for part in content)


class SystemMessage(Strict):
    """What the model is told first; ``developer`` is the newer word for it."""

    role: Literal["system", "developer"]
    content: Content
    name: Name = None
    type: Type = None

    def plain(self) -> dict[str, Any]:
        """For the chat template."""
        return {"role": "system", "content": joined(self.content)}


class UserMessage(Strict):
    """What the user says."""

    role: Literal["user"]
    content: UserContent
    name: Name = None
    type: Type = None

    def plain(self) -> dict[str, Any]:
        """For the chat template, which is told where pictures, sounds and videos stand and not what they are."""
        if isinstance(self.content, str) or all(isinstance(part, TextPart) for part in self.content):
            return {"role": "user", "content": joined(self.content)}
        parts = [
            {"type": "text", "text": part.text} if isinstance(part, TextPart) else dict(STANDS_FOR[part.type])
            for part in self.content
        ]
        return {"role": "user", "content": parts}

    def pictures(self, where: str) -> list[Shown]:
        """What was shown with it."""
        return [
            Shown(part.image_url.url, f"{where}.content.{index}.image_url")
            for index, part in self._parts()
            if isinstance(part, ImagePart)
        ]

    def sounds(self, where: str) -> list[Played]:
        """What was played with it."""
        return [
            Played(part.input_audio.data, part.input_audio.format, f"{where}.content.{index}.input_audio")
            for index, part in self._parts()
            if isinstance(part, AudioPart)
        ]

    def videos(self, where: str) -> list[Filmed]:
        """What was filmed."""
        found = [(index, part) for index, part in self._parts() if isinstance(part, VideoPart | VideoUrlPart)]
        return [part.filmed(f"{where}.content.{index}") for index, part in found]

    def _parts(self) -> Iterator[tuple[int, UserPart]]:
        return enumerate(self.content if not isinstance(self.content, str) else ())


class FunctionCall(Strict):
    """An earlier call; ``arguments`` is a JSON object as text."""

    name: FunctionName
    arguments: str


class ToolCall(Strict):
    """An earlier call and its id."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall

    def plain(self, where: str) -> dict[str, Any]:
        """For the chat template, which writes the arguments itself.

        Raises:
            RequestError: they are not a JSON object.
        """
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise RequestError(f"arguments of the call {self.id!r} are not JSON: {error}", where=where) from error
        if not isinstance(arguments, dict):
            raise RequestError(f"arguments of the call {self.id!r} are not a JSON object", where=where)
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class AssistantMessage(Strict):
    """An earlier answer."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = Field(
        default=None, description="Handed to the chat template, which drops what it has no use for."
    )
    tool_calls: Annotated[list[ToolCall], FIRST_FAULT] | None = None
    name: Name = None
    type: Type = None
    refusal: None = Field(default=None, description=NO_CHANGE)
    audio: None = Field(default=None, description=NO_CHANGE)
    function_call: None = Field(default=None, description=NO_CHANGE)
    annotations: Annotated[list[Any], Field(max_length=0)] | None = Field(default=None, description=NO_CHANGE)

    def plain(self, where: str) -> dict[str, Any]:
        """For the chat template.

        Raises:
            RequestError: neither content nor calls, or a faulty call.
        """
        if self.content is None and not self.tool_calls:
            raise RequestError("an answer without content needs tool_calls", where=where)
        message: dict[str, Any] = {"role": "assistant", "content": joined(self.content)}
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.plain(where) for call in self.tool_calls]
        return message


class ToolMessage(Strict):
    """What a function returned."""

    role: Literal["tool"]
    tool_call_id: str
    content: Content
    name: Name = None
    type: Type = None

    def plain(self) -> dict[str, Any]:
        """For the chat template."""
        return {"role": "tool", "content": joined(self.content), "tool_call_id": self.tool_call_id}


ChatMessage = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]


def plain_messages(messages: Sequence[Any], place: str = "messages") -> list[dict[str, Any]]:
    """For the chat template, checked as a whole.

    Raises:
        RequestError: a faulty call, a result of one that was never made, arguments of more values than the budget.
    """
    calls = [call for message in messages if isinstance(message, AssistantMessage) for call in message.tool_calls or ()]
    # arguments are JSON within JSON, which nobody has counted yet; a string that does not end fails before the next
    BUDGET.check_size(",".join(call.function.arguments for call in calls).encode("utf-8", "surrogatepass"))
    plain: list[dict[str, Any]] = []
    made: set[str] = set()
    for index, message in enumerate(messages):
        where = f"{place}.{index}"
        if isinstance(message, ToolMessage) and message.tool_call_id not in made:
            raise RequestError(f"there is no earlier call {message.tool_call_id!r}", where=f"{where}.tool_call_id")
        if isinstance(message, AssistantMessage):
            made |= {call.id for call in message.tool_calls or ()}
            told = message.plain(where)
        else:
            told = message.plain()
        plain.append(told if message.name is None else {**told, "name": message.name})
    return plain


def pictures_of(messages: Sequence[Any]) -> list[Shown]:
    """Of all messages, in their order.

    Raises:
        RequestError: more than are read at once.
    """
    said = [(index, message) for index, message in enumerate(messages) if isinstance(message, UserMessage)]
    return bounded((one for index, message in said for one in message.pictures(f"messages.{index}")), "messages")


def sounds_of(messages: Sequence[Any]) -> list[Played]:
    """Of all messages, in their order; RequestError like ``pictures_of``."""
    said = [(index, message) for index, message in enumerate(messages) if isinstance(message, UserMessage)]
    return bounded_sounds((one for index, message in said for one in message.sounds(f"messages.{index}")), "messages")


def videos_of(messages: Sequence[Any]) -> list[Filmed]:
    """Of all messages, in their order; RequestError like ``pictures_of``."""
    said = [(index, message) for index, message in enumerate(messages) if isinstance(message, UserMessage)]
    return bounded_videos((one for index, message in said for one in message.videos(f"messages.{index}")), "messages")


class Function(Strict):
    """A function; ``parameters`` is a JSON schema, absent: it has none."""

    name: FunctionName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = Field(default=None, description="Calls are held to the schema in any case.")


class ChatTool(Strict):
    """Something that the model may use; there are functions only."""

    type: Literal["function"]
    function: Function


class FunctionRef(Strict):
    """Names a function."""

    name: str


class NamedChoice(Strict):
    """The model must call this function."""

    type: Literal["function"]
    function: FunctionRef


class JsonSchema(Strict):
    """A schema for the content."""

    name: FunctionName
    description: str | None = Field(default=None, description=NO_CHANGE)
    schema_: Schema | None = Field(default=None, alias="schema", description="Absent: any object.")
    strict: bool | None = Field(default=None, description="The content is held to the schema in any case.")


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    """JSON after a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class TemplateArguments(Strict):
    """What the chat template is told."""

    enable_thinking: bool | None = None


class Conversing(Strict):
    """What the two routes for conversations have alike."""

    parallel_tool_calls: bool | None = Field(default=None, description="False: at most one call. Absent: true.")
    chat_template_kwargs: TemplateArguments | None = Field(default=None, description="Not in OpenAI's API.")

    def _asked(
        self,
        messages: Sequence[Mapping[str, Any]],
        functions: Sequence[Function],
        choice: Literal["none", "auto", "required"] | FunctionRef | None,
        schema: Mapping[str, Any] | None,
        schema_field: str,
        pictures: Sequence[Shown] = (),
        sounds: Sequence[Played] = (),
        videos: Sequence[Filmed] = (),
    ) -> Asked:
        named = choice.name if isinstance(choice, FunctionRef) else None
        return Asked(
            messages,
            [Tool(function.name, function.description, function.parameters) for function in functions],
            choice="required" if isinstance(choice, FunctionRef) else choice or "auto",
            named=named,
            parallel=self.parallel_tool_calls is not False,
            schema=schema,
            schema_field=schema_field,
            thinking=self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None,
            pictures=pictures,
            sounds=sounds,
            videos=videos,
        )


class ChatRequest(SamplingFields, Conversing):
    """Body of POST /v1/chat/completions."""

    model: str
    messages: Annotated[list[ChatMessage], FIRST_FAULT] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool | None = Field(default=None, description="Log probabilities of the answer's tokens.")
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="Alternatives told; only with logprobs.")
    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    tools: list[ChatTool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    modalities: list[Literal["text"]] | None = Field(default=None, description="There is text only.")

    def options(self) -> dict[str, Any]:
        """Arguments of ``GenerationConfig`` that were given, but for the grammar.

        Raises:
            RequestError: fields that contradict each other.
        """
        given = self.sampling()
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise RequestError("max_tokens and max_completion_tokens differ", where="max_completion_tokens")
            given["max_new_tokens"] = self.max_completion_tokens
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs", where="top_logprobs")
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        return given

    def asked(self) -> Asked:
        """The conversation.

        Raises:
            RequestError: faulty messages.
        """
        form, choice = self.response_format, self.tool_choice
        schema: Schema | None = None
        if isinstance(form, JsonObjectFormat):
            schema = ANY_OBJECT
        elif isinstance(form, JsonSchemaFormat):
            schema = form.json_schema.schema_ if form.json_schema.schema_ is not None else ANY_OBJECT
        functions = [tool.function for tool in self.tools or ()]
        named = choice.function if isinstance(choice, NamedChoice) else choice
        messages, pictures = plain_messages(self.messages), pictures_of(self.messages)
        sounds, videos = sounds_of(self.messages), videos_of(self.messages)
        return self._asked(messages, functions, named, schema, "response_format", pictures, sounds, videos)
