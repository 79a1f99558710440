"""Bodies of POST /v1/responses: https://platform.openai.com/docs/api-reference/responses/create"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.processing.grammars import ANY_OBJECT
from qwen_onnx.runtime.server.api.asked import Asked
from qwen_onnx.runtime.server.api.chat_request import (
    AssistantMessage,
    Conversing,
    Function,
    FunctionCall,
    FunctionName,
    FunctionRef,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserContent,
    UserMessage,
    joined,
    plain_messages,
)
from qwen_onnx.runtime.server.api.parts import (
    AudioPart,
    ImagePart,
    ImageUrl,
    TextPart,
    UserPart,
    VideoPart,
    VideoUrlPart,
)
from qwen_onnx.runtime.server.api.protocol import FIRST_FAULT, NO_CHANGE, Described, Schema, Strict, ranged
from qwen_onnx.runtime.server.api.shown import Filmed, Played, Shown, bounded, bounded_sounds, bounded_videos

Empty = Annotated[list[Any], Field(max_length=0)]
Status = Annotated[
    Literal["in_progress", "completed", "incomplete"] | None, Field(description="Of an item that was an answer.")
]


class InputText(Strict):
    """A text part; files are refused by their type."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: Empty | None = Field(default=None, description=NO_CHANGE)
    logprobs: list[Any] | None = Field(default=None, description=NO_CHANGE)


class InputImage(Strict):
    """A picture in what the user says: ``image_url`` is a data URI in base64, or of a host that is fetched from."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] | None = Field(default=None, description=NO_CHANGE)
    file_id: None = Field(default=None, description=NO_CHANGE)


# OpenAI has no parts for sounds and videos here: they have the form of a chat's
InputPart = InputText | InputImage | AudioPart | VideoPart | VideoUrlPart
Parts = Annotated[list[Annotated[InputPart, Field(discriminator="type")]], FIRST_FAULT]


class InputMessage(Strict):
    """A message; one with the role assistant may be an item of an earlier answer."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Parts
    id: str | None = Field(default=None, description=NO_CHANGE)
    status: Status = None

    def said(self) -> UserContent:
        """In the form of a chat's message; text alone is one text."""
        if isinstance(self.content, str) or all(isinstance(part, InputText) for part in self.content):
            return joined(self.content)
        return [_as_in_a_chat(part) for part in self.content]

    def pictures(self, where: str) -> list[Shown]:
        """What was shown with it; RequestError: by somebody else than the user."""
        found = [(index, part) for index, part in self._parts() if isinstance(part, InputImage)]
        shown = [Shown(part.image_url, f"{where}.content.{index}.image_url") for index, part in found]
        self._require_user("shows pictures", shown)
        return shown

    def sounds(self, where: str) -> list[Played]:
        """What was played with it; RequestError like ``pictures``."""
        found = [(index, part.input_audio) for index, part in self._parts() if isinstance(part, AudioPart)]
        played = [Played(one.data, one.format, f"{where}.content.{index}.input_audio") for index, one in found]
        self._require_user("plays sounds", played)
        return played

    def videos(self, where: str) -> list[Filmed]:
        """What was filmed; RequestError like ``pictures``."""
        found = [(index, part) for index, part in self._parts() if isinstance(part, VideoPart | VideoUrlPart)]
        filmed = [part.filmed(f"{where}.content.{index}") for index, part in found]
        self._require_user("shows videos", filmed)
        return filmed

    def _parts(self) -> Iterator[tuple[int, InputPart]]:
        return enumerate(self.content if not isinstance(self.content, str) else ())

    def _require_user(self, does: str, found: Sequence[Shown | Played | Filmed]) -> None:
        if found and self.role != "user":
            raise RequestError(f"only the user {does}, this role is {self.role}", where=found[0].where)


def _as_in_a_chat(part: InputPart) -> UserPart:
    if isinstance(part, InputText):
        return TextPart(type="text", text=part.text)
    if isinstance(part, InputImage):
        return ImagePart(type="image_url", image_url=ImageUrl(url=part.image_url))
    return part


class InputCall(Strict):
    """A call of an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: FunctionName
    arguments: str
    id: str | None = Field(default=None, description=NO_CHANGE)
    status: Status = None


class CallOutput(Strict):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Annotated[list[InputText], FIRST_FAULT]
    id: str | None = Field(default=None, description=NO_CHANGE)
    status: Status = None


class ReasoningText(Strict):
    """What the model thought."""

    type: Literal["reasoning_text"]
    text: str


class InputReasoning(Strict):
    """Reasoning of an earlier answer, handed to the chat template, which drops what it has no use for."""

    type: Literal["reasoning"]
    id: str | None = Field(default=None, description=NO_CHANGE)
    summary: Empty | None = None
    content: Annotated[list[ReasoningText], FIRST_FAULT] | None = None
    encrypted_content: None = None
    status: Status = None


def _kind(item: Any) -> str:
    """The type of an item, by which it is judged; one without is a message."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return kind if isinstance(kind, str) else ""


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[CallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="item_type",
        custom_error_message="type is not message, function_call, function_call_output or reasoning",
    ),
]


class FunctionTool(Function):
    """A function; ``parameters`` is a JSON schema, absent: it has none."""

    type: Literal["function"]


class NamedFunction(FunctionRef):
    """The model must call this function."""

    type: Literal["function"]


class TextFormat(Strict):
    """Any text or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(Strict):
    """JSON after a schema."""

    type: Literal["json_schema"]
    name: FunctionName
    schema_: Schema = Field(alias="schema")
    description: str | None = Field(default=None, description=NO_CHANGE)
    strict: bool | None = Field(default=None, description="The answer is held to the schema in any case.")


class TextOptions(Strict):
    """What kind of text."""

    format: TextFormat | SchemaFormat | None = None


class ResponseStreamOptions(Strict):
    """There is nothing to choose."""

    include_obfuscation: Literal[False] | None = Field(default=None, description="Events are never padded.")


class ResponseRequest(Described, Conversing):
    """Body of POST /v1/responses. The server keeps nothing: send the whole conversation."""

    model: str
    input: str | Annotated[list[InputItem], FIRST_FAULT, Field(min_length=1)]
    instructions: str | None = Field(default=None, description="A system message before the input.")
    max_output_tokens: int | None = ranged("max_new_tokens")
    temperature: float | None = ranged("temperature")
    top_p: float | None = ranged("top_p")
    stream: bool | None = Field(default=None, description="Server-sent events instead of one body.")
    stream_options: ResponseStreamOptions | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = Field(default=None, description="What is too long is refused.")
    include: Empty | None = None

    def options(self) -> dict[str, Any]:
        """Arguments of ``GenerationConfig`` that were given, but for the grammar."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is for streams: set stream", where="stream_options")
        given = {"max_new_tokens": self.max_output_tokens, "temperature": self.temperature, "top_p": self.top_p}
        return {name: value for name, value in given.items() if value is not None}

    def asked(self) -> Asked:
        """The conversation.

        Raises:
            RequestError: faulty items.
        """
        form, choice = self.text.format if self.text else None, self.tool_choice
        schema: Schema | None = None
        if isinstance(form, SchemaFormat):
            schema = form.schema_
        elif form and form.type == "json_object":
            schema = ANY_OBJECT
        # who said them is checked before what: roles other than the user have texts alone
        pictures, sounds, videos = self._media()
        messages = plain_messages(self._messages(), "input")
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        return self._asked(messages, self.tools or (), choice, schema, "text.format", pictures, sounds, videos)

    def _media(self) -> tuple[list[Shown], list[Played], list[Filmed]]:
        """Of all items, in their order; RequestError: more than are taken at once, or not by the user."""
        items = enumerate(self.input if not isinstance(self.input, str) else ())
        said = [(f"input.{index}", item) for index, item in items if isinstance(item, InputMessage)]
        pictures = bounded((one for where, item in said for one in item.pictures(where)), "input")
        sounds = bounded_sounds((one for where, item in said for one in item.sounds(where)), "input")
        return pictures, sounds, bounded_videos((one for where, item in said for one in item.videos(where)), "input")

    def _messages(self) -> list[Any]:
        """Items as messages of a chat; what the model gave in one go is one message."""
        if isinstance(self.input, str):
            return [UserMessage(role="user", content=self.input)]
        messages: list[Any] = []
        for item in self.input:
            last = messages[-1] if messages and isinstance(messages[-1], AssistantMessage) else None
            if isinstance(item, InputMessage) and item.role != "assistant":
                if item.role == "user":
                    messages.append(UserMessage(role="user", content=item.said()))
                else:
                    messages.append(SystemMessage(role=item.role, content=joined(item.content)))
            elif isinstance(item, CallOutput):
                messages.append(ToolMessage(role="tool", tool_call_id=item.call_id, content=joined(item.output)))
            elif isinstance(item, InputCall):
                last = last or _opened(messages)
                call = FunctionCall(name=item.name, arguments=item.arguments)
                last.tool_calls = [*(last.tool_calls or ()), ToolCall(id=item.call_id, function=call)]
            elif isinstance(item, InputMessage):
                # reasoning alone goes with the text that follows it
                last = last if last and last.content == "" and not last.tool_calls else _opened(messages)
                last.content = joined(item.content)
            else:
                _opened(messages).reasoning_content = "".join(part.text for part in item.content or ()) or None
        return messages


def _opened(messages: list[Any]) -> AssistantMessage:
    messages.append(AssistantMessage(role="assistant", content=""))
    return messages[-1]  # type: ignore[no-any-return]
