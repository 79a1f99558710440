"""Qualcomm's HTP by onnxruntime-qnn: compiles QDQ graphs to contexts, and runs contexts on the device or its simulator.

On x86 the libraries inside the wheel simulate the HTP. Runs in the environment ``qnn``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_onnx.artifact.htp.cpu import cpu_session
from qwen_onnx.artifact.htp.folder import CONTEXT, QDQ, HtpFolder
from qwen_onnx.artifact.htp.static_decoder import Run

Floats = npt.NDArray[np.float32]
LIBRARY = "qnn"
NO_FALLBACK = {"session.disable_cpu_ep_fallback": "1"}


def _session(model: Path, provider_options: dict[str, str], entries: dict[str, str], threads: int = 1) -> Any:
    """Load ``model`` on the HTP alone: a node that the HTP refuses is an error."""
    import onnxruntime
    import onnxruntime_qnn

    devices = _devices(onnxruntime)
    if not devices:
        onnxruntime.register_execution_provider_library(LIBRARY, onnxruntime_qnn.get_library_path())
        devices = _devices(onnxruntime)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    for key, value in (NO_FALLBACK | entries).items():
        options.add_session_config_entry(key, value)
    backend = {"backend_path": onnxruntime_qnn.get_qnn_htp_path()}
    options.add_provider_for_devices(devices[:1], backend | provider_options)
    return onnxruntime.InferenceSession(str(model), options)


def _devices(onnxruntime: Any) -> list[Any]:
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == LIBRARY]


def compile_contexts(folder: HtpFolder, options: dict[str, str]) -> None:
    """Compile every QDQ graph of a folder to a file with one EPContext node, and a binary beside it.

    Each binary holds the weights: one that several graphs share (``ep.share_ep_contexts``) compiles, but the simulator
    cannot load it (QNN_COMMON_ERROR_NOT_SUPPORTED), and what was not run here is not shipped.
    """
    source, compiled = folder.in_form(QDQ), folder.in_form(CONTEXT)
    for tokens in folder.windows:
        print(f"progress: compiling the HTP context for windows of {tokens}", flush=True)
        entries = {
            "ep.context_enable": "1",
            "ep.context_file_path": str(compiled.graph(tokens)),
            "ep.context_embed_mode": "0",
        }
        _session(source.graph(tokens), options, entries)
    compiled.write()


class Backend:
    """See ``worker.Backend``. Contexts run on the HTP, float and QDQ graphs on the CPU.

    Args:
        folder: as ``HtpFolder`` describes.
        threads: of the CPU; the simulator takes what it takes.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self._folder = self._described(folder)
        self._threads = threads
        self._sessions: dict[int, Run] = {}
        self._decoder = self._folder.decoder({tokens: self._lazily(tokens) for tokens in self._folder.windows})

    def _described(self, folder: Path) -> HtpFolder:
        return HtpFolder.read(folder)

    def logits(self, ids: list[int]) -> Floats:
        """Logits [tokens, vocabulary] of a sequence by itself."""
        self._decoder.reset()
        return self._read(ids, self._folder.windows[0])

    def start(self, ids: list[int]) -> Floats:
        """Forget everything, read ``ids``; logits [vocabulary] of what follows."""
        last: Floats = self.logits(ids)[-1]
        return last

    def step(self, token: int) -> Floats:
        """Read one more token through the KV cache; logits [vocabulary] of what follows."""
        last: Floats = self._read([token], self._folder.windows[-1])[-1]
        return last

    def _read(self, ids: list[int], tokens: int) -> Floats:
        return self._folder.numbers(self._decoder.feed(ids, tokens))

    def _lazily(self, tokens: int) -> Run:
        """A graph takes memory and seconds to load: only those that are used are loaded."""

        def run(feeds: dict[str, Any]) -> dict[str, Any]:
            if tokens not in self._sessions:
                self._sessions[tokens] = self._opened(tokens)
            return dict(self._sessions[tokens](feeds))

        return run

    def _opened(self, tokens: int) -> Run:
        model = self._folder.graph(tokens)
        if self._folder.form != CONTEXT:
            return cpu_session(model, self._threads)
        session = _session(model, {}, {}, self._threads)
        names = [output.name for output in session.get_outputs()]
        return lambda feeds: dict(zip(names, session.run(None, feeds), strict=True))


def main(folder: str, options: str) -> int:
    """Compile the graphs of a folder: ``python -m qwen_onnx.runtime.engines.runners.qnn FOLDER OPTIONS-AS-JSON``."""
    compile_contexts(HtpFolder.read(Path(folder)), json.loads(options))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
