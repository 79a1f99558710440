"""What the routes share: strict records, the fields that choose tokens, token counts, errors.

https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model

from qwen_onnx.bounded import is_deeper
from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.engines.sampling import ALL_FEATURES, MOST_BIAS, SAMPLING, Sampling
from qwen_onnx.runtime.service.generation import (
    DEFAULT,
    MOST_STOP_CHARACTERS,
    MOST_STOP_STRINGS,
    PARAMETERS,
    Delta,
    GenerationConfig,
)

NO_CHANGE = "Accepted for compatibility; it changes nothing."
# OpenAI takes 4; harnesses send more
MOST_STOPS = MOST_STOP_STRINGS
MOST_CHOICES = 8
# llguidance reads no deeper schemas, and whoever recurses into one stays far from Python's own limit
MOST_DEPTH = 64

# of a list, validation tells the first faulty item: telling each of them would cost more than the request
FIRST_FAULT = Field(fail_fast=True)

Bias = Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)]
Stop = Annotated[str, Field(max_length=MOST_STOP_CHARACTERS)]
TokenKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]


class Strict(BaseModel):
    """Unknown fields are errors, and so is a text where a number belongs."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def ranged(name: str, least: float | None = None) -> Any:
    """A field with range and description of ``GenerationConfig``'s; ``least`` stands for that of the range."""
    one = PARAMETERS[name]
    absent = "" if one.default is None else f" Absent: {one.default}."
    bounds: dict[str, Any] = {"le": one.most, "gt" if one.above else "ge": one.least if least is None else least}
    return Field(default=None, description=one.told + absent, **bounds)


def _shallow(schema: dict[str, Any]) -> dict[str, Any]:
    if is_deeper(schema, MOST_DEPTH):
        raise ValueError(f"the schema is nested more than {MOST_DEPTH} levels deep")
    return schema


Schema = Annotated[dict[str, Any], AfterValidator(_shallow)]


class Described(Strict):
    """Fields that every generating route accepts and that change nothing: this server stores nothing."""

    user: str | None = Field(default=None, description=NO_CHANGE)
    metadata: dict[str, str] | None = Field(default=None, description=NO_CHANGE)
    safety_identifier: str | None = Field(default=None, description=NO_CHANGE)
    prompt_cache_key: str | None = Field(
        default=None, description="Accepted for compatibility; common prefixes are found without it."
    )
    store: Literal[False] | None = Field(default=None, description="Nothing is stored.")
    service_tier: Literal["auto", "default"] | None = Field(default=None, description="There is one tier.")


class StreamOptions(Strict):
    """``include_usage`` adds a last chunk with the token counts."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = Field(default=None, description="Chunks are never padded.")


if TYPE_CHECKING:
    SampledFields = Described
else:
    # a field for each parameter of ``Sampling`` that is a number: its type, its range, its words
    SampledFields = create_model(
        "SampledFields",
        __base__=Described,
        **{name: (get_type_hints(Sampling)[name] | None, ranged(name)) for name in SAMPLING},
    )


class SamplingFields(SampledFields):
    """How to choose tokens; the form of chat completions and of completions."""

    max_tokens: int | None = ranged("max_new_tokens")
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = Field(
        default=None, description=f"The answer ends before the first of these strings; at most {MOST_STOPS}."
    )
    logit_bias: dict[TokenKey, Bias] | None = Field(
        default=None, description="Token id, as a string, to what is added to its logit."
    )
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES, description="Answers to each prompt. Absent: 1.")
    stream: bool | None = Field(default=None, description="Server-sent events instead of one body.")
    stream_options: StreamOptions | None = Field(default=None, description="Only with stream.")

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> dict[str, Any]:
        """Arguments of ``GenerationConfig`` that were given.

        Raises:
            RequestError: ``stream_options`` without ``stream``; two equal token ids in ``logit_bias``.
        """
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is for streams: set stream", where="stream_options")
        given = {name: getattr(self, name) for name in SAMPLING}
        given["max_new_tokens"] = self.max_tokens
        given["stop"] = ((self.stop,) if isinstance(self.stop, str) else tuple(self.stop)) if self.stop else None
        given["logit_bias"] = {int(token): bias for token, bias in (self.logit_bias or {}).items()} or None
        return {name: value for name, value in given.items() if value is not None}


def configs(options: dict[str, Any], count: int, features: frozenset[str]) -> list[GenerationConfig]:
    """One configuration for each of ``count`` choices; a seed goes up by one with each.

    Raises:
        RequestError: a value out of its range, or a field that is not among the engine's ``features``.
    """
    for name in sorted(ALL_FEATURES - features):
        if options.get(name, getattr(DEFAULT, name)) != getattr(DEFAULT, name):
            raise RequestError(f"{name} is not supported by this model's engine", where=name)
    seed, most = options.get("seed"), int(SAMPLING["seed"].most)
    if seed is None:
        return [GenerationConfig(**options)] * count
    return [GenerationConfig(**{**options, "seed": (seed + index) % (most + 1)}) for index in range(count)]


class PromptDetails(Strict):
    """``cached_tokens`` were found in the prefix cache, ``audio_tokens`` stand for sounds: told where there are any."""

    cached_tokens: int
    audio_tokens: int = 0


class CompletionDetails(Strict):
    """``reasoning_tokens`` are those up to the end of the reasoning."""

    reasoning_tokens: int


class Usage(Strict):
    """Token counts; a prompt that has several answers counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails

    @classmethod
    def of(cls, last: dict[int, Delta], choices: int, reasoning: int = 0, audio: int = 0) -> Usage:
        """Sum over answers by their index, ``choices`` of them to each prompt."""
        firsts = [delta for index, delta in last.items() if index % choices == 0]
        prompt = sum(delta.prompt_tokens for delta in firsts)
        completion = sum(delta.completion_tokens for delta in last.values())
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptDetails(
                cached_tokens=sum(delta.cached_tokens for delta in firsts), **({"audio_tokens": audio} if audio else {})
            ),
            completion_tokens_details=CompletionDetails(reasoning_tokens=reasoning),
        )


class Model(Strict):
    """A model of the list."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "qwen-onnx"


class ModelList(Strict):
    """All models of this server."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """What was wrong; ``param`` names the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The shape in which the openai client expects an error."""

    error: ErrorDetail


MOST_MESSAGE = 2000


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An ``ErrorResponse`` as a dictionary. What quotes a long input is cut: an answer is no way to multiply it."""
    place = None if param is None else shortened(param, MOST_MESSAGE)
    return {"error": {"message": shortened(message, MOST_MESSAGE), "type": kind, "param": place, "code": code}}


def shortened(text: str, most: int) -> str:
    """The first ``most`` characters, and a word that there were more."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "A field is unknown, unsupported or out of its range; param names it"},
    401: {"model": ErrorResponse, "description": "No key, or an unknown one"},
    404: {"model": ErrorResponse, "description": "This server has another model"},
    413: {"model": ErrorResponse, "description": "The body is too large"},
    408: {"model": ErrorResponse, "description": "The body did not come in time"},
    429: {"model": ErrorResponse, "description": "Too many requests with this key; see Retry-After"},
    500: {"model": ErrorResponse, "description": "A fault of this server"},
    503: {"model": ErrorResponse, "description": "The queue is full or the engine restarts; see Retry-After"},
    504: {"model": ErrorResponse, "description": "The answer took longer than is allowed"},
    # with one of these FastAPI does not claim that its own 422 is sent
    "4XX": {"model": ErrorResponse, "description": "Any other refusal"},
}
