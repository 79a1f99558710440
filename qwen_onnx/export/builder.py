"""Our Olive pass: drives the model builder of today's onnxruntime-genai.

Olive 0.13's own ModelBuilder pass calls an interface that genai dropped in 0.15 (Olive #2665).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler, ONNXModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from qwen_onnx.checkpoint import TOKENIZER_FILE
from qwen_onnx.export.streaming import weights_in_files
from qwen_onnx.passes import GenAIModelBuilderConfig

MODEL_FILE = "model.onnx"


class GenAIModelBuilder(Pass):  # type: ignore[misc]
    """Build an ONNX model and its genai files from a Hugging Face checkpoint."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            name: PassConfigParam(type_=Any, default_value=field.get_default(), description=f"genai builder: {name}")
            for name, field in GenAIModelBuilderConfig.model_fields.items()
        }

    def _run_for_config(
        self, model: HfModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        given = {name: getattr(config, name) for name in GenAIModelBuilderConfig.model_fields}
        options = {name: value for name, value in given.items() if value is not None}
        build(Path(model.model_name_or_path), Path(output_model_path), GenAIModelBuilderConfig.model_validate(options))
        return ONNXModelHandler(output_model_path, onnx_file_name=MODEL_FILE)


def build(checkpoint: Path, output: Path, config: GenAIModelBuilderConfig) -> None:
    """Run genai's builder for the CPU provider.

    Args:
        checkpoint: Hugging Face folder, quantised by an Olive pass or not.
        output: folder for ``model.onnx``, its data, ``genai_config.json`` and the tokenizer.
        config: options; those that are None keep the builder's default.
    """
    from onnxruntime_genai.models import builder

    options = config.model_dump(exclude_none=True, exclude={"precision"})
    flags = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in options.items()]
    cache = output / ".builder-cache"
    cache.mkdir(parents=True, exist_ok=True)
    common = ("", str(checkpoint), str(output), config.precision, "cpu", str(cache))
    with weights_in_files(output):
        builder.create_model(*common, **builder.parse_extra_options(*common, flags))
    repair_shared_head(output / MODEL_FILE)
    # transformers 5 rebuilds a Qwen2 tokenizer when the builder saves it, and then splits "\n\n" otherwise
    shutil.copyfile(checkpoint / TOKENIZER_FILE, output / TOKENIZER_FILE)


def repair_shared_head(model: Path) -> None:
    """Give the scales and zero points of a shared, already quantised lm_head their two dimensions.

    genai 0.18 writes them flat, which MatMulNBits takes and the embedding's GatherBlockQuantized refuses: the
    model would not load. Only the declared shape changes, the bytes are row-major already.
    """
    import onnx

    graph_file = onnx.load(str(model), load_external_data=False)
    tensors = {tensor.name: tensor for tensor in graph_file.graph.initializer}
    flat = [
        tensors[name]
        for node in graph_file.graph.node
        if node.op_type == "GatherBlockQuantized"
        for name in node.input[2:]
        if len(tensors[name].dims) == 1
    ]
    if not flat:
        return
    rows = next(tensor.dims[0] for name, tensor in tensors.items() if name.endswith("lm_head.MatMulNBits.qweight"))
    for tensor in flat:
        tensor.dims[:] = [rows, tensor.dims[0] // rows]
    onnx.save(graph_file, str(model))
