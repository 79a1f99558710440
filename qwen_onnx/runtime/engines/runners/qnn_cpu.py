"""The QDQ graphs that HTP contexts are compiled from, on ONNX Runtime's CPU: much faster than the simulator."""

from __future__ import annotations

from pathlib import Path

from qwen_onnx.artifact.htp.folder import CONTEXT, QDQ, HtpFolder
from qwen_onnx.runtime.engines.runners import qnn


class Backend(qnn.Backend):
    """See ``worker.Backend``; float graphs run as they are."""

    def _described(self, folder: Path) -> HtpFolder:
        described = HtpFolder.read(folder)
        return described.in_form(QDQ) if described.form == CONTEXT else described
