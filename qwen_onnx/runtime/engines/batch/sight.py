"""The parts of an artifact that see: encoder and embedding, and a prompt with pictures on its way through them."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from qwen_onnx.artifact.genai_config import GENAI_CONFIG, GenaiConfig
from qwen_onnx.errors import ArtifactError
from qwen_onnx.runtime.engines.batch.session import open_session
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.media import Picture, Positions, keys_of, places_of, positions_of

Floats = np.ndarray[Any, np.dtype[np.float32]]
# of encoded pictures that are kept: those of some megapixels each
KEPT_BYTES = 64 << 20


class Table:
    """``embedding.onnx`` of an artifact.

    Attributes:
        width: numbers that the decoder gets for a token: its embedding, and behind it what DeepStack adds.

    Args:
        folder: of the artifact.
        threads: within an operator; None leaves it to onnxruntime.

    Raises:
        ArtifactError: it is missing, does not load, or has other inputs than ``genai_config.json`` says.
    """

    def __init__(self, folder: Path, threads: int | None) -> None:
        found = GenaiConfig.read(folder).model.embedding
        if found is None:
            raise _lacking(folder)
        self._embedding = found
        self._table = _session(folder / found.filename, threads, found.inputs.model_dump())
        self.width = _width(self._table.get_outputs()[0])
        self._none: Floats = np.zeros((0, self.width), np.float32)

    def embed(self, tokens: np.ndarray[Any, Any], features: Floats | None = None) -> Floats:
        """Embeddings of ids [rows, tokens], float32 [rows, tokens, width]; ``features`` are those of its pictures."""
        names = self._embedding.inputs
        given = {names.input_ids: tokens, names.image_features: self._none if features is None else features}
        (embedded,) = self._table.run([self._embedding.outputs.inputs_embeds], given)
        return np.asarray(embedded, np.float32)


class Sight(Table):
    """``vision.onnx`` beside it. Raises ArtifactError like ``Table``.

    Encoded pictures are kept: rows remember a prompt from its beginning alone, and not for requests with a seed, while
    a picture is the same wherever it stands. Nobody finds what another scope left. For one thread.

    Args:
        kept_bytes: of pictures that are kept; the one that was used last stays longest.
    """

    def __init__(self, folder: Path, threads: int | None, *, kept_bytes: int = KEPT_BYTES) -> None:
        super().__init__(folder, threads)
        self._kept: OrderedDict[tuple[str, str], Floats] = OrderedDict()
        self._kept_bytes = kept_bytes
        model = GenaiConfig.read(folder).model
        if model.vision is None or model.image_token_id is None:
            raise _lacking(folder)
        self.token, self._vision = model.image_token_id, model.vision
        self._encoder = _session(folder / model.vision.filename, threads, model.vision.inputs.model_dump())
        require_width(self._encoder.get_outputs()[0], self.width, folder / model.vision.filename)

    def encode(self, picture: Picture) -> Floats:
        """Features of a picture, float32 [tokens, width]."""
        names = self._vision.inputs
        given = {names.pixel_values: picture.pixels, names.image_grid_thw: np.array([picture.grid], np.int64)}
        (features,) = self._encoder.run([self._vision.outputs.image_features], given)
        return np.asarray(features, np.float32)

    def seen(self, picture: Picture, scope: str) -> Floats:
        """Those features, computed unless ``scope`` has left them here."""
        key = scope, picture.digest
        features = self._kept.pop(key, None)
        if features is None:
            features = self.encode(picture)
        if features.nbytes <= self._kept_bytes:
            self._kept[key] = features
        while sum(kept.nbytes for kept in self._kept.values()) > self._kept_bytes:
            self._kept.popitem(last=False)
        return features


class Looked:
    """A prompt and its pictures, which are looked at when their tokens are due and not found in the prefix cache.

    Args:
        request: whose prompt it is.
        sight: None for a model that reads text alone.

    Raises:
        RequestError: see ``places_of``.
    """

    def __init__(self, request: TokenRequest, sight: Sight | None) -> None:
        self._pictures, self._sight, self._scope = request.pictures, sight, request.cache_scope
        self._begins = places_of(request.prompt_ids, request.pictures, None if sight is None else sight.token)
        self._features: dict[int, Floats] = {}
        self.keys = keys_of(request.prompt_ids, request.pictures, self._begins)
        self.moved = 0
        self._positions: Positions | None = None
        if request.pictures:
            self._positions, self.moved = positions_of(len(request.prompt_ids), request.pictures, self._begins)

    def positions(self, begin: int, end: int) -> Positions | None:
        """Of a piece of the prompt, int64 [3, 1, tokens]; None: those of text."""
        return None if self._positions is None else self._positions[:, None, begin:end]

    def features(self, begin: int, end: int) -> Floats | None:
        """Those of the pictures' tokens in a piece of the prompt, [tokens, width]; None when it has no such token."""
        parts = []
        for index, (picture, place) in enumerate(zip(self._pictures, self._begins, strict=True)):
            first, last = max(begin, place), min(end, place + picture.tokens)
            if first < last and self._sight is not None:
                if index not in self._features:
                    self._features[index] = self._sight.seen(picture, self._scope)
                parts.append(self._features[index][first - place : last - place])
            if end >= place + picture.tokens:
                # read to its end
                self._features.pop(index, None)
        return np.concatenate(parts) if parts else None


def _width(entry: Any) -> int:
    """Of the last dimension of an input or an output; 0 where only a run tells."""
    size = entry.shape[-1] if entry.shape else 0
    return size if isinstance(size, int) else 0


def require_width(entry: Any, width: int, file: Path) -> None:
    """What one graph of a model that sees hands to another has the width that the other expects.

    Raises:
        ArtifactError: it has not, as when one was built with DeepStack and the other without.
    """
    if _width(entry) and width and _width(entry) != width:
        raise ArtifactError(
            f"{entry.name} has {_width(entry)} numbers a token, the embedding has {width}",
            where=str(file),
            hint="get the artifact again, or build it",
        )


def _lacking(folder: Path) -> ArtifactError:
    return ArtifactError(
        f"the decoder takes embeddings, and {GENAI_CONFIG} names nothing that makes them",
        where=str(folder),
        hint="get the artifact again, or build it",
    )


def _session(path: Path, threads: int | None, inputs: dict[str, str]) -> ort.InferenceSession:
    session = open_session(path, threads, called="it")
    if sorted(entry.name for entry in session.get_inputs()) != sorted(inputs.values()):
        raise ArtifactError(f"{GENAI_CONFIG} names other inputs than the graph has", where=str(path))
    return session
