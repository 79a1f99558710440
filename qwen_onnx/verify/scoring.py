"""Logits of an ONNX folder at all positions at once, and what they differ by from others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.errors import VerificationError
from qwen_onnx.runtime.engines.genai import UNPACK_QDQ

Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]

HEADS = ("MatMulNBits", "MatMul")
STATES = ("past_key_values.", "past.")
ROWS = 32  # vocabulary rows per step: float64 copies then stay within a few tens of megabytes


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


def _compare_rows(baseline: Logits, candidate: Logits, following: npt.NDArray[np.int64]) -> list[Floats]:
    p, q = baseline.astype(np.float64), candidate.astype(np.float64)
    rows = np.arange(len(following))
    diff = np.abs(p - q).max(axis=-1)
    agree = (p.argmax(axis=-1) == q.argmax(axis=-1)).astype(np.float64)
    p -= p.max(axis=-1, keepdims=True)
    q -= q.max(axis=-1, keepdims=True)
    weights = np.exp(p)
    total = weights.sum(axis=-1)
    log_p, log_q = np.log(total), np.log(np.exp(q).sum(axis=-1))
    kld = (weights * (p - q)).sum(axis=-1) / total - log_p + log_q
    return [kld, agree, log_p - p[rows, following], log_q - q[rows, following], diff]


def compare(baseline: Logits, candidate: Logits, ids: Sequence[int]) -> Positions:
    """Statistics of ``candidate`` against ``baseline``.

    Args:
        baseline: logits of shape [tokens, vocabulary].
        candidate: the same shape; columns beyond the smaller vocabulary are padding and dropped.
        ids: the tokens that both were given.

    Returns:
        ``len(ids) - 1`` positions: the last one has no token that follows.
    """
    if len(baseline) != len(ids) or len(candidate) != len(ids):
        raise VerificationError(f"Logits for {len(baseline)} and {len(candidate)} positions, {len(ids)} tokens given.")
    width = min(baseline.shape[-1], candidate.shape[-1])
    following = np.asarray(ids[1:], dtype=np.int64)
    parts = []
    # A non-finite logit gives NaN, which the verdict rejects; numpy's warning would only repeat it.
    with np.errstate(all="ignore"):
        for start in range(0, len(following), ROWS):
            rows = slice(start, min(start + ROWS, len(following)))
            parts.append(_compare_rows(baseline[rows, :width], candidate[rows, :width], following[rows]))
    return Positions(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def with_every_position(model: Path) -> bytes:
    """The graph with logits of all positions: what ``prune_lm_head`` cut to the last one is joined again.

    Weights and kernels stay those of the artifact; only the Gather and Unsqueeze before the head are passed by.
    """
    import onnx

    loaded = onnx.load(str(model), load_external_data=False)
    graph = loaded.graph
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        # [batch, tokens, hidden] - Gather(last) - Unsqueeze - head
        cut = makers.get(node.input[0]) if node.op_type in HEADS and node.input else None
        last = makers.get(cut.input[0]) if cut is not None and cut.op_type == "Unsqueeze" else None
        if last is not None and last.op_type == "Gather" and "logits" in node.output:
            node.input[0] = last.input[0]
            dim = next(output for output in graph.output if output.name == "logits").type.tensor_type.shape.dim[1]
            dim.dim_param = "sequence_length"
    serialized: bytes = loaded.SerializeToString()
    return serialized


_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


class OnnxScorer:
    """A plain ``InferenceSession`` with empty states: one run gives the logits of all positions.

    States are the KV cache and, with linear attention, those of the convolution and of the recurrence.

    Raises:
        VerificationError: the folder holds no model that ONNX Runtime loads.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime as ort

        self.folder = folder
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        decoder = GenaiConfig.read(folder, VerificationError).model.decoder
        try:
            self._sizes = {"batch_size": 1, "past_sequence_length": 0}
            if decoder.head_size is not None:
                self._sizes["kv_cache_dim"] = decoder.head_size
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
            for name, value in UNPACK_QDQ.items():
                options.add_session_config_entry(name, value)
            graph = with_every_position(folder / decoder.filename)
            self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except _faults() as error:
            raise VerificationError(f"The model cannot be loaded: {error}", where=str(folder)) from error

    def logits(self, ids: Sequence[int]) -> Logits:
        """Logits of shape [tokens, vocabulary] for one sequence."""
        try:
            (found,) = self._session.run(["logits"], self._feeds(np.asarray([ids])))
        except _faults() as error:
            raise VerificationError(f"The model does not run: {error}", where=str(self.folder)) from error
        logits: Logits = found[0].astype(np.float32, copy=False)
        return logits

    def _feeds(self, ids: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[Any]]:
        known = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(ids.shape[1]),
        }
        feeds = {}
        for spec in self._session.get_inputs():
            if spec.name.startswith(STATES):
                value: npt.NDArray[Any] = np.zeros([self._size(size, spec.name) for size in spec.shape])
            elif spec.name in known:
                # multimodal RoPE has three axes of positions, equal for text
                value = np.broadcast_to(known[spec.name], (*spec.shape[:-2], *ids.shape))
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


def _faults() -> tuple[type[Exception], ...]:
    """What a bad folder raises; neither protobuf's nor ONNX Runtime's own share a base but ``Exception``."""
    from google.protobuf.message import DecodeError
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = [item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception)]
    known = (OSError, KeyError, ValueError, RuntimeError, DecodeError)
    return (*known, *(item for item in found if item is not Exception))
