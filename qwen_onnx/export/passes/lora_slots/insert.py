"""Our Olive pass ``LoraSlots``: the same graph with slots for adapters."""

from __future__ import annotations

from pathlib import Path

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from qwen_onnx.export.options import chosen, parameters
from qwen_onnx.export.passes.lora_slots.graph import insert_slots
from qwen_onnx.export.passes.lora_slots.options import LoraSlotsOptions


class LoraSlots(Pass):  # type: ignore[misc]
    """Give a graph slots for adapters."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return parameters(LoraSlotsOptions)

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        source = Path(model.model_path)
        insert_slots(source, Path(output_model_path), chosen(LoraSlotsOptions, config).rank)
        return ONNXModelHandler(output_model_path, onnx_file_name=source.name)
