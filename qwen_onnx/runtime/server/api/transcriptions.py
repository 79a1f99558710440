"""POST /v1/audio/transcriptions: https://platform.openai.com/docs/api-reference/audio/createTranscription"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.processing.transcripts import LANGUAGES
from qwen_onnx.runtime.server.api.chat_response import sse
from qwen_onnx.runtime.server.api.forms import Part, read_form
from qwen_onnx.runtime.server.api.protocol import Strict, configs
from qwen_onnx.runtime.server.api.running import answered, documented
from qwen_onnx.runtime.server.api.served import Served
from qwen_onnx.runtime.service.generation import Attached, Delta
from qwen_onnx.runtime.service.generations import Generations
from qwen_onnx.runtime.service.text import TextService
from qwen_onnx.runtime.service.transcription import Transcribing, transcribing

NO_TIMES = "the model gives no times"
# of OpenAI's, and why not
REFUSED = {
    "timestamp_granularities[]": NO_TIMES,
    "timestamp_granularities": NO_TIMES,
    "include[]": "log probabilities are not told of transcripts",
    "include": "log probabilities are not told of transcripts",
    "chunking_strategy": "a sound is heard as a whole",
    "known_speaker_names[]": "speakers are not told apart",
    "known_speaker_references[]": "speakers are not told apart",
}
FORMATS = {
    "verbose_json": NO_TIMES,
    "srt": NO_TIMES,
    "vtt": NO_TIMES,
    "diarized_json": "speakers are not told apart",
}
TRUTHS = {"true": True, "false": False}
FIELDS: dict[str, dict[str, Any]] = {
    "file": {"type": "string", "format": "binary", "description": "A sound: WAV, FLAC or MP3."},
    "model": {"type": "string"},
    "language": {
        "type": "string",
        "description": f"What is spoken: {', '.join(LANGUAGES)}, or a name. Absent: the model finds out.",
    },
    "prompt": {"type": "string", "description": "Words that may come, or what it is about."},
    "response_format": {"type": "string", "enum": ["json", "text"], "default": "json"},
    "temperature": {"type": "number", "minimum": 0, "default": 0},
    "stream": {"type": "boolean", "description": "Server-sent events instead of one body."},
}
REQUIRED = ("file", "model")
SCHEMA = {"type": "object", "required": REQUIRED, "properties": FIELDS, "additionalProperties": False}
BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": SCHEMA}}}}


class InputDetails(Strict):
    """Of the prompt: tokens of the sound, and all others."""

    audio_tokens: int
    text_tokens: int


class TranscriptUsage(Strict):
    """Token counts."""

    type: Literal["tokens"] = "tokens"
    input_tokens: int
    input_token_details: InputDetails
    output_tokens: int
    total_tokens: int


class Transcription(Strict):
    """``language`` is the one that was asked for or heard; it is not in OpenAI's API."""

    text: str
    language: str | None
    usage: TranscriptUsage


@dataclass(frozen=True)
class TranscriptionRequest:
    """The fields of a form; ``plain``: the text alone is wanted."""

    file: bytes
    model: str
    language: str | None
    prompt: str
    temperature: float
    plain: bool
    stream: bool

    @classmethod
    def of(cls, form: dict[str, Part]) -> TranscriptionRequest:
        """Checked.

        Raises:
            RequestError: a field is missing, unknown, or has a value that is not supported; names it.
        """
        for name in form:
            if name in REFUSED:
                raise RequestError(f"{name} is not supported: {REFUSED[name]}", where=name)
            if name not in FIELDS:
                raise RequestError(f"{name[:60]}: there is no such field", where=name)
        for name in REQUIRED:
            if name not in form:
                raise RequestError(f"{name}: Field required", where=name)
        told = {name: part.text for name, part in form.items() if name != "file"}
        if not form["file"].is_file:
            raise RequestError("file is a text, not a file", where="file")
        form_of = told.get("response_format", "json")
        if form_of not in ("json", "text"):
            why = FORMATS.get(form_of, "there are json and text")
            raise RequestError(f"response_format {form_of[:40]!r} is not supported: {why}", where="response_format")
        stream = TRUTHS.get(told.get("stream", "false").lower())
        if stream is None:
            raise RequestError(f"stream is {told['stream'][:40]!r}, not true or false", where="stream")
        return cls(
            form["file"].content,
            told["model"],
            told.get("language") or None,
            told.get("prompt", ""),
            _number(told.get("temperature", "0")),
            form_of == "text",
            stream,
        )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise RequestError(f"temperature is {text[:40]!r}, not a number", where="temperature") from error


def add_transcriptions(router: APIRouter, service: TextService, served: Served) -> None:
    """The route, also of models that make no transcripts: it says so."""

    @router.post(
        "/audio/transcriptions",
        response_model=Transcription,
        responses=documented("transcript.text.* events; with response_format text the text alone"),
        openapi_extra=BODY,
    )
    async def transcriptions(request: Request) -> Response:
        """Write down what is said in a sound."""
        content, kind = await request.body(), request.headers.get("content-type", "")
        asked = TranscriptionRequest.of(await asyncio.to_thread(read_form, content, kind))
        unknown = served.unknown(asked.model)
        if unknown:
            return unknown
        work = await asyncio.to_thread(
            transcribing,
            service,
            Attached(asked.file, "file"),
            language=asked.language,
            prompt=asked.prompt,
            called=served.model,
        )
        options = {**work.options, "temperature": asked.temperature, **served.options(asked.model)}
        running = await Generations.begin(service, [(work.prompt, configs(options, 1, service.engine.features)[0])])
        return await answered(
            request,
            running,
            asked.stream,
            {},
            lambda: _events(running, work),
            lambda: _whole(running, work, plain=asked.plain),
            media_type="text/plain; charset=utf-8" if asked.plain else "application/json",
        )


async def _whole(running: Generations, work: Transcribing, *, plain: bool) -> bytes:
    deltas = [delta async for _, delta in running]
    for delta in deltas:
        work.push(delta)
    if plain:
        return f"{work.transcript.text}\n".encode()
    usage = _usage(work, deltas[-1])
    told = Transcription(text=work.transcript.text, language=work.transcript.language, usage=usage)
    return told.model_dump_json().encode()


async def _events(running: Generations, work: Transcribing) -> AsyncIterator[str]:
    async for _, delta in running:
        if piece := work.push(delta):
            yield sse({"type": "transcript.text.delta", "delta": piece})
        if delta.finish_reason is not None:
            usage = _usage(work, delta).model_dump()
            done = {"text": work.transcript.text, "language": work.transcript.language, "usage": usage}
            yield sse({"type": "transcript.text.done", **done})


def _usage(work: Transcribing, last: Delta) -> TranscriptUsage:
    return TranscriptUsage(
        input_tokens=last.prompt_tokens,
        input_token_details=InputDetails(
            audio_tokens=work.audio_tokens, text_tokens=last.prompt_tokens - work.audio_tokens
        ),
        output_tokens=last.completion_tokens,
        total_tokens=last.prompt_tokens + last.completion_tokens,
    )
