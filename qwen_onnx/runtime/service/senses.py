"""Pictures and sounds of a conversation: from bytes that a client sent to ids of a prompt and an encoder's input."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from qwen_onnx.artifact.audio_config import AudioSettings
from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.artifact.processor_config import ImageSettings
from qwen_onnx.errors import ArtifactError, EnvironmentFault, PromptTooLongError, RequestError
from qwen_onnx.runtime.engines.media import Medium
from qwen_onnx.runtime.service.generation import Attached

MOST_PICTURES, MOST_SOUNDS = 16, 8


class Sense(ABC):
    """How a model that sees or hears takes what was attached.

    Attributes:
        kind: what that is, for messages; most: of them in a request.

    Args:
        token: that stands for a part of one.
    """

    kind: ClassVar[str]
    most: ClassVar[int]

    def __init__(self, token: int) -> None:
        self._token = token
        # the largest picture that is let in takes some hundred MB while it is decoded
        self._one_at_a_time = threading.Lock()

    @abstractmethod
    def _open(self, one: Attached) -> tuple[int, Callable[[], Medium]]:
        """How many tokens it takes, known before all work is done, and what does the rest."""

    def check(self, one: Attached) -> None:
        """RequestError for one that cannot be taken."""
        with self._one_at_a_time:
            self._open(one)

    def take(
        self, ids: Sequence[int], attached: Sequence[Attached], most_tokens: int
    ) -> tuple[list[int], tuple[Medium, ...]]:
        """The prompt with room for every token of its media, and these as the encoder takes them.

        Args:
            ids: of the rendered prompt, in which each medium has one token.
            most_tokens: of the context; whatever is more is refused before a picture is resized.

        Raises:
            RequestError: too many of them, one that is not sound, others than the prompt has places for.
            PromptTooLongError: they do not fit into the context.
        """
        if len(attached) > self.most:
            raise RequestError(f"{len(attached)} {self.kind}s, the most are {self.most}", where=attached[-1].where)
        places = sum(token == self._token for token in ids)
        if places != len(attached):
            raise RequestError(
                f"the chat template has places for {places} {self.kind}s, {len(attached)} were sent", where="messages"
            )
        media: list[Medium] = []
        room = most_tokens - (len(ids) - places)
        for one in attached:
            with self._one_at_a_time:
                tokens, prepare = self._open(one)
                room -= tokens
                if room < 0:
                    raise PromptTooLongError(
                        f"text and {len(attached)} {self.kind}s exceed the context of {most_tokens} tokens",
                        where=one.where,
                        hint=f"send fewer or smaller {self.kind}s",
                    )
                media.append(prepare())
                del prepare
        left = iter(media)
        found = [each for token in ids for each in ([token] * next(left).tokens if token == self._token else [token])]
        return found, tuple(media)


class Eyes(Sense):
    """Of a model that sees.

    Args:
        settings: how a picture becomes patches.

    Raises:
        EnvironmentFault: no Pillow.
    """

    kind, most = "picture", MOST_PICTURES

    def __init__(self, token: int, settings: ImageSettings) -> None:
        super().__init__(token)
        self._settings = settings
        try:
            import PIL  # noqa: F401
        except ImportError as error:
            raise EnvironmentFault("Pillow is not installed", hint="pip install 'qwen-onnx[serve]'") from error

    def _open(self, one: Attached) -> tuple[int, Callable[[], Medium]]:
        from qwen_onnx.runtime.processing.images import decode_image, prepare, tokens_of

        image = decode_image(one.content, where=one.where)
        tokens = tokens_of(image, self._settings, where=one.where)
        return tokens, lambda: prepare(image, self._settings, where=one.where)


class Ears(Sense):
    """Of a model that hears.

    Args:
        settings: how a sound becomes a spectrogram.

    Raises:
        EnvironmentFault: no soundfile.
    """

    kind, most = "sound", MOST_SOUNDS

    def __init__(self, token: int, settings: AudioSettings) -> None:
        from qwen_onnx.runtime.processing.audio import require_decoder

        super().__init__(token)
        self._settings = settings
        require_decoder()

    @property
    def longest(self) -> int:
        """Seconds of the longest sound that is heard."""
        return self._settings.chunk_length

    def _open(self, one: Attached) -> tuple[int, Callable[[], Medium]]:
        from qwen_onnx.runtime.processing.audio import decode_sound, prepare_sound

        samples = decode_sound(one.content, self._settings, where=one.where, declared=one.form)
        # its spectrogram costs less than decoding it did
        sound = prepare_sound(samples, self._settings)
        return sound.tokens, lambda: sound


def sense_of(folder: Path) -> Sense | None:
    """Of an artifact; None: it reads text alone.

    Raises:
        ArtifactError: it says how it sees or hears, and not how pictures or sounds are prepared.
        EnvironmentFault: what decodes them is missing.
    """
    model = GenaiConfig.read(folder, ArtifactError).model
    if model.vision is not None and model.image_token_id is not None:
        return Eyes(model.image_token_id, ImageSettings.read(folder))
    if model.speech is not None and model.audio_token_id is not None:
        return Ears(model.audio_token_id, AudioSettings.read(folder))
    return None
