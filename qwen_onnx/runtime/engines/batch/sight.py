"""The parts of an artifact that see or hear: encoder and embedding, and a prompt with media on its way through them."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from qwen_onnx.artifact.audio_config import AudioSettings
from qwen_onnx.artifact.genai_config import GENAI_CONFIG, GenaiConfig
from qwen_onnx.errors import ArtifactError
from qwen_onnx.runtime.engines.batch.session import open_session
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.media import Medium, Picture, Positions, Sound, keys_of, places_of, positions_of

Floats = np.ndarray[Any, np.dtype[np.float32]]
Rewritten = Callable[[Path], bytes | None]
# of a graph's floating inputs and outputs, by ONNX Runtime's names
TYPES: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
# of encoded media that are kept: pictures of some megapixels each
KEPT_BYTES = 64 << 20


class Table:
    """``embedding.onnx`` of an artifact.

    Attributes:
        width: numbers that the decoder gets for a token: its embedding, and behind it what DeepStack adds.
        kind: type of features and embeddings, float32 or float16.
        unspoken: tokens that no answer has.

    Args:
        folder: of the artifact.
        threads: within an operator; None leaves it to onnxruntime.

    Raises:
        ArtifactError: it is missing, does not load, has other inputs than ``genai_config.json`` says, or another type.
    """

    def __init__(self, folder: Path, threads: int | None) -> None:
        model = GenaiConfig.read(folder).model
        found, self.unspoken = model.embedding, model.unspoken
        if found is None:
            raise _lacking(folder)
        self._embedding = found
        self._table = _session(folder / found.filename, threads, found.inputs.model_dump(exclude_none=True))
        self.width = _width(self._table.get_outputs()[0])
        self._place = found.inputs.image_features or found.inputs.audio_features or ""
        told = {entry.name: entry.type for entry in [*self._table.get_inputs(), *self._table.get_outputs()]}
        kinds = {told.get(self._place), told.get(found.outputs.inputs_embeds)}
        if len(kinds) > 1 or not kinds <= TYPES.keys():
            text = f"features and embeddings have the types {sorted(map(str, kinds))}, not one of {sorted(TYPES)}"
            raise ArtifactError(text, where=str(folder / found.filename), hint="get the artifact again, or build it")
        self.kind = TYPES[str(kinds.pop())]
        self._none = np.zeros((0, self.width), self.kind)

    def require(self, entry: Any, file: Path) -> None:
        """What an encoder gives, or a decoder takes, has the width and the type of this table.

        Raises:
            ArtifactError: it has not, as when one was built with DeepStack and the other without.
        """
        if _width(entry) and self.width and _width(entry) != self.width:
            told = f"{entry.name} has {_width(entry)} numbers a token, the embedding has {self.width}"
        elif TYPES.get(entry.type) != self.kind:
            told = f"{entry.name} is a {entry.type}, the embedding is in {np.dtype(self.kind).name}"
        else:
            return
        raise ArtifactError(told, where=str(file), hint="get the artifact again, or build it")

    def embed(self, tokens: np.ndarray[Any, Any], features: Floats | None = None) -> np.ndarray[Any, Any]:
        """Embeddings of ids [rows, tokens], [rows, tokens, width] of ``kind``; ``features`` are those of its media."""
        names = self._embedding
        given = {names.inputs.input_ids: tokens, self._place: self._none}
        if features is not None:
            given[self._place] = features.astype(self.kind, copy=False)
        (embedded,) = self._table.run([names.outputs.inputs_embeds], given)
        found: np.ndarray[Any, Any] = embedded
        return found


class Sense(Table):
    """An encoder beside it. Raises ArtifactError like ``Table``.

    Encoded media are kept: rows remember a prompt from its beginning alone, and not for requests with a seed, while
    a picture is the same wherever it stands. Nobody finds what another scope left. For one thread.

    Args:
        file: of the encoder, whose inputs and output ``genai_config.json`` names.
        token: that stands for a part of a medium.
        kept_bytes: of media that are kept; the one that was used last stays longest.
        rewritten: see ``open_session``, of the encoder.
    """

    def __init__(
        self,
        folder: Path,
        threads: int | None,
        file: str,
        inputs: dict[str, str],
        token: int,
        kept_bytes: int,
        rewritten: Rewritten | None,
    ) -> None:
        super().__init__(folder, threads)
        self.token, self._kept_bytes = token, kept_bytes
        self._kept: OrderedDict[tuple[str, str], Floats] = OrderedDict()
        self._encoder = _session(folder / file, threads, inputs, rewritten)
        self.require(self._encoder.get_outputs()[0], folder / file)

    @abstractmethod
    def encode(self, medium: Any) -> Floats:
        """Features of a medium, float32 [tokens, width]."""

    def known(self, medium: Medium, scope: str) -> Floats:
        """Those features, computed unless ``scope`` has left them here."""
        key = scope, medium.digest
        features = self._kept.pop(key, None)
        if features is None:
            features = self.encode(medium)
        if features.nbytes <= self._kept_bytes:
            self._kept[key] = features
        while sum(kept.nbytes for kept in self._kept.values()) > self._kept_bytes:
            self._kept.popitem(last=False)
        return features


class Sight(Sense):
    """``vision.onnx`` of an artifact; see ``Sense``."""

    def __init__(
        self, folder: Path, threads: int | None, *, kept_bytes: int = KEPT_BYTES, rewritten: Rewritten | None = None
    ) -> None:
        model = GenaiConfig.read(folder).model
        if model.vision is None or model.image_token_id is None:
            raise _lacking(folder)
        self._vision, inputs = model.vision, model.vision.inputs.model_dump()
        super().__init__(folder, threads, model.vision.filename, inputs, model.image_token_id, kept_bytes, rewritten)

    def encode(self, medium: Picture) -> Floats:
        """See ``Sense``."""
        names = self._vision.inputs
        given = {names.pixel_values: medium.pixels, names.image_grid_thw: np.array([medium.grid], np.int64)}
        (features,) = self._encoder.run([self._vision.outputs.image_features], given)
        return np.asarray(features, np.float32)


class Hearing(Sense):
    """``audio.onnx`` of an artifact; see ``Sense``."""

    def __init__(
        self, folder: Path, threads: int | None, *, kept_bytes: int = KEPT_BYTES, rewritten: Rewritten | None = None
    ) -> None:
        model = GenaiConfig.read(folder).model
        if model.speech is None or model.audio_token_id is None:
            raise _lacking(folder)
        self._speech, inputs = model.speech, model.speech.inputs.model_dump()
        super().__init__(folder, threads, model.speech.filename, inputs, model.audio_token_id, kept_bytes, rewritten)
        self._window = AudioSettings.read(folder).window

    def encode(self, medium: Sound) -> Floats:
        """See ``Sense``. Windows that do not hear each other are encoded one by one: memory does not grow with them."""
        window = self._window or medium.mel.shape[1]
        begins = range(0, medium.frames, window)
        parts = [
            self._part(medium.mel[:, begin : begin + window], min(window, medium.frames - begin)) for begin in begins
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _part(self, mel: Floats, frames: int) -> Floats:
        names = self._speech.inputs
        given = {names.audio_embeds: mel[None], names.audio_lengths: np.array([frames], np.int64)}
        (features,) = self._encoder.run([self._speech.outputs.audio_features], given)
        return np.asarray(features, np.float32)


def sense_of(folder: Path, threads: int | None) -> Sense:
    """Of an artifact whose decoder takes embeddings. Raises ArtifactError like ``Table``."""
    hears = GenaiConfig.read(folder).model.speech is not None
    return Hearing(folder, threads) if hears else Sight(folder, threads)


class Looked:
    """A prompt and its media, which are encoded when their tokens are due and not found in the prefix cache.

    Args:
        request: whose prompt it is.
        sense: None for a model that reads text alone.

    Raises:
        RequestError: see ``places_of``.
    """

    def __init__(self, request: TokenRequest, sense: Sense | None) -> None:
        self._media, self._sense, self._scope = request.media, sense, request.cache_scope
        self._begins = places_of(request.prompt_ids, request.media, None if sense is None else sense.token)
        self._features: dict[int, Floats] = {}
        self.keys = keys_of(request.prompt_ids, request.media, self._begins)
        self.moved = 0
        self._positions: Positions | None = None
        pictures = [medium for medium in request.media if isinstance(medium, Picture)]
        if pictures:
            self._positions, self.moved = positions_of(len(request.prompt_ids), pictures, self._begins)

    def positions(self, begin: int, end: int) -> Positions | None:
        """Of a piece of the prompt, int64 [3, 1, tokens]; None: those of text."""
        return None if self._positions is None else self._positions[:, None, begin:end]

    def features(self, begin: int, end: int) -> Floats | None:
        """Those of the media's tokens in a piece of the prompt, [tokens, width]; None when it has no such token."""
        parts = []
        for index, (medium, place) in enumerate(zip(self._media, self._begins, strict=True)):
            first, last = max(begin, place), min(end, place + medium.tokens)
            if first < last and self._sense is not None:
                if index not in self._features:
                    self._features[index] = self._sense.known(medium, self._scope)
                parts.append(self._features[index][first - place : last - place])
            if end >= place + medium.tokens:
                # read to its end
                self._features.pop(index, None)
        return np.concatenate(parts) if parts else None


def _width(entry: Any) -> int:
    """Of the last dimension of an input or an output; 0 where only a run tells."""
    size = entry.shape[-1] if entry.shape else 0
    return size if isinstance(size, int) else 0


def _lacking(folder: Path) -> ArtifactError:
    return ArtifactError(
        f"the decoder takes embeddings, and {GENAI_CONFIG} names nothing that makes them",
        where=str(folder),
        hint="get the artifact again, or build it",
    )


def _session(
    path: Path, threads: int | None, inputs: dict[str, str], rewritten: Rewritten | None = None
) -> ort.InferenceSession:
    session = open_session(path, threads, rewritten, called="it")
    if sorted(entry.name for entry in session.get_inputs()) != sorted(inputs.values()):
        raise ArtifactError(f"{GENAI_CONFIG} names other inputs than the graph has", where=str(path))
    return session
