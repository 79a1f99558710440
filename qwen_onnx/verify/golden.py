"""The teacher's answers in one small file: any device proves its artifact by it, without torch and the checkpoint.

``golden.npz`` is a plain archive of numpy arrays, one named ``about`` that holds JSON. For every predicted position it
keeps the ``TOP`` largest log-probabilities of PyTorch fp32, the mass of all other tokens together, and the
log-probability of the token that follows. The KLD on those ``TOP`` + 1 outcomes is a lower bound of the full one:
merging outcomes never adds to a divergence (the data-processing inequality). ``About.coarse`` and ``About.full`` say
how near it was for the artifact that the file was made beside.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from qwen_onnx.bounded import first_fault, read_bytes, read_object
from qwen_onnx.errors import ArtifactError
from qwen_onnx.records import Record, Sha256
from qwen_onnx.verify.scoring import Positions, compare, compared, require_logits
from qwen_onnx.verify.softmax import Columns, Floats, Logits, Softmax, by_pieces

GOLDEN = "golden.npz"
TOP = 192
MOST_BYTES = 64 << 20
MOST_ABOUT_BYTES = 4 << 20
MOST_HEADER_BYTES = 4096
HINT = "build the artifact again, or get the package again from where it came"
# of each array: its type; its shape follows from the first
ARRAYS: dict[str, str] = {
    "about": "|u1",
    "ids": "<i4",
    "top_ids": "<i4",
    "top_logp": "<f4",
    "rest_logp": "<f4",
    "next_logp": "<f4",
}


class Stretch(Record):
    """One text that the teacher read: ``tokens`` ids, of which it predicted all but the first.

    Attributes:
        domain: what kind of text.
        prompt: tokens at its beginning that a continuation continues; 0 for a text.
    """

    domain: str
    source: str
    tokens: int = Field(ge=2)
    prompt: int = Field(default=0, ge=0)


class Encoded(Record):
    """A text and the token ids that the checkpoint's tokenizer gives it."""

    text: str
    ids: tuple[int, ...]


class Rendered(Record):
    """A conversation and what the checkpoint's chat template makes of it."""

    messages: tuple[dict[str, str], ...]
    text: str


class About(Record):
    """What a golden file was made of.

    Attributes:
        model: the plan's name of the model.
        weights: digest of the checkpoint's files of weights, see ``sources.fetch.weights_digest``.
        vocabulary: columns of the teacher's logits.
        stretches: the texts, in the order of the arrays.
        texts: for the tokenizer; ``conversations``: for the chat template.
        coarse: mean KLD, in nats, of the artifact beside it on the coarse outcomes; ``full`` on all of them.
    """

    schema_version: Literal[1] = 1
    model: str
    weights: Sha256
    vocabulary: int = Field(ge=2)
    stretches: tuple[Stretch, ...] = Field(min_length=1)
    texts: tuple[Encoded, ...] = ()
    conversations: tuple[Rendered, ...] = ()
    coarse: float | None = None
    full: float | None = None


@dataclass(frozen=True)
class Kept:
    """The teacher's answers on one text of ``len(ids)`` tokens.

    ``top_ids`` and ``top_logp`` are [tokens - 1, TOP], sorted by falling probability; ``rest_logp``, the logarithm of
    the mass of all other tokens, and ``next_logp`` are [tokens - 1]. Logarithms are natural.
    """

    ids: npt.NDArray[np.int32]
    top_ids: npt.NDArray[np.int32]
    top_logp: npt.NDArray[np.float32]
    rest_logp: npt.NDArray[np.float32]
    next_logp: npt.NDArray[np.float32]


def kept(logits: Logits, ids: Sequence[int], threads: int = 1) -> Kept:
    """What is kept of the teacher's logits [tokens, vocabulary] for ``ids``; ``threads`` share the positions."""
    told = np.asarray(ids, np.int32)
    columns = by_pieces(
        lambda rows: _kept_rows(Softmax(logits[rows]), told[1:][rows]), len(ids) - 1, logits.shape[-1], threads
    )
    return Kept(told, *columns)


def _kept_rows(teacher: Softmax, following: npt.NDArray[np.int32]) -> list[npt.NDArray[Any]]:
    """The columns of ``Kept`` but the first."""
    top = teacher.largest(min(TOP, teacher.logits.shape[-1] - 1))
    return [
        top.astype(np.int32),
        teacher.logp(top).astype(np.float32),
        # no mass left: a finite number whose exponential is zero
        np.maximum(teacher.log_rest(top), -1e4).astype(np.float32),
        teacher.logp(following[:, None])[:, 0].astype(np.float32),
    ]


def compare_coarse(teacher: Kept, candidate: Logits, threads: int = 1) -> Positions:
    """Statistics of ``candidate`` [tokens, vocabulary] on the outcomes that the teacher's file keeps.

    ``kld`` is a lower bound of the full one; ``diff`` is the largest difference of the kept log-probabilities.
    """
    if len(candidate) != len(teacher.ids):
        raise ArtifactError(f"logits for {len(candidate)} positions, the golden file has {len(teacher.ids)} tokens")
    columns = (teacher.top_ids, teacher.top_logp, teacher.rest_logp, teacher.next_logp)

    def piece(rows: slice) -> list[Floats]:
        return _coarse_rows([column[rows] for column in columns], Softmax(candidate[rows]), teacher.ids[1:][rows])

    return Positions(*by_pieces(piece, len(teacher.ids) - 1, candidate.shape[-1], threads))


def _coarse_rows(kept_rows: Columns, candidate: Softmax, following: npt.NDArray[np.int32]) -> list[Floats]:
    top, top_logp, rest_logp, next_logp = kept_rows
    p, p_rest = top_logp.astype(np.float64), rest_logp.astype(np.float64)
    q, q_rest = candidate.logp(top), candidate.log_rest(top)
    kld = (np.exp(p) * (p - q)).sum(-1)
    mass = np.exp(p_rest)
    # 0 · log 0 is 0: where the teacher leaves nothing, the candidate may
    kld += np.where(mass > 0, mass * (p_rest - q_rest), 0.0)
    agree = (candidate.first == top[:, 0]).astype(np.float64)
    nll = -candidate.logp(following[:, None])[:, 0]
    return [kld, agree, -next_logp.astype(np.float64), nll, np.abs(p - q).max(-1)]


def compare_and_keep(
    baseline: Logits, candidate: Logits, ids: Sequence[int], threads: int
) -> tuple[Positions, Kept, Positions]:
    """``compare``, ``kept`` of the baseline and ``compare_coarse`` of both, which share their sums."""
    width = baseline.shape[-1]
    if candidate.shape[-1] != width:
        part = kept(baseline, ids, threads)
        return compare(baseline, candidate, ids, threads), part, compare_coarse(part, candidate, threads)
    require_logits(len(baseline), len(candidate), len(ids))
    told = np.asarray(ids, np.int32)

    def piece(rows: slice) -> list[npt.NDArray[Any]]:
        p, q, following = Softmax(baseline[rows]), Softmax(candidate[rows]), told[1:][rows]
        full, part = compared(p, q, following), _kept_rows(p, following)
        return [*full, *part, *_coarse_rows(part, q, following)]

    columns = by_pieces(piece, len(ids) - 1, width, threads)
    return Positions(*columns[:5]), Kept(told, *columns[5:9]), Positions(*columns[9:])


@dataclass(frozen=True)
class Golden:
    """A golden file: ``about``, and the answers on each of its stretches."""

    about: About
    parts: tuple[Kept, ...]

    def __iter__(self) -> Iterator[tuple[Stretch, Kept]]:
        return zip(self.about.stretches, self.parts, strict=True)

    def save(self, folder: Path) -> Path:
        """Write ``golden.npz``; equal content gives equal bytes."""
        told = np.frombuffer(self.about.model_dump_json().encode(), np.uint8)
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in self.parts]).astype(kind)
            for name, kind in ARRAYS.items()
            if name != "about"
        }
        path = folder / GOLDEN
        np.savez_compressed(path, about=told, **arrays)
        return path

    @classmethod
    def read(cls, path: Path) -> Golden:
        """A golden file, a stranger's too.

        Raises:
            ArtifactError: it is missing, too large, or not one of ours.
        """
        arrays = _arrays(read_bytes(path, most_bytes=MOST_BYTES, error=ArtifactError, hint=HINT), path)
        told = arrays.pop("about").tobytes()
        read_object(told, most_bytes=MOST_ABOUT_BYTES, error=ArtifactError, what=GOLDEN, hint=HINT)
        try:
            about = About.model_validate_json(told)
        except ValidationError as error:
            raise _damaged(path, first_fault(error)) from error
        return cls(about, tuple(_split(about, arrays, path)))


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{GOLDEN} is damaged: {why}", where=str(path), hint=HINT)


def _arrays(content: bytes, path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of the archive, none of which is larger than the archive may be."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = {f"{name}.npy" for name in ARRAYS}
            if sorted(archive.namelist()) != sorted(names):
                raise _damaged(path, f"it holds {', '.join(archive.namelist()[:8])}")
            if sum(info.file_size for info in archive.infolist()) > MOST_BYTES:
                raise _damaged(path, f"it unpacks to more than {MOST_BYTES:,} bytes")
            return {name: _array(archive, name, kind, path) for name, kind in ARRAYS.items()}
    # RuntimeError: encrypted, or a compression that zipfile lacks
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, RuntimeError) as error:
        raise _damaged(path, str(error)) from error


def _array(archive: zipfile.ZipFile, name: str, kind: str, path: Path) -> npt.NDArray[Any]:
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        # read to the size that was added up: what unpacks to more is cut off, and does not match its header
        content = io.BytesIO(file.read(info.file_size))
    version = np.lib.format.read_magic(content)
    if version != (1, 0):
        raise _damaged(path, f"{name} is of another format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(content, max_header_size=MOST_HEADER_BYTES)
    body = content.read()
    if dtype.str != kind or fortran or len(shape) != (2 if name.startswith("top_") else 1):
        raise _damaged(path, f"{name} has another type or shape")
    if any(size < 0 for size in shape) or int(np.prod([*shape, dtype.itemsize], dtype=object)) != len(body):
        raise _damaged(path, f"{name} has another size than it says")
    return np.frombuffer(body, dtype).reshape(shape)


def _split(about: About, arrays: dict[str, npt.NDArray[Any]], path: Path) -> Iterator[Kept]:
    """The answers on each stretch; every number is what it may be."""
    tokens = sum(stretch.tokens for stretch in about.stretches)
    positions = tokens - len(about.stretches)
    width = arrays["top_ids"].shape[1]
    if not 1 <= width < about.vocabulary:
        raise _damaged(path, f"it keeps {width} of {about.vocabulary} tokens")
    expected = {"ids": (tokens,), "top_ids": (positions, width), "top_logp": (positions, width)}
    for name, array in arrays.items():
        if array.shape != expected.get(name, (positions,)):
            raise _damaged(path, f"{name} does not have a row for each position")
        if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array <= 1e-3).all()):
            raise _damaged(path, f"{name} holds what is not a logarithm of a probability")
        if array.dtype.kind == "i" and not ((array >= 0) & (array < about.vocabulary)).all():
            raise _damaged(path, f"{name} holds a token outside the vocabulary")
    start = first = 0
    for stretch in about.stretches:
        rows = slice(first, first + stretch.tokens - 1)
        yield Kept(
            arrays["ids"][start : start + stretch.tokens],
            *(arrays[name][rows] for name in ("top_ids", "top_logp", "rest_logp", "next_logp")),
        )
        start, first = start + stretch.tokens, rows.stop
