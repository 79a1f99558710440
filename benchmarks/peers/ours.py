"""An artifact of ours: as verification scores it, as ``generate`` runs it, and as ``serve`` runs several at once."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.worker import Clock, Run, Score, Settings


def scorer(settings: Settings) -> Score:
    """Logits of all positions, see ``worker``."""
    from qwen_onnx.verify.scoring import OnnxScorer

    return OnnxScorer(Path(settings.model), settings.threads).logits


def runner(settings: Settings) -> Run:
    """One stream by onnxruntime-genai, several by continuous batching."""
    return _alone(settings) if settings.streams == 1 else _batched(settings)


def _alone(settings: Settings) -> Run:
    from qwen_onnx.runtime.engines.genai import Engine

    engine = Engine(Path(settings.model), threads=settings.threads)

    def run(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[float]]:
        clock = Clock(1)
        for _ in engine.generate(prompts[0], max_new_tokens=new_tokens, stop_on_eos=False):
            clock.arrived(0)
        return clock.arrivals

    return run


def _batched(settings: Settings) -> Run:
    from qwen_onnx.runtime.engines.batch import BatchEngine
    from qwen_onnx.runtime.engines.interface import Listener, TokenEvent, TokenRequest

    engine = BatchEngine(
        Path(settings.model), streams=settings.streams, capacity=settings.capacity, threads=settings.threads
    )
    runs = 0

    def run(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[float]]:
        nonlocal runs
        runs += 1
        clock, ended = Clock(len(prompts)), queue.SimpleQueue[TokenEvent]()

        def listener(stream: int) -> Listener:
            def told(event: TokenEvent) -> None:
                if event.token is not None:
                    clock.arrived(stream)
                if event.last:
                    ended.put(event)

            return told

        for stream, ids in enumerate(prompts):
            # a scope of its own: nothing that an earlier prompt left in the cache is used
            scope = f"{runs}.{stream}"
            request = TokenRequest(tuple(ids), new_tokens, stop_on_eos=False, cache_scope=scope)
            engine.submit(request, listener(stream))
        for _ in prompts:
            if error := ended.get().error:
                raise error
        return clock.arrivals

    return run
