"""Foundry Local's names for what a target's packages run on; loads nothing heavy, since a matrix is checked by it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen_onnx.catalog.plan import Plan
from qwen_onnx.errors import ConfigError, PackageError

NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]*")


@dataclass(frozen=True)
class Device:
    """Where a target's packages run.

    Attributes:
        suffix: end of the id, which tells Foundry's users where the variant runs.
        provider: execution provider by ONNX Runtime's name, ``genai`` by that of ``genai_config.json``.
        kind: CPU, GPU or NPU.
    """

    suffix: str
    provider: str
    genai: str
    kind: str


DEVICES = {
    "cpu": Device("generic-cpu", "CPUExecutionProvider", "cpu", "CPU"),
    "cuda": Device("cuda-gpu", "CUDAExecutionProvider", "cuda", "GPU"),
    "dml": Device("generic-gpu", "DmlExecutionProvider", "dml", "GPU"),
    "webgpu": Device("generic-gpu", "WebGpuExecutionProvider", "webgpu", "GPU"),
    "trt-rtx": Device("trtrtx-gpu", "NvTensorRTRTXExecutionProvider", "NvTensorRtRtx", "GPU"),
    "npu-openvino": Device("openvino-npu", "OpenVINOExecutionProvider", "OpenVINO", "NPU"),
    "npu-qnn": Device("qnn-npu", "QNNExecutionProvider", "qnn", "NPU"),
}
UNSERVED = {
    "npu-qnn": "onnxruntime-genai, by which Foundry Local runs models, has no loop for its two graphs of fixed shape",
}


def package_name(plan: Plan, name: str | None) -> str:
    """Foundry's name of a variant: what it is, and the suffix that tells where it runs.

    Raises:
        PackageError: Foundry Local cannot run artifacts of this target.
        ConfigError: ``name`` is none that Foundry accepts.
    """
    if plan.target in UNSERVED or plan.target not in DEVICES:
        why = UNSERVED.get(plan.target, "Foundry Local knows no such device")
        raise PackageError(
            f"no package for {plan.target}: {why}", where=plan.name, hint="package another target: qwen-onnx list"
        )
    if name is not None and not NAME.fullmatch(name):
        raise ConfigError([f"--name: {name!r} must begin with a letter or digit; then . _ - may stand in it"])
    suffix = DEVICES[plan.target].suffix
    # two targets that share a suffix would share the id of a model, too
    shared = [target for target, device in DEVICES.items() if device.suffix == suffix]
    own = f"{plan.model}-{plan.precision}" + (f"-{plan.target}" if len(shared) > 1 else "")
    return f"{name or own}-{suffix}"
