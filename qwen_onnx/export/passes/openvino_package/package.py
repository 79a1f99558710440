"""Our Olive pass ``OpenVINOPackage``, run in the environment ``pipelines/environments/openvino.yaml``.

Olive's own ``OpenVINOEncapsulation`` takes head_size for hidden_size / heads, which Qwen3 contradicts.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler, OpenVINOModelHandler
from olive.passes.openvino.encapsulation import OpenVINOEncapsulation
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from qwen_onnx.export.options import parameters
from qwen_onnx.export.passes.openvino_conversion.options import COPIED
from qwen_onnx.export.passes.openvino_package.options import OpenVINOPackageOptions
from qwen_onnx.sources.checkpoint import read_json


class OpenVINOPackage(OpenVINOEncapsulation):  # type: ignore[misc]
    """Olive's EPContext model around an IR, and a ``genai_config.json`` that is right.

    The model has one node, which names the IR; onnxruntime-genai runs it through ONNX Runtime's OpenVINO provider.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        own = {name: item for name, item in parameters(OpenVINOPackageOptions).items() if name != "target_device"}
        dynamic = PassConfigParam(type_=bool, default_value=True, description="see OpenVINOEncapsulation")
        return {**super()._default_config(accelerator_spec), **own, "keep_ov_dynamic_dims": dynamic}

    def _run_for_config(
        self, model: OpenVINOModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        source, output = Path(model.model_path), Path(output_model_path)
        packaged = super()._run_for_config(model, config, output_model_path)
        for name in COPIED:
            if (source / name).exists() and not (output / name).exists():
                shutil.copyfile(source / name, output / name)
        correct_genai_config(output, config.target_device, config.max_prompt_len, config.min_response_len)
        return packaged


def correct_genai_config(folder: Path, device: str, max_prompt_len: int, min_response_len: int) -> None:
    """Write head size, context, end tokens and the device's fixed lengths into ``genai_config.json``."""
    path = folder / "genai_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    config = read_json(folder / "config.json")
    context = min(max_prompt_len + min_response_len, config["max_position_embeddings"])
    model = settings["model"]
    model["context_length"] = settings["search"]["max_length"] = context
    heads = config["num_attention_heads"]
    model["decoder"]["head_size"] = config.get("head_dim") or config["hidden_size"] // heads
    prompt = max(context - min_response_len, 1)
    lengths = {"MAX_PROMPT_LEN": str(prompt), "MIN_RESPONSE_LEN": str(context - prompt)}
    provider: dict[str, Any] = {"device_type": device.upper(), "enable_causallm": "True"}
    if device == "npu":
        provider["load_config"] = json.dumps({"NPU": lengths})
    model["decoder"]["session_options"]["provider_options"] = [{"OpenVINO": provider}]
    path.write_text(json.dumps(settings, indent=4), encoding="utf-8")
