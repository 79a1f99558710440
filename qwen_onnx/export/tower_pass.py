"""What the Olive passes have in common that write a tower beside a decoder."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from qwen_onnx.export.embedding import CHECKPOINT
from qwen_onnx.export.options import chosen, parameters
from qwen_onnx.export.tower_options import TowerOptions


class TowerPass(Pass):  # type: ignore[misc]
    """Files of a decoder, and of a tower beside it.

    Attributes:
        kind: its options.
        write: gets the folders of checkpoint, decoder and output, and the bits of the encoder's layers.
    """

    kind: ClassVar[type[TowerOptions]]
    write: ClassVar[staticmethod[[Path, Path, Path, int | None], None]]

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return parameters(cls.kind)

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        source = Path(model.model_path)
        bits = chosen(self.kind, config).bits
        self.write(Path(CHECKPOINT).resolve(), source.parent, Path(output_model_path), bits)
        return ONNXModelHandler(output_model_path, onnx_file_name=source.name)
