"""An artifact with an adapter in its slots against PyTorch with the same adapter merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwen_onnx.artifact.adapter_file import AdapterDrift, AdapterRecord, graph_digest, read_adapter_file, write_drift
from qwen_onnx.artifact.adapter_slots import slots_of_graph
from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.artifact.manifest import Artifact
from qwen_onnx.errors import VerificationError
from qwen_onnx.runtime.engines.adapters import AdapterSource
from qwen_onnx.runtime.engines.batch.engine import PREFILL_CHUNK
from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.sources.fetch import weights_digest
from qwen_onnx.verify.checks import run_check
from qwen_onnx.verify.context import Context
from qwen_onnx.verify.drift import Scorer
from qwen_onnx.verify.records import VerifyOptions
from qwen_onnx.verify.scratch import scratch_folder
from qwen_onnx.verify.served import served_logits
from qwen_onnx.verify.softmax import Logits

NAME = "adapter"


class _Adapted:
    """A ``Scorer``: the engine that serves, with the adapter."""

    def __init__(self, folder: Path, file: Path, options: VerifyOptions) -> None:
        source = AdapterSource.of(NAME, file)
        self._model = BatchModel(
            folder, rows=1, capacity=options.window, chunk=PREFILL_CHUNK, threads=options.threads, adapters=[source]
        )
        if not self._model.tells_every_position:
            raise VerificationError("its graph tells the logits of the last position alone", where=str(folder))

    def logits(self, ids: Sequence[int]) -> Logits:
        """Of all positions, float32."""
        return served_logits(self._model, ids, adapter=NAME)


class _Context(Context):
    """Its drift is that of the adapter in ``file``."""

    file: Path

    def _scorer(self, folder: Path) -> Scorer:
        return _Adapted(folder, self.file, self.options)


def verify_adapter(
    file: Path, artifact: Artifact, merged: Path, options: VerifyOptions, cache: Path | None = None
) -> AdapterRecord:
    """Measure what the adapter in ``file`` drifts, by the artifact's own limits, and write it into the file's record.

    Args:
        merged: the checkpoint with the adapter that the file was made of merged in fp32.
        cache: keeps what a killed verification had computed.

    Raises:
        ArtifactError: the adapter does not fit the artifact. VerificationError: the drift cannot be measured.
    """
    plan, folder = artifact.manifest.plan, artifact.path
    graph = GenaiConfig.read(folder).graph_file
    read = read_adapter_file(file, slots_of_graph(folder / graph), weights_digest(artifact.manifest.source.files))
    with scratch_folder(cache, merged) as scratch:
        context = _Context(folder, merged, None, plan.limits, plan.verification, options, None, None, scratch)
        context.file = file
        found = run_check("drift", context)
        context.release()
    measured = found.measured
    if context.drift is None:
        raise VerificationError(f"the drift was not measured: {found.detail}", where=str(file))
    drift = AdapterDrift(
        graph=graph_digest(artifact.manifest, graph),
        precision=plan.precision,
        verdict=found.verdict,
        positions=context.drift.positions,
        kld_mean=float(measured["kld_mean"]),
        kld_upper=float(measured["kld_mean_upper"]),
        kld_limit=plan.limits.kld_mean,
        top1=float(measured["top1"]),
        ppl_ratio=float(measured["ppl_ratio"]),
    )
    return write_drift(file, read, drift)
