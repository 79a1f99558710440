"""What a service asks of an engine and what comes back. Engines know token ids only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, Protocol

from qwen_onnx.errors import QwenOnnxError
from qwen_onnx.runtime.engines.adapters import AdapterSource, Loaded
from qwen_onnx.runtime.engines.genai import Shape
from qwen_onnx.runtime.engines.media import Medium
from qwen_onnx.runtime.engines.sampling import GREEDY, Sampling

CLOSED = "the engine is closed"
EngineFinish = Literal["stop", "length", "cancelled"]
# (token id, log probability), most likely first
Top = tuple[tuple[int, float], ...]


# whose request it is, for every request that is made in this context; see ``TokenRequest.cache_scope``
cache_scope: ContextVar[str] = ContextVar("qwen_onnx_cache_scope", default="")


@contextmanager
def cache_scoped(client: str) -> Iterator[None]:
    """Requests made in the block share kept prefixes with others of the same ``client`` alone.

    What is found of a prompt shows in ``cached_tokens`` and in the time to the first token: without scopes whoever
    shares an engine could guess another's prompt token by token.
    """
    token = cache_scope.set(hashlib.sha256(b"cache scope " + client.encode("utf-8", "surrogatepass")).hexdigest())
    try:
        yield
    finally:
        cache_scope.reset(token)


@dataclass(frozen=True)
class TokenRequest:
    """One generation: ids in [0, vocab_size), at most ``max_new_tokens`` more; EOS ends it and is not told.

    Args:
        logprobs: how many alternatives are told beside each token; None: no log probabilities.
        echo: with ``logprobs``, those of the prompt are told too, and that of the EOS that ends the answer. Then
            ``max_new_tokens`` may be 0.
        cache_scope: prefixes that another scope left in the cache are not used.
        media: in the order in which the prompt has room for them, see ``media.places_of``.
        adapter: name of one that the engine was given; None: the model alone.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_on_eos: bool = True
    logprobs: int | None = None
    grammar: str | None = None
    echo: bool = False
    cache_scope: str = ""
    media: tuple[Medium, ...] = ()
    adapter: str | None = None

    @property
    def scored(self) -> bool:
        """Whether log probabilities of the prompt are told."""
        return self.echo and self.logprobs is not None

    def check(self, shape: Shape) -> None:
        """Refuse what does not fit; see ``Shape.check``."""
        shape.check(self.prompt_ids, self.max_new_tokens, least=0 if self.echo else 1)


@dataclass(frozen=True)
class TokenEvent:
    """A new token, log probabilities of the prompt, or the end: ``finish`` or ``error``. After the end nothing comes.

    Args:
        prompt: (log probability, likeliest) of the prompt's next tokens; its first token has none.
        token: at the end it is the EOS, which only a request with ``echo`` hears of.
    """

    token: int | None = None
    logprob: float | None = None
    top: Top = ()
    finish: EngineFinish | None = None
    error: QwenOnnxError | None = None
    cached_tokens: int = 0
    prompt: tuple[tuple[float, Top], ...] = ()

    @property
    def last(self) -> bool:
        """Whether this is the end."""
        return self.finish is not None or self.error is not None


Listener = Callable[[TokenEvent], None]


@dataclass(frozen=True)
class EngineStats:
    """A picture of the engine. Tokens and requests are counted since it was loaded.

    Args:
        streams: how many requests it runs at once at most; ``queue_size``: how many more may wait.
        kv_tokens: tokens in the KV cache, those that are kept for their prefix included; ``kv_capacity``: at most.
        kv_token_bytes: memory of one of them; 0 where the engine does not tell.
        drafted_tokens: guessed ones that were computed; accepted_tokens: those of them that were right.
        restarts: how often the engine's process was started again.
        resident_bytes: memory of the process that holds the model.
        alive: whether it answers now; failed: it does not and never will, so that somebody must start it anew.
    """

    kind: str
    streams: int
    running: int
    waiting: int
    queue_size: int
    kv_tokens: int
    kv_capacity: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    restarts: int
    resident_bytes: int
    alive: bool = True
    failed: bool = False
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    kv_token_bytes: int = 0

    @property
    def full(self) -> bool:
        """Whether one more request would be turned away; a queue of size 0 is full when every stream is taken."""
        return self.running >= self.streams and self.waiting >= self.queue_size


class Handle(Protocol):
    """A request under way."""

    def cancel(self) -> None:
        """Stop it within one step; the listener hears ``finish="cancelled"``. Idempotent, from any thread."""


class TokenEngine(Protocol):
    """Runs requests; thread-safe."""

    shape: Shape
    # which of ``sampling.ALL_FEATURES`` it honours; a service refuses the others
    features: frozenset[str]

    @property
    def adapters(self) -> tuple[Loaded, ...]:
        """Those that requests may name now."""

    def load_adapter(self, source: AdapterSource) -> None:
        """Hold an adapter; others that are not in use may be dropped for it. One that is held already is kept.

        Raises:
            RequestError: it exceeds the budget alone, or the engine takes none. ConflictError: another has its name.
            ArtifactError: it does not fit. OverloadedError: what fills the budget is in use.
        """

    def unload_adapter(self, name: str) -> None:
        """Drop an adapter.

        Raises:
            RequestError: it is not held. ConflictError: it is in use, or was given at the start.
        """

    def submit(self, request: TokenRequest, listener: Listener) -> Handle:
        """Queue a request. ``listener`` is called from a thread of the engine and must not block.

        Raises:
            RequestError, PromptTooLongError: see ``Shape.check``; or a field that the engine does not honour.
            OverloadedError: the queue is full.
            WorkerDiedError: the engine's process died and is not back yet.
        """

    def stats(self) -> EngineStats:
        """Now."""

    def close(self) -> None:
        """Cancel what runs and free the model."""
