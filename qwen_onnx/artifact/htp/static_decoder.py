"""The host's side of a decoder of fixed shapes: embeddings, positions, mask and KV cache, in numpy.

The same loop calibrates the float graph, checks the QDQ graph and runs the compiled context, so that none of them can
disagree about what the graph is fed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
Run = Callable[[Feeds], Mapping[str, Array]]
PAST, PRESENT = "past_", "present_"
# axis of the tokens in the cache: keys are transposed, [1, heads, head_dim, tokens]
TOKEN_AXIS = {"k": 3, "v": 2}


@dataclass(frozen=True)
class Tables:
    """What the host looks up, in the number type of the graph's inputs.

    Attributes:
        embeddings: [vocabulary, hidden].
        cosines, sines: [context, head_dim]; the first half of the sines is negated.
        attended, masked: the two values of the mask.
        empty: the cache's zero of each kind and layer, by ``k.0``, ``v.0``, …
    """

    embeddings: Array
    cosines: Array
    sines: Array
    attended: Any
    masked: Any
    empty: Mapping[str, Any]


@dataclass(frozen=True)
class Cache:
    """Sizes of the cache: [1, heads, tokens, head_dim] for each layer."""

    layers: int
    heads: int
    tokens: int
    head_dim: int

    def shape(self, kind: str) -> tuple[int, ...]:
        """Of ``k`` or ``v``."""
        return (1, self.heads) + ((self.head_dim, self.tokens) if kind == "k" else (self.tokens, self.head_dim))


class StaticDecoder:
    """Feeds token ids through graphs of fixed windows, with a KV cache between them.

    Args:
        windows: by number of tokens, what runs a window of that many.
        tables: see ``Tables``.
        cache: its sizes.
    """

    def __init__(self, windows: Mapping[int, Run], tables: Tables, cache: Cache) -> None:
        self.windows, self.tables, self.cache = dict(windows), tables, cache
        self.past: Feeds = {}
        self.length = 0
        self.reset()

    def reset(self) -> None:
        """Forget every token."""
        self.length = 0
        for name, zero in self.tables.empty.items():
            kind = name.split(".")[0]
            self.past[PAST + name] = np.full(self.cache.shape(kind), zero, np.asarray(zero).dtype)

    def feed(self, ids: Sequence[int], tokens: int, wanted: str = "logits") -> Array:
        """Let the decoder read ``ids`` behind what it has read, by windows of ``tokens``.

        Returns:
            The output ``wanted`` of each id: [ids, ...].

        Raises:
            ValueError: there are more tokens than the cache and the tables hold.
        """
        if self.length + len(ids) > len(self.tables.cosines):
            raise ValueError(f"{self.length + len(ids)} tokens exceed the context of {len(self.tables.cosines)}")
        parts = [self._window(ids[begin : begin + tokens], tokens, wanted) for begin in range(0, len(ids), tokens)]
        return np.concatenate(parts)

    def _window(self, ids: Sequence[int], tokens: int, wanted: str) -> Array:
        """One call; what is beyond ``ids`` is padding that comes behind them and is dropped."""
        count = len(ids)
        outputs = self.windows[tokens](self._inputs(ids, tokens))
        for name, past in self.past.items():
            short = name.removeprefix(PAST)
            axis = TOKEN_AXIS[short.split(".")[0]]
            kept = min(count, self.cache.tokens - self.length)
            place = [slice(None)] * past.ndim
            place[axis] = slice(self.length, self.length + kept)
            new = outputs[PRESENT + short]
            past[tuple(place)] = new[(slice(None),) * axis + (slice(0, kept),)]
        self.length += count
        return outputs[wanted][0, :count]

    def _inputs(self, ids: Sequence[int], tokens: int) -> Feeds:
        tables, count, begin = self.tables, len(ids), self.length
        padded = [*ids, *[0] * (tokens - count)]
        places = np.minimum(np.arange(begin, begin + tokens), len(tables.cosines) - 1)
        mask = np.full((1, 1, tokens, self.cache.tokens + tokens), tables.masked, np.asarray(tables.masked).dtype)
        mask[..., :begin] = tables.attended
        causal = np.tril(np.ones((tokens, tokens), bool))
        mask[0, 0, :, self.cache.tokens :][causal] = tables.attended
        return {
            "inputs_embeds": np.asarray(tables.embeddings[padded])[None],
            "cos": np.asarray(tables.cosines[places])[None, None],
            "sin": np.asarray(tables.sines[places])[None, None],
            "mask": mask,
            **self.past,
        }
