"""Parts of what a user says: text, pictures, sounds and videos."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.server.api.protocol import FIRST_FAULT, NO_CHANGE, Strict
from qwen_onnx.runtime.server.api.shown import Filmed


class TextPart(Strict):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """A picture: ``url`` is a data URI in base64, or of a host that is fetched from."""

    url: str
    detail: Literal["auto", "low", "high"] | None = Field(default=None, description=NO_CHANGE)


class ImagePart(Strict):
    """A picture in what the user says."""

    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(Strict):
    """A sound: ``data`` is a file in base64, of the format that ``format`` says."""

    data: str
    # any other is refused beside the sound's own, naming the part
    format: Annotated[str, Field(max_length=16, description="wav, mp3 or flac.")]


class AudioPart(Strict):
    """A sound in what the user says."""

    type: Literal["input_audio"]
    input_audio: InputAudio


class VideoPart(Strict):
    """A video in what the user says, as Qwen's API has it: a data URI in base64 of a picture for each frame."""

    type: Literal["video"]
    video: Annotated[list[str], FIRST_FAULT]
    fps: float | None = Field(default=None, description="Frames a second. Absent: 2.")
    sample_fps: float | None = Field(default=None, description="The name of fps in Qwen's tools.")

    def filmed(self, where: str) -> Filmed:
        """RequestError: fps and sample_fps differ."""
        if None not in (self.fps, self.sample_fps) and self.fps != self.sample_fps:
            raise RequestError("fps and sample_fps differ", where=f"{where}.sample_fps")
        return Filmed(self.video, f"{where}.video", self.sample_fps if self.fps is None else self.fps)


class VideoUrl(Strict):
    """``url`` is a data URI in base64 of an animated GIF, APNG or WebP."""

    url: str


class VideoUrlPart(Strict):
    """A video in what the user says, as vLLM has it: one file, all frames of which are seen."""

    type: Literal["video_url"]
    video_url: VideoUrl

    def filmed(self, where: str) -> Filmed:
        """Where it is."""
        return Filmed(self.video_url.url, f"{where}.video_url")


UserPart = TextPart | ImagePart | AudioPart | VideoPart | VideoUrlPart
# what stands for them in what the chat template is told, which looks for one or the other key
STANDS_FOR = {
    "image_url": {"type": "image"},
    "input_audio": {"type": "audio", "audio_url": ""},
    "video": {"type": "video"},
    "video_url": {"type": "video"},
}
