"""Our Olive pass ``DraftHead``: a model's head for multi-token prediction, beside its decoder.

``mtp.onnx`` takes the embedding of a token and the hidden state before it, see ``architectures.drafting``. Its weights
are those that the checkpoint has below ``mtp.``; one that has none gets no such file.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from qwen_onnx.artifact.draft_head import DRAFT_HEAD
from qwen_onnx.artifact.genai_config import GENAI_CONFIG
from qwen_onnx.export.embedding import CHECKPOINT, copy_decoder
from qwen_onnx.export.options import chosen, parameters
from qwen_onnx.export.passes.draft_head.options import BLOCK, DraftHeadOptions
from qwen_onnx.export.progress import progress
from qwen_onnx.export.weights import CheckpointWeights
from qwen_onnx.sources.checkpoint import read_json

# bits of a head that is not rounded
FLOAT = 32


class DraftHead(Pass):  # type: ignore[misc]
    """Write the head beside a decoder."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return parameters(DraftHeadOptions)

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        source, output = Path(model.model_path), Path(output_model_path)
        copy_decoder(source.parent, output)
        shutil.copyfile(source.parent / GENAI_CONFIG, output / GENAI_CONFIG)
        write_head(Path(CHECKPOINT).resolve(), output, chosen(DraftHeadOptions, config).bits)
        return ONNXModelHandler(output_model_path, onnx_file_name=source.name)


def write_head(checkpoint: Path, output: Path, bits: int) -> bool:
    """Write the head of ``checkpoint`` into ``output``; one of another form than Qwen3.5's is left out, which is told.

    Args:
        bits: of its matrices; 32 rounds none.

    Returns:
        Whether the checkpoint has one that could be written.

    Raises:
        ExportError: its weights have other shapes than those of its architecture.
    """
    from qwen_onnx.export.architectures.drafting import HEAD, OtherHeadError, head_alone

    if not CheckpointWeights(checkpoint).names(HEAD):
        progress("the checkpoint has no head for multi-token prediction")
        return False
    from onnxruntime_genai.models import builder

    from qwen_onnx.export.architectures.positions import frequencies_of_transformers

    progress("writing the head for multi-token prediction")
    [architecture] = read_json(checkpoint / "config.json")["architectures"]
    rounded = ["accuracy_level=4", "is_symmetric=false", f"block_size={BLOCK}"]
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=output) as folder:
        precision = "fp32" if bits == FLOAT else f"int{bits}"
        common = ("", str(checkpoint), folder, precision, "cpu", f"{folder}/cache")
        options: dict[str, Any] = builder.parse_extra_options(*common, [] if bits == FLOAT else rounded)
        options["hf_details"]["hf_config"].architectures = [architecture]
        try:
            with head_alone(architecture), frequencies_of_transformers():
                builder.create_model(*common, **options)
        except OtherHeadError as error:
            progress(f"left out the head for multi-token prediction, which has another form than Qwen3.5's: {error}")
            return False
        for file in (f"{DRAFT_HEAD}.data", DRAFT_HEAD):
            shutil.move(Path(folder, file), output / file)
    return True
