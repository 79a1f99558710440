"""Logits of an ONNX folder at all positions at once, and what they differ by from others."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.bounded import read_json
from qwen_onnx.errors import VerificationError
from qwen_onnx.runtime.engines.batch.model import EMBEDDED
from qwen_onnx.runtime.engines.batch.sight import Table
from qwen_onnx.runtime.engines.genai import UNPACK_QDQ
from qwen_onnx.verify.graph import Graph
from qwen_onnx.verify.softmax import Floats, Logits, Softmax, by_pieces

CPU = "CPUExecutionProvider"
MOST_PROFILE_BYTES, MOST_PROFILE_VALUES = 256 << 20, 20_000_000
STATES = ("past_key_values.", "past.")


@dataclass(frozen=True)
class Positions:
    """Statistics per predicted token, each array of shape [positions].

    ``kld`` in nats, KL(baseline ‖ candidate); ``agree`` 1.0 where both rank the same token first;
    ``nll_*`` in nats of the token that follows; ``diff`` the largest absolute difference of logits.
    """

    kld: Floats
    agree: Floats
    nll_baseline: Floats
    nll_candidate: Floats
    diff: Floats

    @property
    def finite(self) -> bool:
        """False when any logit behind these figures was NaN or infinite."""
        return all(bool(np.isfinite(array).all()) for array in vars(self).values())

    @classmethod
    def join(cls, parts: Sequence[Positions]) -> Positions:
        """All positions of ``parts`` in order."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


def compared(p: Softmax, q: Softmax, following: npt.NDArray[np.integer[Any]]) -> list[Floats]:
    """The columns of ``Positions`` at some positions: baseline ``p``, candidate ``q`` of the same vocabulary.

    Args:
        following: the token after each position.
    """
    rows = np.arange(len(following))
    apart = p.logits.astype(np.float64)
    apart -= q.logits
    diff = np.abs(apart, out=apart).max(axis=-1)
    agree = (p.first == q.first).astype(np.float64)
    np.subtract(p.shifted, q.shifted, out=apart)
    apart *= p.weights
    kld = apart.sum(axis=-1) / p.total - p.log_total + q.log_total
    return [kld, agree, p.log_total - p.shifted[rows, following], q.log_total - q.shifted[rows, following], diff]


def compare(baseline: Logits, candidate: Logits, ids: Sequence[int], threads: int = 1) -> Positions:
    """Statistics of ``candidate`` against ``baseline``.

    Args:
        baseline: logits of shape [tokens, vocabulary].
        candidate: the same shape; columns beyond the smaller vocabulary are padding and dropped.
        ids: the tokens that both were given.
        threads: that share the positions.

    Returns:
        ``len(ids) - 1`` positions: the last one has no token that follows.
    """
    require_logits(len(baseline), len(candidate), len(ids))
    width = min(baseline.shape[-1], candidate.shape[-1])
    following = np.asarray(ids[1:], dtype=np.int64)

    def piece(rows: slice) -> list[Floats]:
        return compared(Softmax(baseline[rows, :width]), Softmax(candidate[rows, :width]), following[rows])

    return Positions(*by_pieces(piece, len(following), width, threads))


def require_logits(baseline: int, candidate: int, tokens: int) -> None:
    """Both sides have logits for every token.

    Raises:
        VerificationError: one has not.
    """
    if {baseline, candidate} != {tokens}:
        raise VerificationError(f"Logits for {baseline} and {candidate} positions, {tokens} tokens given.")


_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


class Session:
    """A graph, or a slice of one, that starts every run with empty states.

    States are the KV cache and, with linear attention, those of the convolution and of the recurrence.

    Args:
        session: of ONNX Runtime.
        folder: of the artifact.
        sizes: of dimensions that have names.
    """

    def __init__(self, session: Any, folder: Path, sizes: dict[str, int]) -> None:
        self._session, self.folder, self._sizes = session, folder, sizes
        self._table: Table | None = None

    def run(
        self, outputs: Sequence[str], ids: Sequence[int], given: Mapping[str, npt.NDArray[Any]], past: int = 0
    ) -> list[npt.NDArray[Any]]:
        """Values of ``outputs`` for one text.

        Args:
            given: inputs that other slices made, and states that are not empty.
            past: tokens before ``ids`` that the states hold.

        Raises:
            VerificationError: it does not run, or wants an input that no Qwen has.
        """
        try:
            found: list[npt.NDArray[Any]] = self._session.run(
                list(outputs), self._feeds(np.asarray([ids]), given, past)
            )
        except _faults() as error:
            raise VerificationError(f"The model does not run: {error}", where=str(self.folder)) from error
        return found

    def end_profile(self) -> str:
        """Name of the profile's file."""
        return str(self._session.end_profiling())

    def _feeds(
        self, ids: npt.NDArray[np.int64], given: Mapping[str, npt.NDArray[Any]], past: int
    ) -> dict[str, npt.NDArray[Any]]:
        end = past + ids.shape[1]
        known = {"input_ids": ids, "attention_mask": np.ones((1, end)), "position_ids": np.arange(past, end)}
        feeds = {}
        for spec in self._session.get_inputs():
            if spec.name in given:
                value = given[spec.name]
                # embeddings in fp16 for a graph that was widened to fp32
                feeds[spec.name] = value.astype(_DTYPES.get(spec.type, value.dtype), copy=False)
                continue
            if spec.name == EMBEDDED:
                # of a model that sees: another graph makes them
                self._table = self._table or Table(self.folder, 1)
                value = self._table.embed(ids)
            elif spec.name.startswith(STATES):
                value = np.zeros([self._size(size, spec.name) for size in spec.shape])
            elif spec.name in known:
                # multimodal RoPE has three axes of positions, equal for text
                value = np.broadcast_to(known[spec.name], (*spec.shape[:-2], 1, known[spec.name].shape[-1]))
            else:
                raise VerificationError(
                    f"The model wants an input that no Qwen has: {spec.name}", where=str(self.folder)
                )
            feeds[spec.name] = value.astype(_DTYPES[spec.type])
        return feeds

    def _size(self, size: int | str, name: str) -> int:
        """Of one dimension of a state before the first token."""
        if isinstance(size, int):
            return size
        if size not in self._sizes:
            raise VerificationError(f"The state {name} has an unknown dimension: {size}", where=str(self.folder))
        return self._sizes[size]


def open_session(
    graph: bytes, folder: Path, threads: int, *, folded: bool = True, provider: str = CPU, profile: Path | None = None
) -> Session:
    """Load a serialised graph whose weights are in the files of ``folder``.

    Args:
        threads: within an operator.
        folded: compute once what follows from weights alone; otherwise in every run, which takes less memory.
        provider: execution provider by ONNX Runtime's name.
        profile: prefix of a file that tells which provider ran each operator.

    Raises:
        VerificationError: ONNX Runtime does not load it.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    for name, value in UNPACK_QDQ.items():
        options.add_session_config_entry(name, value)
    sizes = {"batch_size": 1, "past_sequence_length": 0}
    head_size = GenaiConfig.read(folder, VerificationError).model.decoder.head_size
    if head_size is not None:
        sizes["kv_cache_dim"] = head_size
    try:
        left_out = [] if folded else ["ConstantFolding"]
        session = ort.InferenceSession(graph, options, providers=[provider], disabled_optimizers=left_out)
    except _faults() as error:
        raise VerificationError(f"The model cannot be loaded: {error}", where=str(folder)) from error
    if provider not in session.get_providers():
        # ONNX Runtime takes the CPU instead, with a warning
        raise VerificationError(f"ONNX Runtime did not load {provider}", where=str(folder), hint="qwen-onnx doctor")
    return Session(session, folder, sizes)


class OnnxScorer:
    """An artifact in a plain ``InferenceSession``: one run gives the logits of all positions.

    Args:
        folder: of the artifact.
        threads: within an operator.
        in_float32: every operator computes in float32, see ``Graph.in_float32``.
        provider, profile: see ``open_session``.

    Raises:
        VerificationError: the folder holds no model that ONNX Runtime loads.
    """

    def __init__(
        self,
        folder: Path,
        threads: int,
        *,
        in_float32: bool = False,
        provider: str = CPU,
        profile: Path | None = None,
    ) -> None:
        graph = Graph(folder / GenaiConfig.read(folder, VerificationError).graph_file)
        graph.every_position()
        if in_float32:
            graph.in_float32()
        # folded, all weights would be there in float32 at once
        self._session = open_session(
            graph.serialized(), folder, threads, folded=not in_float32, provider=provider, profile=profile
        )

    def logits(self, ids: Sequence[int], given: Mapping[str, npt.NDArray[Any]] | None = None) -> Logits:
        """Logits of shape [tokens, vocabulary] for one sequence; ``given`` are inputs that no text has."""
        (found,) = self._session.run(["logits"], ids, given or {})
        logits: Logits = found[0].astype(np.float32, copy=False)
        return logits

    def end_profile(self) -> str:
        """The file that tells which provider ran each operator; only with ``profile``."""
        return self._session.end_profile()


def placed(folder: Path, threads: int, provider: str, ids: Sequence[int]) -> Counter[tuple[str, str]]:
    """How often each (operator, execution provider) ran for one text.

    Raises:
        VerificationError: the model does not run, or ONNX Runtime does not tell.
    """
    with tempfile.TemporaryDirectory() as scratch:
        scorer = OnnxScorer(folder, threads, provider=provider, profile=Path(scratch) / "run")
        scorer.logits(ids)
        file = Path(scorer.end_profile())
        told = read_json(file, most_bytes=MOST_PROFILE_BYTES, error=VerificationError, most_values=MOST_PROFILE_VALUES)
    runs = [event["args"] for event in told if event.get("cat") == "Node" and "provider" in event.get("args", {})]
    return Counter((run["op_name"], run["provider"]) for run in runs)


def _faults() -> tuple[type[Exception], ...]:
    """What a bad folder raises; neither protobuf's nor ONNX Runtime's own share a base but ``Exception``."""
    from google.protobuf.message import DecodeError
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = [item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception)]
    known = (OSError, KeyError, ValueError, RuntimeError, DecodeError)
    return (*known, *(item for item in found if item is not Exception))
