"""What the checks share: everything is loaded when first asked for, and once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qwen_onnx.catalog.schema import Limits, Verification
from qwen_onnx.processes.progress import progress
from qwen_onnx.verify import corpus
from qwen_onnx.verify.baseline import CheckpointTokenizer, TorchBaseline
from qwen_onnx.verify.drift import DriftStudy, Scorer
from qwen_onnx.verify.parity import decode_positions
from qwen_onnx.verify.records import Drift, Latency, VerifyOptions
from qwen_onnx.verify.scoring import Logits, OnnxScorer

if TYPE_CHECKING:
    from qwen_onnx.runtime.engines.genai import Engine
    from qwen_onnx.runtime.processing.template import ChatTemplate
    from qwen_onnx.runtime.processing.tokenizer import TextTokenizer


class Runner(Protocol):
    """An engine of another kind, see ``qwen_onnx.runtime.engines.runners.client.Runner``."""

    context_length: int

    def logits(self, ids: Sequence[int]) -> Logits: ...

    def forced_logits(self, prompt_ids: Sequence[int], continuation_ids: Sequence[int]) -> Logits: ...

    def generate(
        self, prompt_ids: Sequence[int], *, max_new_tokens: int, stop_on_eos: bool = True
    ) -> Iterator[int]: ...


class Context:
    """One verification. ``drift`` and ``latency`` are filled in by the checks that measure them."""

    def __init__(
        self,
        artifact: Path,
        checkpoint: Path,
        reference: Path | None,
        limits: Limits,
        level: Verification,
        options: VerifyOptions,
        runner: Callable[[Path], Runner] | None,
        simulator: Callable[[Path], Runner] | None,
    ) -> None:
        self.artifact, self.checkpoint, self.reference = artifact, checkpoint, reference
        self.limits, self.level, self.options = limits, level, options
        self._runner, self.simulator = runner, simulator
        self.drift: Drift | None = None
        self.latency: Latency | None = None

    @cached_property
    def truth(self) -> CheckpointTokenizer:
        """The checkpoint's tokenizer and template."""
        return CheckpointTokenizer(self.checkpoint)

    @cached_property
    def documents(self) -> dict[str, list[corpus.Document]]:
        """Evaluation texts by domain."""
        return corpus.domains(self.truth.render if self.truth.chats else None)

    @cached_property
    def pools(self) -> dict[str, list[corpus.Window]]:
        """Windows of token ids by domain; the checkpoint's tokenizer gives the ids for both sides."""
        size = self.options.window
        return {name: corpus.windows(name, docs, self.truth.encode, size) for name, docs in self.documents.items()}

    @cached_property
    def scorer(self) -> Scorer:
        """The artifact on a plain ``InferenceSession``, or by its runner."""
        return self._scorer(self.artifact)

    def _scorer(self, folder: Path) -> Scorer:
        return self._runner(folder) if self._runner else OnnxScorer(folder, self.options.threads)

    @cached_property
    def study(self) -> DriftStudy:
        """The first sample of teacher-forced positions, with those of the reference export."""
        progress("drift: loading PyTorch fp32")
        baseline = TorchBaseline(self.checkpoint, self.options.threads)
        reference = (lambda folder=self.reference: self._scorer(folder)) if self.reference else None
        study = DriftStudy(baseline, self.scorer, reference, self.pools, self.options)
        study.start()
        return study

    @cached_property
    def engine(self) -> Engine | Runner:
        """The engine that serves, on the CPU where the target's own provider is not here; or the runner."""
        return self._engine(self.artifact, on_cpu=self.level is Verification.NUMERICS_ON_CPU)

    def _engine(self, folder: Path, *, on_cpu: bool = False) -> Engine | Runner:
        from qwen_onnx.runtime.engines.genai import Engine

        return self._runner(folder) if self._runner else Engine(folder, threads=self.options.threads, on_cpu=on_cpu)

    def reference_decode(self, prompts: Mapping[str, Sequence[int]]) -> float:
        """Mean KLD of the fp32 export's decode path to its own prefill, in nats, on the first of ``prompts``."""
        assert self.reference is not None
        first = dict(list(prompts.items())[:1])
        # one after the other: each holds more than the fp32 weights
        engine = self._engine(self.reference)
        decoded = {tuple(ids): engine.forced_logits(ids[:1], ids[1:]) for ids in first.values()}
        del engine
        scorer = self._scorer(self.reference)
        found = decode_positions(lambda ids: decoded[tuple(ids)], scorer.logits, first)
        return float(found.kld.mean())

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer that serves."""
        from qwen_onnx.runtime.processing.tokenizer import TextTokenizer

        return TextTokenizer(self.artifact)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template that serves."""
        from qwen_onnx.runtime.processing.template import ChatTemplate

        return ChatTemplate(self.artifact)

    def release(self) -> None:
        """Drop models and sessions, so that the latency check has the machine to itself."""
        for name in ("study", "scorer", "engine"):
            self.__dict__.pop(name, None)
