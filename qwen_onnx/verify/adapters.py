"""An artifact with an adapter in its slots against PyTorch with the same adapter merged.

Into the checkpoint's weights, or into the artifact's own where the adapter was trained on these.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_onnx.artifact.adapter_file import AdapterDrift, AdapterRecord, graph_digest, read_adapter_file, write_drift
from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.artifact.manifest import Artifact
from qwen_onnx.errors import VerificationError
from qwen_onnx.records import digest_of
from qwen_onnx.runtime.engines.adapters import AdapterSource
from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.runtime.engines.batch.steps import PREFILL_CHUNK
from qwen_onnx.sources.adapter import Adapter
from qwen_onnx.sources.slotted import host_of
from qwen_onnx.sources.streamed import read_tensor
from qwen_onnx.verify.checks import run_check
from qwen_onnx.verify.context import Context
from qwen_onnx.verify.drift import Scorer
from qwen_onnx.verify.records import VerifyOptions
from qwen_onnx.verify.scratch import scratch_folder
from qwen_onnx.verify.served import served_logits
from qwen_onnx.verify.softmax import Logits

if TYPE_CHECKING:
    from qwen_onnx.verify.answers import Answers

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
    """Its drift is that of the adapter in ``file``; ``learnt`` is the same where it was trained on the artifact."""

    file: Path
    learnt: Adapter | None

    @cached_property
    def teacher(self) -> Answers:
        """The weights that the adapter was trained on, with the adapter."""
        if self.learnt is None:
            return super().teacher
        from qwen_onnx.verify.answers import Answers
        from qwen_onnx.verify.matrices import Learnt
        from qwen_onnx.verify.teacher import student_of

        student = student_of(self.checkpoint, self._graph(), self.options.threads)
        matrices = dict(student.replaced)
        for module, parts in self.learnt.tensors.items():
            name = f"model.{module[module.index('layers.') :]}.weight"
            a, b = (read_tensor(stored, {stored: entry}).float() for stored, entry in (parts["A"], parts["B"]))
            matrices[name] = Learnt(student.matrix(name), a, self.learnt.scale * b)
        student.replace(matrices, {}, digest_of([student.replaced_by, self.learnt.digest]))
        return Answers(student, self.scratch)

    def _scorer(self, folder: Path) -> Scorer:
        return _Adapted(folder, self.file, self.options)


def verify_adapter(
    file: Path,
    artifact: Artifact,
    checkpoint: Path,
    options: VerifyOptions,
    cache: Path | None = None,
    learnt: Adapter | None = None,
) -> AdapterRecord:
    """Measure what the adapter in ``file`` drifts, by the artifact's own limits, and write it into the file's record.

    Args:
        checkpoint: with the adapter that the file was made of merged in fp32; or as it is, with ``learnt``.
        cache: keeps what a killed verification had computed.
        learnt: the adapter that the file was made of, where it was trained on the artifact's weights.

    Raises:
        ArtifactError: the adapter does not fit the artifact. VerificationError: the drift cannot be measured.
    """
    plan, folder = artifact.manifest.plan, artifact.path
    graph = GenaiConfig.read(folder).graph_file
    read = read_adapter_file(file, host_of(folder, artifact.manifest))
    with scratch_folder(cache, checkpoint) as scratch:
        context = _Context(folder, checkpoint, None, plan.limits, plan.verification, options, None, None, scratch)
        context.file, context.learnt = file, learnt
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
