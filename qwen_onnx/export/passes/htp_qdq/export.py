"""Our Olive pass ``HtpQdqExport``: a quantised Qwen checkpoint to QDQ graphs of fixed shapes for the HTP."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler, ONNXModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from qwen_onnx.artifact.htp.folder import CONTEXT, QDQ, HtpFolder, graph_file
from qwen_onnx.artifact.htp.grid import Grid
from qwen_onnx.export.calibration import calibration_ids
from qwen_onnx.export.options import chosen, parameters
from qwen_onnx.export.passes.htp_qdq.calibrate import FloatTables, cache_of, calibrated_grids, float_decoder
from qwen_onnx.export.passes.htp_qdq.decoder import COSINES, EMBEDDINGS, LOGITS, MASK, SINES, Decoder, Sizes
from qwen_onnx.export.passes.htp_qdq.linears import Linears
from qwen_onnx.export.passes.htp_qdq.options import HtpQdqExportOptions
from qwen_onnx.export.passes.htp_qdq.writer import DataFile, FloatWriter, QdqWriter
from qwen_onnx.sources.checkpoint import read_json

DATA_FILE = "weights.data"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
THREADS = 2


class HtpQdqExport(Pass):  # type: ignore[misc]
    """Write a prefill and a decode graph with 16-bit activations and the checkpoint's integer weights."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return parameters(HtpQdqExportOptions)

    def _run_for_config(
        self, model: HfModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        settings, output = chosen(HtpQdqExportOptions, config), Path(output_model_path)
        export(Path(model.model_name_or_path), output, settings)
        return ONNXModelHandler(str(output), onnx_file_name=graph_file(1, settings.form))


def export(checkpoint: Path, output: Path, config: HtpQdqExportOptions) -> None:
    """Write the graphs, the host's tables, ``htp.json``, ``genai_config.json`` and the tokenizer's files.

    Args:
        checkpoint: Qwen2 or Qwen3 folder; for the form ``qdq`` one that ``CalibratedGptq`` quantised: symmetric, one
            scale per output.
        output: made when it is not there.

    Raises:
        ExportError: another attention than full attention, or other grids than the HTP takes.
    """
    linears = Linears(checkpoint)
    tables = FloatTables.of(linears, config.context)
    output.mkdir(parents=True, exist_ok=True)
    grids = _grids(linears, tables, output, config) if config.form == QDQ else {}
    data = DataFile(output / DATA_FILE)
    windows = (config.prefill, 1)
    for tokens in windows:
        writer = QdqWriter(data, grids) if grids else FloatWriter(data, ranges=False)
        sizes = Sizes.read(linears.config, tokens, config.context)
        onnx.save(Decoder(writer, linears, sizes).write(), str(output / graph_file(tokens, config.form)))
    for name, key, table in (
        ("embeddings", EMBEDDINGS, tables.embeddings),
        ("cosines", COSINES, tables.cosines),
        ("sines", SINES, tables.sines),
    ):
        np.save(output / f"{name}.npy", grids[key].quantize(table) if grids else table)
    shown = _interface_grids(grids, sizes.layers) if grids else {}
    cache = cache_of(sizes)
    HtpFolder(output, config.form, windows, config.context, sizes.vocabulary, cache, shown).write()
    write_genai_config(checkpoint, output, linears.config, config)
    for name in TOKENIZER_FILES:
        if (checkpoint / name).exists():
            shutil.copyfile(checkpoint / name, output / name)


def _grids(linears: Linears, tables: FloatTables, output: Path, config: HtpQdqExportOptions) -> dict[str, Grid]:
    """Calibrate in a folder that is gone afterwards."""
    from transformers import PreTrainedTokenizerFast

    sizes = Sizes.read(linears.config, config.prefill, config.context)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(linears.folder, trust_remote_code=False)
    windows = calibration_ids(tokenizer, config.windows, min(config.window, config.context), config.seed)
    with tempfile.TemporaryDirectory(prefix=".float-", dir=output) as folder:
        decoder = float_decoder(linears, sizes, tables, Path(folder), threads=THREADS)
        return calibrated_grids(decoder, windows, tables)


def _interface_grids(grids: dict[str, Grid], layers: int) -> dict[str, Grid]:
    """The grids of the graph's inputs and outputs, which the host must know."""
    shown = {name: grids[name] for name in (EMBEDDINGS, COSINES, SINES, MASK, LOGITS)}
    for layer in range(layers):
        attention = f"model.layers.{layer}.self_attn"
        shown[f"past_k.{layer}"] = grids[f"{attention}.k.rotated"]
        shown[f"past_v.{layer}"] = grids[f"{attention}.v_proj.out"]
    return shown


def write_genai_config(checkpoint: Path, output: Path, settings: dict[str, Any], config: HtpQdqExportOptions) -> None:
    """What our tools read of an artifact; onnxruntime-genai itself has no loop for these graphs."""
    place = checkpoint / "generation_config.json"
    generation = read_json(place) if place.exists() else {}
    options: list[dict[str, Any]] = [{"qnn": {}}] if config.form == QDQ else []
    model = {
        "type": settings["model_type"],
        "context_length": config.context,
        "vocab_size": settings["vocab_size"],
        "eos_token_id": generation.get("eos_token_id", settings.get("eos_token_id")),
        "decoder": {
            "filename": graph_file(1, CONTEXT),
            "session_options": {"provider_options": options},
        },
    }
    (output / "genai_config.json").write_text(json.dumps({"model": model}, indent=2), encoding="utf-8")
