"""Transcriptions: a sound becomes a prompt of a model that is made for it, and the answer a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.engines.media import Sound
from qwen_onnx.runtime.processing.transcripts import Transcript, language_of, prefill
from qwen_onnx.runtime.service.generation import DEFAULT, Attached, ChatPrompt, Delta
from qwen_onnx.runtime.service.text import Prepared, TextService

# of an answer beside those that its sound has: nobody says more in a second than thirteen
SPARE_TOKENS = 64


@dataclass
class Transcribing:
    """A transcription that can begin.

    Attributes:
        prompt: give it to the service with ``options``, arguments of ``GenerationConfig``.
        transcript: reads the answer.
        where: what messages call the sound.
    """

    prompt: Prepared
    options: dict[str, Any]
    transcript: Transcript
    where: str

    @property
    def audio_tokens(self) -> int:
        """Of the prompt that stand for the sound."""
        return sum(medium.tokens for medium in self.prompt.media if isinstance(medium, Sound))

    def push(self, delta: Delta) -> str:
        """What of the text became certain with a piece of the answer.

        Raises:
            RequestError: the answer was cut: a text that merely ends would be taken for the whole.
        """
        piece = self.transcript.push(delta.text)
        if delta.finish_reason is None:
            return piece
        if delta.finish_reason == "length":
            most = self.options["max_new_tokens"]
            raise RequestError(
                f"the transcript is not finished after {most} tokens, the most for this sound",
                where=self.where,
                hint="send parts of it",
            )
        return piece + self.transcript.flush()


def transcribing(
    service: TextService, sound: Attached, *, language: str | None = None, prompt: str = "", called: str = "it"
) -> Transcribing:
    """The prompt for a sound. It is decoded and made a spectrogram: call in a thread.

    Args:
        language: code or name of what is spoken; None: the model says which it heard.
        prompt: words that may come, or what it is about: the model's system message.
        called: how messages name the model.

    Raises:
        RequestError, PromptTooLongError: the model makes no transcripts, or the sound, the language or the prompt is
            none that it takes.
    """
    if not service.transcribes:
        why = "it answers questions about sounds: POST /v1/chat/completions" if service.hears else "it hears no sounds"
        raise RequestError(f"the model {called!r} makes no transcripts; {why}", where="model")
    named = language_of(language, where="language") if language else None
    messages: list[dict[str, Any]] = [{"role": "system", "content": prompt}] if prompt else []
    messages.append({"role": "user", "content": [{"type": "audio", "audio_url": ""}]})
    chat = ChatPrompt(messages, sounds=[sound], prefill=prefill(named) if named else "")
    prepared = service.prepare(chat, DEFAULT)
    found = Transcribing(prepared, {}, Transcript(named), sound.where)
    most = min(found.audio_tokens + SPARE_TOKENS, service.room(prepared))
    if service.most_tokens is not None:
        most = min(most, service.most_tokens)
    found.options["max_new_tokens"] = most
    return found
