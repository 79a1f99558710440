"""From logits to the next token: penalties, bias, grammar, temperature, truncation, and what was likely."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen_onnx.runtime.engines.batch.guidance import Matcher
from qwen_onnx.runtime.engines.interface import TokenRequest, Top
from qwen_onnx.runtime.engines.sampling import SAMPLING

Floats = np.ndarray[Any, np.dtype[np.float32]]
Weights = np.ndarray[Any, np.dtype[np.float64]]
Ids = np.ndarray[Any, np.dtype[np.intp]]
# enough candidates for nearly every nucleus; a flatter distribution is sorted whole
CANDIDATES = 256


class Sampler:
    """Draws the tokens of one answer.

    The repetition penalty looks at prompt and answer (Keskar et al. 2019, as transformers has it); presence and
    frequency penalties look at the answer alone (OpenAI's API reference). Log probabilities are those of the model:
    before all of that.

    Args:
        request: what is asked.
        matcher: its grammar, at the start.
        forbidden: ids that are never drawn, e.g. EOS while a fixed number of tokens is measured.
    """

    def __init__(self, request: TokenRequest, matcher: Matcher | None = None, forbidden: tuple[int, ...] = ()) -> None:
        self._options, self._logprobs = request.sampling, request.logprobs
        self._matcher, self._forbidden = matcher, list(forbidden)
        self._random = np.random.default_rng(request.sampling.seed)
        self._seen = set(request.prompt_ids)
        self._counts: dict[int, int] = {}
        self._bias = np.array(list(self._options.logit_bias.values()), np.float32)
        self._biased = list(self._options.logit_bias)
        asked = [(one.keep, getattr(self._options, name), one.default) for name, one in SAMPLING.items()]
        self._kept = [(keep, value) for keep, value, default in asked if keep and value != default]
        penalties = self._options.repetition_penalty != 1 or self._options.presence_penalty
        self._changes = bool(penalties or self._options.frequency_penalty or self._biased or forbidden or matcher)

    def draw(self, logits: Floats) -> tuple[int, float | None, Top]:
        """The next token, its log probability and the likeliest others (when asked for).

        Args:
            logits: float32 [vocab_size]; left as they are.
        """
        scores = self._adjusted(logits)
        token = int(scores.argmax()) if self._options.temperature == 0 else self._drawn(scores)
        self._seen.add(token)
        self._counts[token] = self._counts.get(token, 0) + 1
        if self._matcher:
            self._matcher.consume(token)
        return (token, None, ()) if self._logprobs is None else (token, *self.likely(logits, token))

    @property
    def finished(self) -> bool:
        """Whether the grammar allows nothing more."""
        return self._matcher is not None and self._matcher.finished

    def _adjusted(self, logits: Floats) -> Floats:
        if not self._changes:
            return logits
        options = self._options
        scores = logits.copy()
        if options.repetition_penalty != 1:
            ids = list(self._seen)
            known = scores[ids]
            scores[ids] = np.where(known > 0, known / options.repetition_penalty, known * options.repetition_penalty)
        if self._counts and (options.presence_penalty or options.frequency_penalty):
            counts = np.array(list(self._counts.values()), np.float32)
            scores[list(self._counts)] -= options.presence_penalty + options.frequency_penalty * counts
        if self._biased:
            scores[self._biased] += self._bias
        if self._forbidden:
            scores[self._forbidden] = -np.inf
        if self._matcher:
            scores[~self._matcher.allowed(len(scores))] = -np.inf
        return scores

    def _drawn(self, scores: Floats) -> int:
        options = self._options
        weights = np.exp((scores - scores.max()) / np.float32(options.temperature), dtype=np.float64)
        truncated = options.top_p < 1 or options.top_k
        ids = self._nucleus(weights) if truncated else np.arange(len(weights), dtype=np.intp)
        for keep, value in self._kept:
            ids = ids[keep(weights[ids], value)]
        edges = np.cumsum(weights[ids])
        chosen = np.searchsorted(edges, self._random.random() * edges[-1], "right")
        return int(ids[min(int(chosen), len(ids) - 1)])

    def _nucleus(self, weights: Weights) -> Ids:
        """The top_k largest, and of those the fewest that hold top_p of their weight."""
        most = min(self._options.top_k or len(weights), len(weights))
        if self._options.top_p == 1:
            return _largest(weights, most)
        total = weights.sum() if most == len(weights) else weights[_largest(weights, most)].sum()
        nucleus = self._options.top_p * float(total)
        ids, before = _ranked(weights, min(most, CANDIDATES))
        if len(ids) < most and before[-1] < nucleus:
            ids, before = _ranked(weights, most)
        return ids[before < nucleus]

    def likely(self, logits: Floats, token: int) -> tuple[float, Top]:
        """The log probability of ``token`` after ``logits``, and as many of the likeliest as were asked for."""
        top = float(logits.max())
        norm = top + float(np.log(np.exp(logits - top, dtype=np.float64).sum()))
        ids = _largest(logits, self._logprobs) if self._logprobs else np.arange(0)
        return float(logits[token]) - norm, tuple((int(i), float(logits[i]) - norm) for i in ids)


def _largest(values: np.ndarray[Any, Any], count: int) -> Ids:
    """Indices of the largest values, largest first; equal ones by index, so that a seed decides alike everywhere."""
    if count == 1:
        return np.array([values.argmax()])
    if count < len(values):
        found = np.sort(np.argpartition(values, -count)[-count:])
        return found[np.argsort(-values[found], kind="stable")]
    return np.argsort(-values, kind="stable")


def _ranked(weights: Weights, count: int) -> tuple[Ids, Weights]:
    """The largest, and how much weight stands before each."""
    ids = _largest(weights, count)
    return ids, np.cumsum(weights[ids]) - weights[ids]
