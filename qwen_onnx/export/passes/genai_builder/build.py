"""Our Olive pass: drives the model builder of today's onnxruntime-genai.

Olive 0.13's own ModelBuilder pass calls an interface that genai dropped in 0.15 (Olive #2665).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler, ONNXModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from qwen_onnx.export.options import chosen, parameters
from qwen_onnx.export.passes.genai_builder.options import GenAIModelBuilderOptions
from qwen_onnx.export.passes.genai_builder.qdq import write_signed
from qwen_onnx.export.passes.genai_builder.repairs import repair
from qwen_onnx.export.passes.genai_builder.streaming import weights_in_files
from qwen_onnx.export.weights import CheckpointWeights
from qwen_onnx.export.workfolder import KEPT_FOLDER
from qwen_onnx.records import digest_of
from qwen_onnx.sources.checkpoint import TOKENIZER_FILE, read_json

MODEL_FILE = "model.onnx"
# below the folder of finished steps: the quantise pass has its own there
STEPS_FOLDER = "graph"


class GenAIModelBuilder(Pass):  # type: ignore[misc]
    """Build an ONNX model and its genai files from a Hugging Face checkpoint."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return parameters(GenAIModelBuilderOptions)

    def _run_for_config(
        self, model: HfModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        kept = Path(KEPT_FOLDER, STEPS_FOLDER).resolve() if Path(KEPT_FOLDER).exists() else None
        options = chosen(GenAIModelBuilderOptions, config)
        build(Path(model.model_name_or_path), Path(output_model_path), options, kept)
        return ONNXModelHandler(output_model_path, onnx_file_name=MODEL_FILE)


def build(checkpoint: Path, output: Path, config: GenAIModelBuilderOptions, kept: Path | None = None) -> None:
    """Run genai's builder for an execution provider, with what the checkpoint's architecture needs around it.

    The provider need not be on this machine.

    Args:
        checkpoint: Hugging Face folder, quantised by an Olive pass or not.
        output: folder for ``model.onnx``, its data, ``genai_config.json`` and the tokenizer.
        config: options; those that are None keep the builder's default.
        kept: folder for layers that are quantised here, which the same call finds again; None keeps nothing.

    Raises:
        UnsupportedModelError, ExportError: see ``architecture_of``.
    """
    from onnxruntime_genai.models import builder

    from qwen_onnx.export.architectures.positions import frequencies_of_transformers
    from qwen_onnx.export.architectures.registry import architecture_of, installed, present

    architecture = architecture_of(checkpoint)
    options = config.model_dump(exclude_none=True, exclude={"precision", "execution_provider"})
    flags = [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in options.items()]
    cache = output / ".builder-cache"
    cache.mkdir(parents=True, exist_ok=True)
    common = ("", str(checkpoint), str(output), config.precision, config.execution_provider, str(cache))
    parsed = builder.parse_extra_options(*common, [*flags, *architecture.options])
    present(parsed, architecture)
    settings = read_json(checkpoint / "config.json")
    identity = digest_of([config.model_dump(mode="json"), settings, CheckpointWeights(checkpoint).fingerprint()])
    with installed(architecture), frequencies_of_transformers(), weights_in_files(output, identity, kept):
        builder.create_model(*common, **parsed)
    repair(output / MODEL_FILE, config.accuracy_level)
    if config.execution_provider == "NvTensorRtRtx":
        write_signed(output / MODEL_FILE)
    # transformers 5 rebuilds a Qwen2 tokenizer when the builder saves it, and then splits "\n\n" otherwise
    shutil.copyfile(checkpoint / TOKENIZER_FILE, output / TOKENIZER_FILE)
