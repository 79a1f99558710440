"""ONNX files on ONNX Runtime's CPU, computed as they are written."""

from __future__ import annotations

from pathlib import Path

from qwen_onnx.artifact.htp.static_decoder import Run

OPTIONS = {
    # integer weights become MatMulNBits, which would round activations to 8 bits
    "session.qdq_matmulnbits_accuracy_level": "1",
}


def cpu_session(model: Path, threads: int) -> Run:
    """What runs ``model``: named arrays to named arrays."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for name, value in OPTIONS.items():
        options.add_session_config_entry(name, value)
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, feeds), strict=True))
