"""Olive passes that build for OpenVINO, run in the environment ``pipelines/environments/openvino.yaml``.

Olive's own ``OpenVINOOptimumConversion`` calibrates on data sets of the hub and drops options that it does not know in
silence; its ``OpenVINOEncapsulation`` takes head_size for hidden_size / heads, which Qwen3 contradicts.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler, ONNXModelHandler, OpenVINOModelHandler
from olive.passes import Pass
from olive.passes.openvino.encapsulation import OpenVINOEncapsulation
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from qwen_onnx.catalog.passes import OpenVINOConversionConfig, OpenVINOPackageConfig
from qwen_onnx.export.options import chosen, parameters

MODEL_NAME = "model"
# of the checkpoint, as they are: optimum-intel saves a tokenizer anew
COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class OpenVINOConversion(Pass):  # type: ignore[misc]
    """Convert a Hugging Face checkpoint to OpenVINO's IR by optimum-intel and compress its weights by NNCF."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return parameters(OpenVINOConversionConfig)

    def _run_for_config(
        self, model: HfModelHandler, config: BasePassConfig, output_model_path: str
    ) -> OpenVINOModelHandler:
        checkpoint, output = Path(model.model_name_or_path), Path(output_model_path)
        convert(checkpoint, output, chosen(OpenVINOConversionConfig, config))
        return OpenVINOModelHandler(model_path=output_model_path)


class OpenVINOPackage(OpenVINOEncapsulation):  # type: ignore[misc]
    """Olive's EPContext model around an IR, and a ``genai_config.json`` that is right.

    The model has one node, which names the IR; onnxruntime-genai runs it through ONNX Runtime's OpenVINO provider.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        own = {name: item for name, item in parameters(OpenVINOPackageConfig).items() if name != "target_device"}
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


def convert(checkpoint: Path, output: Path, config: OpenVINOConversionConfig) -> None:
    """Write ``model.xml`` and ``model.bin``, a decoder with its KV cache as state, and the checkpoint's small files.

    INT4 is symmetric, as Intel's NPUs want it, with AWQ (Lin et al. 2023, arXiv:2306.00978) and scale estimation on
    our calibration text; the matrices that do not get 4 bits, and the embedding that may be the head too, get 8.
    """
    import openvino
    from optimum.exporters.openvino import main_export
    from optimum.intel.openvino.configuration import OVConfig

    unquantised = output / "fp32"
    main_export(
        str(checkpoint),
        unquantised,
        task="text-generation-with-past",
        ov_config=OVConfig(dtype="fp32"),
        stateful=True,
        convert_tokenizer=False,
        library_name="transformers",
    )
    model = openvino.Core().read_model(unquantised / "openvino_model.xml")
    if config.precision in ("int4", "int8"):
        model = _compressed(model, checkpoint, config)
    openvino.save_model(model, output / f"{MODEL_NAME}.xml", compress_to_fp16=config.precision == "fp16")
    del model
    shutil.rmtree(unquantised)
    for name in COPIED:
        if (checkpoint / name).exists():
            shutil.copyfile(checkpoint / name, output / name)


def _compressed(model: Any, checkpoint: Path, config: OpenVINOConversionConfig) -> Any:
    import nncf

    if config.precision == "int8":
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    windows = _calibration(checkpoint, config)
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=config.group_size,
        ratio=config.int4_share,
        backup_mode=nncf.BackupMode.INT8_SYM,
        awq=True,
        scale_estimation=True,
        dataset=nncf.Dataset(windows),
        subset_size=len(windows),
        sensitivity_metric=nncf.SensitivityMetric.MAX_ACTIVATION_VARIANCE,
    )


def _calibration(checkpoint: Path, config: OpenVINOConversionConfig) -> list[dict[str, Any]]:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

    from qwen_onnx.export.calibration import calibration_ids

    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint, trust_remote_code=False)
    return [
        {
            "input_ids": np.asarray([ids]),
            "attention_mask": np.ones((1, len(ids)), dtype=np.int64),
            "position_ids": np.arange(len(ids))[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        for ids in calibration_ids(tokenizer, config.windows, config.window, config.seed)
    ]


def correct_genai_config(folder: Path, device: str, max_prompt_len: int, min_response_len: int) -> None:
    """Write head size, context, end tokens and the device's fixed lengths into ``genai_config.json``."""
    path = folder / "genai_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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
