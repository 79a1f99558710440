"""Pictures and sounds of a conversation: from bytes that a client sent to ids of a prompt and an encoder's input."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qwen_onnx.artifact.audio_config import TRANSCRIBES, AudioSettings
from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.artifact.processor_config import ImageSettings
from qwen_onnx.artifact.video_config import VIDEO_CONFIG, VideoSettings
from qwen_onnx.errors import ArtifactError, EnvironmentFault, PromptTooLongError, RequestError
from qwen_onnx.runtime.engines.media import Medium, Picture, places_of, positions_of
from qwen_onnx.runtime.service.films import Films, Media, Place, require_places
from qwen_onnx.runtime.service.generation import Attached, AttachedVideo

if TYPE_CHECKING:
    from qwen_onnx.runtime.processing.clips import Clip

MOST_PICTURES, MOST_SOUNDS, MOST_VIDEOS = 16, 8, 4


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

    def check(self, one: Attached | AttachedVideo) -> None:
        """RequestError for one that cannot be taken."""
        if isinstance(one, AttachedVideo):
            raise RequestError("this model watches no videos", where=one.where)
        with self._one_at_a_time:
            self._open(one)

    def take(self, ids: Sequence[int], attached: Sequence[Attached], most_tokens: int) -> tuple[list[int], Media]:
        """The prompt with room for every token of its media, and these as the encoder takes them.

        Args:
            ids: of the rendered prompt, in which each medium has one token.
            most_tokens: of the context; whatever is more is refused before a picture is resized.

        Raises:
            RequestError: too many of them, one that is not sound, others than the prompt has places for.
            PromptTooLongError: they do not fit into the context.
        """
        places = {self._token: self._places(ids, attached)}
        return self._filled(ids, places, most_tokens, f"{len(attached)} {self.kind}s")

    def _places(self, ids: Sequence[int], attached: Sequence[Attached]) -> list[Place]:
        if len(attached) > self.most:
            raise RequestError(f"{len(attached)} {self.kind}s, the most are {self.most}", where=attached[-1].where)
        require_places(ids, self._token, len(attached), f"{self.kind}s")

        def opened(one: Attached) -> tuple[int, Callable[[], Media]]:
            tokens, prepare = self._open(one)
            return tokens, lambda: (prepare(),)

        return [Place(one.where, partial(opened, one)) for one in attached]

    def _filled(
        self, ids: Sequence[int], places: Mapping[int, Sequence[Place]], most_tokens: int, told: str
    ) -> tuple[list[int], Media]:
        """See ``take``.

        Args:
            places: by the tokens that have them in ``ids``, as many as there are.
            told: what they are, for messages.
        """
        room = most_tokens - (len(ids) - sum(map(len, places.values())))
        left = {token: iter(those) for token, those in places.items()}
        found: list[int] = []
        media: list[Medium] = []
        for token in ids:
            if token not in left:
                found.append(token)
                continue
            place = next(left[token])
            with self._one_at_a_time:
                tokens, prepare = place.open()
                room -= tokens
                if room < 0:
                    raise PromptTooLongError(
                        f"text and {told} exceed the context of {most_tokens} tokens",
                        where=place.where,
                        hint=f"send fewer or smaller {self.kind}s",
                    )
                prepared = prepare()
                del prepare
            media += prepared
            found += [self._token] * sum(medium.tokens for medium in prepared)
        return found, tuple(media)


class Eyes(Sense):
    """Of a model that sees.

    Args:
        settings: how a picture becomes patches.
        films: how it takes videos; None: it takes none.

    Raises:
        EnvironmentFault: no Pillow.
    """

    kind, most = "picture", MOST_PICTURES

    def __init__(self, token: int, settings: ImageSettings, films: Films | None = None) -> None:
        super().__init__(token)
        self._settings, self._films = settings, films
        try:
            import PIL  # noqa: F401
        except ImportError as error:
            raise EnvironmentFault("Pillow is not installed", hint="pip install 'qwen-onnx[serve]'") from error

    def _open(self, one: Attached) -> tuple[int, Callable[[], Medium]]:
        from qwen_onnx.runtime.processing.images import decode_image, prepare, tokens_of

        image = decode_image(one.content, where=one.where)
        tokens = tokens_of(image, self._settings, where=one.where)
        return tokens, lambda: prepare(image, self._settings, where=one.where)

    @property
    def watches(self) -> bool:
        """Whether it takes videos."""
        return self._films is not None

    def check(self, one: Attached | AttachedVideo) -> None:
        """See ``Sense``."""
        if not isinstance(one, AttachedVideo):
            return super().check(one)
        (clip,) = self.open_videos([one])
        with self._one_at_a_time:
            for _ in clip.frames():
                pass
        return None

    def open_videos(self, videos: Sequence[AttachedVideo]) -> list[Clip]:
        """What the videos of a request are, of which no frame is decoded.

        Raises:
            RequestError: too many of them, one that cannot be taken, or an artifact that does not say how.
        """
        from qwen_onnx.runtime.processing.clips import open_clip

        if videos and self._films is None:
            raise RequestError(
                f"this artifact was built before videos were read, it has no {VIDEO_CONFIG}: build it again "
                "with qwen-onnx optimize",
                where=videos[0].where,
            )
        if len(videos) > MOST_VIDEOS:
            raise RequestError(f"{len(videos)} videos, the most are {MOST_VIDEOS}", where=videos[-1].where)
        return [open_clip(one.content, one.fps, where=one.where) for one in videos]

    def announced(self, rendered: str, clips: Sequence[Clip], special: Mapping[str, int]) -> str:
        """What the template made, with all that stands in a prompt beside a video; ``special``: tokens by text."""
        return self._films.announced(rendered, clips, special) if self._films and clips else rendered

    def take_all(
        self, ids: Sequence[int], attached: Sequence[Attached], clips: Sequence[Clip], most_tokens: int
    ) -> tuple[list[int], Media]:
        """See ``take``; with videos, whose places in ``ids`` are those that ``announced`` made."""
        places = {self._token: self._places(ids, attached)}
        if self._films:
            places[self._films.token] = self._films.places(ids, clips)
        sent = [f"{len(attached)} pictures"] if attached or not clips else []
        sent += [f"{len(clips)} videos"] if clips else []
        found, media = self._filled(ids, places, most_tokens, " and ".join(sent))
        self._require_in_time(found, media, clips, most_tokens)
        return found, media

    def _require_in_time(self, ids: list[int], media: Media, clips: Sequence[Clip], most: int) -> None:
        """A decoder has angles for the positions of its context alone, and seconds may go beyond them."""
        pictures = [one for one in media if isinstance(one, Picture)]
        if not clips:
            return
        positions, _ = positions_of(len(ids), pictures, places_of(ids, media, self._token))
        if (latest := int(positions.max())) >= most:
            raise PromptTooLongError(
                f"the videos reach position {latest:,} in time, the context has {most:,}",
                where=clips[-1].where,
                hint="send a shorter one, or more frames a second",
            )


class Ears(Sense):
    """Of a model that hears.

    Args:
        settings: how a sound becomes a spectrogram.
        transcribes: whether the model is made to write down what is said.

    Raises:
        EnvironmentFault: no soundfile.
    """

    kind, most = "sound", MOST_SOUNDS

    def __init__(self, token: int, settings: AudioSettings, *, transcribes: bool) -> None:
        from qwen_onnx.runtime.processing.audio import require_decoder

        super().__init__(token)
        self._settings, self.transcribes = settings, transcribes
        require_decoder()

    @property
    def longest(self) -> int:
        """Seconds of the longest sound that is heard."""
        return self._settings.chunk_length

    def _open(self, one: Attached) -> tuple[int, Callable[[], Medium]]:
        from qwen_onnx.runtime.processing.audio import decode_sound, prepare_sound

        samples = decode_sound(one.content, self._settings, where=one.where, declared=one.form)
        tokens = self._settings.tokens_of(self._settings.frames_of(len(samples)))
        return tokens, lambda: prepare_sound(samples, self._settings)


def sense_of(folder: Path) -> Sense | None:
    """Of an artifact; None: it reads text alone.

    Raises:
        ArtifactError: it says how it sees or hears, and not how pictures or sounds are prepared.
        EnvironmentFault: what decodes them is missing.
    """
    model = GenaiConfig.read(folder, ArtifactError).model
    if model.vision is not None and model.image_token_id is not None:
        settings, videos = ImageSettings.read(folder), VideoSettings.read(folder)
        films = None
        if videos and model.video_token_id is not None and model.vision_start_token_id is not None:
            films = Films(model.video_token_id, model.vision_start_token_id, videos, settings)
        return Eyes(model.image_token_id, settings, films)
    if model.speech is not None and model.audio_token_id is not None:
        heard = AudioSettings.read(folder)
        return Ears(model.audio_token_id, heard, transcribes=model.type == TRANSCRIBES)
    return None
