"""Which devices a machine has, and what is said of those that it lacks."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import onnxruntime as ort
import pytest

from qwen_onnx.errors import EnvironmentFault
from qwen_onnx.runtime.engines.devices import PROVIDERS, UNKNOWN, device, devices


def test_this_cpu_is_there_with_its_name() -> None:
    found = devices()
    assert found[0].name == "cpu"
    assert found[0].provider == "CPUExecutionProvider"
    assert found[0].hardware
    assert found[0].driver
    assert device("cpu") == found[0]


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "cpu"])
def test_what_is_not_there_is_named_with_what_brings_it(name: str) -> None:
    if set(PROVIDERS[name]) & set(ort.get_available_providers()):
        assert device(name).name == name
        return
    with pytest.raises(EnvironmentFault, match=f"no {name}: .*here: cpu") as caught:
        device(name)
    assert caught.value.hint
    assert "doctor" in caught.value.hint


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(EnvironmentFault, match="cpu, cuda, dml, webgpu, npu"):
        device("tpu")


def test_a_gpu_is_described_by_its_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, Rev. A, 570.86.15'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert (device("cuda").hardware, device("cuda").driver) == ("NVIDIA H200, Rev. A", "570.86.15")
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert device("cuda").hardware == UNKNOWN


def test_webgpu_is_described_by_vulkan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "vulkaninfo"
    told = "GPU{}:\n\tdeviceName         = {}\n\tdriverInfo         = Mesa 25.0\n"
    tool.write_text(f"#!/bin/sh\ncat <<END\n{told.format(0, 'Iris Xe')}{told.format(1, 'llvmpipe (LLVM 19)')}END\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["WebGpuExecutionProvider", "CPUExecutionProvider"])
    found = device("webgpu")
    assert (found.hardware, found.driver) == ("Iris Xe or llvmpipe (LLVM 19)", "Mesa 25.0")
    tool.write_text("#!/bin/sh\nexit 1\n")
    assert device("webgpu").hardware == UNKNOWN


def test_another_provider_is_described_by_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = SimpleNamespace(metadata={"Description": "Adreno X1"}, vendor="Qualcomm")
    plugin = SimpleNamespace(ep_name="WebGpuExecutionProvider", device=hardware)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["WebGpuExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "get_ep_devices", lambda: [plugin])
    assert device("webgpu").hardware == "Adreno X1"
    assert device("webgpu").driver == UNKNOWN
