"""The first look at what was built: it loads, and it says something."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.build.estimate import layers_at_once
from qwen_onnx.build.toolchain import THREADS, Toolchain
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.catalog.schema import Verification
from qwen_onnx.errors import ArtifactError, ExportError, VerificationError
from qwen_onnx.processes.progress import progress
from qwen_onnx.runtime.engines.genai import Engine
from qwen_onnx.runtime.processing.tokenizer import TextTokenizer
from qwen_onnx.verify.graph import Graph
from qwen_onnx.verify.slices import SlicedScorer

SMOKE_PROMPT = "The capital of France is"


def smoke(folder: Path, tools: Toolchain, checkpoint: Path) -> Verification:
    """Load and generate, with onnxruntime-genai or the target's runner, unless the plan's level is structure alone.

    Where memory does not hold the artifact, ONNX Runtime reads a prompt through its layers, a few at a time.

    Returns:
        The plan's level, or that of slices.

    Raises:
        ExportError: it does not load, gives no token, or its context is shorter than the plan's.
    """
    plan = tools.plan
    level = plan.verification
    if level is Verification.STRUCTURE:
        return level
    try:
        ids = TextTokenizer(folder).encode(SMOKE_PROMPT)
        layers = layers_at_once(plan, checkpoint)
        if layers is not None:
            _read_in_slices(folder, ids, layers)
            _require_context(GenaiConfig.read(folder).model.context_length, plan)
            return Verification.IN_SLICES
        progress("loading the artifact and generating")
        on_cpu = level is Verification.NUMERICS_ON_CPU
        engine = tools.runner(folder) if tools.runner else Engine(folder, on_cpu=on_cpu)
        tokens = list(engine.generate(ids, max_new_tokens=8, stop_on_eos=False))
    except (ArtifactError, VerificationError) as error:
        raise ExportError(f"the export does not load: {error.what}", where=str(folder)) from error
    if len(tokens) != 8:
        raise ExportError(f"the export generated {len(tokens)} of 8 tokens", where=str(folder))
    _require_context(engine.context_length, plan)
    return level


def _require_context(found: int, plan: Plan) -> None:
    if found < plan.context:
        raise ExportError(f"the export accepts {found} tokens, the recipe promises {plan.context}", where=plan.model)


def _read_in_slices(folder: Path, ids: list[int], layers: int) -> None:
    """Every slice loads, and the logits behind a prompt are numbers.

    Raises:
        ExportError: they are not. VerificationError: a slice does not load.
    """
    progress(f"memory does not hold the artifact: loading {layers} layers at a time and reading a prompt")
    graph = Graph(folder / GenaiConfig.read(folder).graph_file)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        logits = SlicedScorer(graph, THREADS, Path(scratch), layers).logits(ids)
    if not np.isfinite(logits).all():
        raise ExportError("the export gives logits that are no numbers", where=str(folder))
