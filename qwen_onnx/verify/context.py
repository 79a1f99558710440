"""What the checks share: everything is loaded when first asked for, and once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.artifact.kv_scales import Floats
from qwen_onnx.catalog.schema import Limits, Verification
from qwen_onnx.errors import VerificationError
from qwen_onnx.processes.progress import progress
from qwen_onnx.verify import corpus
from qwen_onnx.verify.baseline import CheckpointTokenizer
from qwen_onnx.verify.drift import DriftStudy, Prepared, Scorer
from qwen_onnx.verify.ends import widened_parts
from qwen_onnx.verify.graph import Graph
from qwen_onnx.verify.loaded import Loaded
from qwen_onnx.verify.nibbles import in_nibbles
from qwen_onnx.verify.parity import CONVERSATIONS, decode_positions
from qwen_onnx.verify.records import Drift, Latency, TaskResult, VerifyOptions
from qwen_onnx.verify.scoring import OnnxScorer, Positions, compare
from qwen_onnx.verify.slices import SlicedScorer, decoded
from qwen_onnx.verify.softmax import Logits

if TYPE_CHECKING:
    from qwen_onnx.runtime.engines.genai import Engine
    from qwen_onnx.runtime.processing.template import ChatTemplate
    from qwen_onnx.runtime.processing.tokenizer import TextTokenizer
    from qwen_onnx.verify.answers import Answers
    from qwen_onnx.verify.golden import Golden
    from qwen_onnx.verify.keeping import Keep
    from qwen_onnx.verify.tower import Tower


Made = TypeVar("Made")

PLAIN_PROMPTS = ["The capital of France is", "def main():"]


class Runner(Protocol):
    """An engine of another kind, see ``qwen_onnx.runtime.engines.runners.client.Runner``."""

    context_length: int

    def logits(self, ids: Sequence[int]) -> Logits: ...

    def forced_logits(self, prompt_ids: Sequence[int], continuation_ids: Sequence[int]) -> Logits: ...

    def generate(
        self, prompt_ids: Sequence[int], *, max_new_tokens: int, stop_on_eos: bool = True
    ) -> Iterator[int]: ...


class Context:
    """One verification.

    ``drift``, ``latency``, ``tasks``, ``golden`` and ``kv_scales`` are filled in by the checks that find them.
    """

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
        scratch: Path,
        keep: Keep | None = None,
    ) -> None:
        self.scratch, self.keep = scratch, keep
        self.golden: Golden | None = None
        self.artifact, self.checkpoint, self.reference = artifact, checkpoint, reference
        self.limits, self.level, self.options = limits, level, options
        self._runner, self.simulator = runner, simulator
        self._loaded = Loaded(alone=runner is None)
        self._made: dict[str, Any] = {}
        self.drift: Drift | None = None
        self.latency: Latency | None = None
        self.tasks: tuple[TaskResult, ...] = ()
        self.kv_scales: Floats | None = None

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

    @property
    def scorer(self) -> Scorer:
        """The artifact on a plain ``InferenceSession``, or by its runner; drops ``engine``."""
        return self._loaded.get("scorer", lambda: self._scorer(self.artifact))

    def _scorer(self, folder: Path) -> Scorer:
        if self._runner:
            return self._runner(folder)
        return self._session() if folder == self.artifact else OnnxScorer(folder, self.options.threads)

    def _session(self, *, in_float32: bool = False) -> Scorer:
        """The artifact by ONNX Runtime, in slices if the options say so."""
        threads = self.options.threads
        if self.slice_layers is None:
            return OnnxScorer(self.artifact, threads, in_float32=in_float32)
        return SlicedScorer(self._graph(), threads, self.scratch, self.slice_layers, in_float32=in_float32)

    @property
    def slice_layers(self) -> int | None:
        """Layers of the artifact that are loaded at once; None for all of them."""
        return self.options.layers_at_once

    @cached_property
    def teacher(self) -> Answers:
        """The checkpoint in PyTorch fp32, layer by layer."""
        from qwen_onnx.verify.answers import Answers
        from qwen_onnx.verify.teacher import Teacher

        return Answers(Teacher(self.checkpoint, self.options.threads), self.scratch)

    @cached_property
    def tower(self) -> Tower:
        """The checkpoint's tower in PyTorch fp32."""
        from qwen_onnx.verify.tower import tower_beside

        return tower_beside(self.checkpoint)

    @cached_property
    def study(self) -> DriftStudy:
        """The first sample of teacher-forced positions, with those of the reference export if there is one."""
        reference = (lambda folder=self.reference: self._scorer(folder)) if self.reference else None
        study = DriftStudy(
            self.teacher, lambda: self.scorer, reference, self.pools, self.options, golden=self.keep is not None
        )
        study.start()
        return study

    @cached_property
    def graph(self) -> Graph | None:
        """The artifact's graph, unless it is another engine's."""
        return None if self._runner is not None else self._graph()

    def _graph(self) -> Graph:
        return Graph(self.artifact / GenaiConfig.read(self.artifact, VerificationError).graph_file)

    def graph_positions(self, graph: Graph) -> tuple[Positions, dict[str, float]]:
        """The graph in fp32 arithmetic against PyTorch with the graph's own dequantised matrices.

        Returns:
            Positions of the first window of each domain; and for each matrix how far its worst row is from the
            checkpoint's, see ``matrices.worst_row``.
        """
        from qwen_onnx.verify.answers import Answers
        from qwen_onnx.verify.teacher import student_of

        texts = [pool[0].ids for pool in self.pools.values() if pool]
        student = student_of(self.checkpoint, graph, self.options.threads)
        progress(f"graph parity: {len(texts)} windows, PyTorch with the artifact's matrices")
        answers = Answers(student, self.scratch)
        answers.prepare(texts)
        progress("graph parity: the artifact with fp32 activations")
        exact = self._session(in_float32=True)
        if isinstance(exact, Prepared):
            exact.prepare(texts)
        parts = [compare(answers.logits(ids), exact.logits(ids), ids, self.options.threads) for ids in texts]
        del exact
        return Positions.join(parts), student.errors()

    @property
    def engine(self) -> Engine | Runner:
        """The engine that serves, on the CPU where the target's own is not here; or the runner. Drops ``scorer``."""
        on_cpu = self.level is Verification.NUMERICS_ON_CPU
        return self._loaded.get("engine", lambda: self._engine(self.artifact, on_cpu=on_cpu))

    def _engine(self, folder: Path, *, on_cpu: bool = False) -> Engine | Runner:
        from qwen_onnx.runtime.engines.genai import Engine

        return self._runner(folder) if self._runner else Engine(folder, threads=self.options.threads, on_cpu=on_cpu)

    def decoded(self, texts: Sequence[Sequence[int]]) -> list[Logits]:
        """Logits of each text as served, token by token through the KV cache; drops ``scorer``."""
        if self.slice_layers is None:
            engine = self.engine
            return [engine.forced_logits(ids[:1], ids[1:]) for ids in texts]
        self.unload()
        return decoded(self._graph(), self.options.threads, self.slice_layers, texts)

    def exact_decode(self, prompts: Mapping[str, Sequence[int]]) -> float | None:
        """Mean KLD in nats of decoding through the KV cache to prefill, in fp32 arithmetic, on the first prompt.

        By the artifact with fp32 activations, or by the fp32 export; None when there is neither.
        """
        if self.reference is None and self.graph is None:
            return None
        first = dict(list(prompts.items())[:1])
        # one after the other: each holds its own copy of the weights
        self.unload()
        found = decode_positions(self._exactly_decoded, self._exact_scorer, first, self.options.threads)
        return float(found.kld.mean())

    def _exactly_decoded(self, texts: Sequence[Sequence[int]]) -> list[Logits]:
        if self.slice_layers is not None:
            return decoded(self._graph(), self.options.threads, self.slice_layers, texts, in_float32=True)
        engine = self._engine(self.reference) if self.reference else self._exact_engine()
        return [engine.forced_logits(ids[:1], ids[1:]) for ids in texts]

    def _exact_scorer(self) -> Scorer:
        return self._scorer(self.reference) if self.reference else self._session(in_float32=True)

    def _exact_engine(self) -> Engine:
        from qwen_onnx.runtime.engines.genai import Engine

        graph = self._graph()
        graph.in_float32()
        # one token at a time, it would make matrices of 8 bits anew for each
        in_nibbles(graph)
        graphs = {graph.file.name: graph.serialized()} | widened_parts(self.artifact)
        return Engine(self.artifact, threads=self.options.threads, on_cpu=True, graphs=graphs)

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

    def greedy_prompts(self) -> list[list[int]]:
        """Token ids of what greedy answers answer."""
        truth = self.truth
        texts = (
            [truth.render(messages, prompt=True) for messages in CONVERSATIONS[:2]] if truth.chats else PLAIN_PROMPTS
        )
        return [truth.encode(text) for text in texts]

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """What ``make`` gives, which several checks need; made when it is first asked for by this name."""
        if name not in self._made:
            self._made[name] = make()
        found: Made = self._made[name]
        return found

    def unload(self) -> None:
        """Drop ``scorer`` and ``engine``, before the artifact is loaded in another way."""
        self._loaded.drop()

    def release(self) -> None:
        """Drop models and sessions, so that the latency check has the machine to itself."""
        self.unload()
        for name in ("study", "teacher", "tower"):
            self.__dict__.pop(name, None)
