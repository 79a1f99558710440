"""Pictures of a conversation: from the bytes that a client sent to room in the prompt and patches for the encoder."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.artifact.processor_config import ImageSettings
from qwen_onnx.errors import ArtifactError, EnvironmentFault, PromptTooLongError, RequestError
from qwen_onnx.runtime.engines.media import Picture
from qwen_onnx.runtime.service.generation import Attached

MOST_PICTURES = 16


class Eyes:
    """How a model that sees takes pictures.

    Args:
        token: that stands for a part of a picture; settings: how a picture becomes patches.
    """

    def __init__(self, token: int, settings: ImageSettings) -> None:
        self._token, self._settings = token, settings
        # the largest picture that is let in takes some hundred MB while it is decoded
        self._one_at_a_time = threading.Lock()

    @classmethod
    def of(cls, folder: Path) -> Eyes | None:
        """Of an artifact; None: it reads text alone.

        Raises:
            ArtifactError: it says how it sees, and not how pictures are prepared. EnvironmentFault: no Pillow.
        """
        model = GenaiConfig.read(folder, ArtifactError).model
        if model.vision is None or model.image_token_id is None:
            return None
        try:
            import PIL  # noqa: F401
        except ImportError as error:
            raise EnvironmentFault("Pillow is not installed", hint="pip install 'qwen-onnx[serve]'") from error
        return cls(model.image_token_id, ImageSettings.read(folder))

    def look(
        self, ids: Sequence[int], attached: Sequence[Attached], most_tokens: int
    ) -> tuple[list[int], tuple[Picture, ...]]:
        """The prompt with room for every token of its pictures, and these as the encoder takes them.

        Args:
            ids: of the rendered prompt, in which each picture has one token.
            most_tokens: of the context; whatever is more is refused before a picture is resized.

        Raises:
            RequestError: too many pictures, one that is not sound, other pictures than the prompt has places for.
            PromptTooLongError: they do not fit into the context.
        """
        from qwen_onnx.runtime.processing.images import decode_image, prepare, tokens_of

        if len(attached) > MOST_PICTURES:
            raise RequestError(f"{len(attached)} pictures, the most are {MOST_PICTURES}", where=attached[-1].where)
        places = sum(token == self._token for token in ids)
        if places != len(attached):
            raise RequestError(
                f"the chat template has places for {places} pictures, {len(attached)} were sent", where="messages"
            )
        pictures: list[Picture] = []
        room = most_tokens - (len(ids) - places)
        for one in attached:
            with self._one_at_a_time:
                image = decode_image(one.content, where=one.where)
                room -= tokens_of(image, self._settings, where=one.where)
                if room < 0:
                    raise PromptTooLongError(
                        f"text and {len(attached)} pictures exceed the context of {most_tokens} tokens",
                        where=one.where,
                        hint="send fewer or smaller pictures",
                    )
                pictures.append(prepare(image, self._settings, where=one.where))
                del image
        left = iter(pictures)
        found = [each for token in ids for each in ([token] * next(left).tokens if token == self._token else [token])]
        return found, tuple(pictures)
