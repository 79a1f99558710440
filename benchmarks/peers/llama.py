"""A GGUF file in llama.cpp, by the C interface that llama-cpp-python binds, with llama.cpp's own defaults.

``python -m benchmarks.peers.llama SOURCE TARGET TYPE THREADS`` quantises one.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from benchmarks.peers.worker import Clock, Logits, Run, Score, Settings
from qwen_onnx.processes.children import die_with_parent

BATCH = 2048  # tokens of a call: llama.cpp's default
ERROR = 4  # of its levels of log


@dataclass(frozen=True)
class Token:
    """One that is read: its place in its stream, and whether logits of what follows it are wanted."""

    id: int
    position: int
    stream: int
    wanted: bool


class Context:
    """A loaded model with a KV cache for each stream."""

    def __init__(self, settings: Settings) -> None:
        _listen()
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            settings.model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise _fault(f"llama.cpp cannot load {settings.model}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        options, streams = llama_cpp.llama_context_default_params(), max(settings.streams, 1)
        options.n_ctx, options.n_seq_max, options.n_batch = settings.capacity * streams, streams, BATCH
        options.n_threads = options.n_threads_batch = settings.threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise _fault(f"llama.cpp gives no context of {options.n_ctx} tokens for {settings.model}")
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def forget(self) -> None:
        """Empty the caches of all streams."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def read(self, tokens: Sequence[Token]) -> Logits:
        """Logits [wanted, vocabulary] after at most ``BATCH`` tokens, a view that the next call overwrites."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token.id, token.position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, token.stream
            batch.logits[place] = token.wanted
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise _fault(f"llama_decode gave {code} for {len(tokens)} tokens")
        wanted = sum(token.wanted for token in tokens)
        shape = (wanted, self._vocabulary)
        if not wanted:
            return np.empty(shape, np.float32)
        found: Logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), shape)
        return found


def scorer(settings: Settings) -> Score:
    """Logits of all positions, see ``worker``."""
    context = Context(settings)

    def score(ids: Sequence[int]) -> Logits:
        context.forget()
        tokens = [Token(token, place, 0, True) for place, token in enumerate(ids)]
        pieces = [context.read(tokens[begin : begin + BATCH]).copy() for begin in range(0, len(tokens), BATCH)]
        return np.concatenate(pieces)

    return score


def runner(settings: Settings) -> Run:
    """Greedy tokens, the prompts of all streams packed into common batches; an end of text does not end them."""
    context = Context(settings)

    def run(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[float]]:
        context.forget()
        clock, newest = Clock(len(prompts)), [0] * len(prompts)

        def read(tokens: Sequence[Token]) -> None:
            drawn: npt.NDArray[Any] = context.read(tokens).argmax(axis=-1)
            streams = [token.stream for token in tokens if token.wanted]
            for stream, token in zip(streams, drawn.tolist(), strict=True):
                newest[stream] = token
                clock.arrived(stream)

        tokens = [
            Token(token, place, stream, place == len(ids) - 1)
            for stream, ids in enumerate(prompts)
            for place, token in enumerate(ids)
        ]
        for begin in range(0, len(tokens), BATCH):
            read(tokens[begin : begin + BATCH])
        for step in range(new_tokens - 1):
            read([Token(newest[stream], len(ids) + step, stream, True) for stream, ids in enumerate(prompts)])
        return clock.arrivals

    return run


_ERRORS: list[str] = []


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _heard(level: int, text: bytes, _data: Any) -> None:
    if level == ERROR:
        _ERRORS.append(text.decode(errors="replace").strip())


def _listen() -> None:
    """Keep what llama.cpp says of errors, and nothing else of what it says."""
    llama_cpp.llama_log_set(_heard, ctypes.c_void_p())


def _fault(what: str) -> RuntimeError:
    return RuntimeError(f"{what}: {_ERRORS[-1]}" if _ERRORS else what)


def quantize(source: str, target: str, kind: str, threads: int) -> None:
    """Write ``source`` with weights of ``kind``, e.g. ``Q4_K_M``; RuntimeError when llama.cpp does not."""
    _listen()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), threads
    code = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options))
    if code != 0:
        raise _fault(f"llama_model_quantize gave {code}")


if __name__ == "__main__":
    die_with_parent()
    quantize(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
