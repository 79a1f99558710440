"""What this machine can run a model on, by the names of ``verify --device``."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_onnx.errors import EnvironmentFault

# ONNX Runtime's execution providers by device, and what brings them
PROVIDERS: dict[str, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider",),
    "dml": ("DmlExecutionProvider",),
    "webgpu": ("WebGpuExecutionProvider",),
    "npu": ("QNNExecutionProvider", "OpenVINOExecutionProvider"),
}
BROUGHT_BY = {
    "cpu": "pip install onnxruntime onnxruntime-genai",
    "cuda": "on a machine with an NVIDIA GPU: pip install onnxruntime-gpu onnxruntime-genai-cuda",
    "dml": "on Windows: pip install onnxruntime-directml onnxruntime-genai-directml",
    # both write the package onnxruntime: what is installed last counts
    "webgpu": "in an environment of its own: pip install --force-reinstall --no-deps onnxruntime-webgpu",
    "npu": "on a machine with that NPU: pip install onnxruntime-qnn, or onnxruntime-openvino",
}
UNKNOWN = "not told"
SECONDS = 20
MODEL_NAME = re.compile(r"^model name\s*:\s*(.+)$", re.MULTILINE)
VULKAN_NAME, VULKAN_DRIVER = (
    re.compile(rf"^\s*{key}\s*=\s*(.+)$", re.MULTILINE) for key in ("deviceName", "driverInfo")
)


@dataclass(frozen=True)
class Device:
    """Something that runs models.

    Attributes:
        name: a key of ``PROVIDERS``.
        provider: ONNX Runtime's name of the execution provider.
        hardware: the processor's own name.
        driver: version of the driver; of a CPU, the operating system.
    """

    name: str
    provider: str
    hardware: str
    driver: str


def devices() -> list[Device]:
    """Every device that the installed ONNX Runtime has an execution provider for, the CPU first."""
    import onnxruntime as ort

    available = ort.get_available_providers()
    return [
        Device(name, provider, *_described(name, provider, ort.get_ep_devices()))
        for name, providers in PROVIDERS.items()
        for provider in providers
        if provider in available
    ]


def device(name: str) -> Device:
    """The device of that name.

    Raises:
        EnvironmentFault: it is not a name, or this machine has none; the message names those it has.
    """
    found = devices()
    for each in found:
        if each.name == name:
            return each
    here = ", ".join(each.name for each in found)
    if name not in PROVIDERS:
        raise EnvironmentFault(f"{name!r} is not a device; known: {', '.join(PROVIDERS)}", where="--device", hint=here)
    wanted = " or ".join(PROVIDERS[name])
    raise EnvironmentFault(
        f"this machine has no {name}: ONNX Runtime offers no {wanted}; here: {here}",
        where="--device",
        hint=f"{BROUGHT_BY[name]}; then qwen-onnx doctor",
    )


def _described(name: str, provider: str, known: Sequence[Any]) -> tuple[str, str]:
    """Hardware and driver."""
    if name == "cpu":
        return cpu_name(), platform.platform()
    if name == "cuda":
        return _nvidia()
    for each in known:
        if each.ep_name == provider:
            told = dict(each.device.metadata)
            return told.get("Description") or each.device.vendor or UNKNOWN, told.get("DriverVersion", UNKNOWN)
    return _vulkan() if name == "webgpu" else (UNKNOWN, UNKNOWN)


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    try:
        told = MODEL_NAME.search(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        told = None
    return told[1].strip() if told else platform.processor() or platform.machine()


def _nvidia() -> tuple[str, str]:
    """Name and driver of the first GPU, from the driver's own tool."""
    told = _told("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    name, _, driver = told.partition("\n")[0].rpartition(",")
    return name.strip() or UNKNOWN, driver.strip() or UNKNOWN


def _vulkan() -> tuple[str, str]:
    """Names and drivers of all devices that Vulkan finds: which of them is taken, ONNX Runtime does not say."""
    told = _told("vulkaninfo", "--summary")
    names, drivers = (" or ".join(dict.fromkeys(found.findall(told))) for found in (VULKAN_NAME, VULKAN_DRIVER))
    return names or UNKNOWN, drivers or UNKNOWN


def _told(tool: str, *options: str) -> str:
    """What a tool of this machine prints; empty where there is none, or it fails."""
    found = shutil.which(tool)
    if found is None:
        return ""
    try:
        return subprocess.run(
            [found, *options], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
