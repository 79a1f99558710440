"""Our Olive pass ``OpenVINOConversion``, run in the environment ``pipelines/environments/openvino.yaml``.

Olive's own ``OpenVINOOptimumConversion`` calibrates on data sets of the hub and drops options that it does not know in
silence.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler, OpenVINOModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from qwen_onnx.export.options import chosen, parameters
from qwen_onnx.export.passes.openvino_conversion.options import COPIED, OpenVINOConversionOptions

MODEL_NAME = "model"


class OpenVINOConversion(Pass):  # type: ignore[misc]
    """Convert a Hugging Face checkpoint to OpenVINO's IR by optimum-intel and compress its weights by NNCF."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return parameters(OpenVINOConversionOptions)

    def _run_for_config(
        self, model: HfModelHandler, config: BasePassConfig, output_model_path: str
    ) -> OpenVINOModelHandler:
        checkpoint, output = Path(model.model_name_or_path), Path(output_model_path)
        convert(checkpoint, output, chosen(OpenVINOConversionOptions, config))
        return OpenVINOModelHandler(model_path=output_model_path)


def convert(checkpoint: Path, output: Path, config: OpenVINOConversionOptions) -> None:
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


def _compressed(model: Any, checkpoint: Path, config: OpenVINOConversionOptions) -> Any:
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


def _calibration(checkpoint: Path, config: OpenVINOConversionOptions) -> list[dict[str, Any]]:
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
