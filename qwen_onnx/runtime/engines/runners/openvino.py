"""A model in OpenVINO's format on its CPU plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino

MODEL_FILE = "model.xml"
# compute what the weights say: in float32, without rounding activations or the KV cache
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}


class Backend:
    """See ``worker.Backend``. The KV cache is state inside the model."""

    def __init__(self, folder: Path, threads: int) -> None:
        core = openvino.Core()
        options = {**EXACT, "INFERENCE_NUM_THREADS": str(threads)}
        self._request: Any = core.compile_model(
            core.read_model(folder / MODEL_FILE), "CPU", options
        ).create_infer_request()
        self._read = 0

    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits [tokens, vocabulary] of a sequence by itself."""
        self._request.reset_state()
        self._read = 0
        return self._run(ids)

    def start(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Forget everything, read ``ids``; logits [vocabulary] of what follows."""
        last: npt.NDArray[np.float32] = self.logits(ids)[-1]
        return last

    def step(self, token: int) -> npt.NDArray[np.float32]:
        """Read one more token through the KV cache; logits [vocabulary] of what follows."""
        last: npt.NDArray[np.float32] = self._run([token])[-1]
        return last

    def _run(self, ids: list[int]) -> npt.NDArray[np.float32]:
        total = self._read + len(ids)
        feeds = {
            "input_ids": np.asarray([ids], dtype=np.int64),
            "attention_mask": np.ones((1, total), dtype=np.int64),
            "position_ids": np.arange(self._read, total, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        found = self._request.infer(feeds)
        self._read = total
        logits: npt.NDArray[np.float32] = np.array(found["logits"][0])
        return logits
