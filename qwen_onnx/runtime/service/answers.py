"""From token events to pieces of an answer: text, stop strings, log probabilities, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from qwen_onnx.runtime.engines.interface import TokenEvent, Top
from qwen_onnx.runtime.processing.tails import Search
from qwen_onnx.runtime.processing.tokenizer import StreamDecoder, TextTokenizer
from qwen_onnx.runtime.service.generation import Delta, FinishReason, GenerationConfig, TokenLogprob


class Answer(Protocol):
    """An answer that grows with the events of the engine."""

    @property
    def finished(self) -> bool:
        """Whether its last piece is told."""

    def feed(self, event: TokenEvent) -> list[Delta]:
        """The pieces that became certain. Raises QwenOnnxError: why there will be no more."""


class Assembler:
    """Builds one answer. Synchronous and asynchronous callers feed the same events to it."""

    def __init__(self, tokenizer: TextTokenizer, config: GenerationConfig, prompt_ids: Sequence[int]) -> None:
        self._tokenizer, self._prompt_tokens = tokenizer, len(prompt_ids)
        self._echo = list(prompt_ids) if config.echo else []
        # nothing stands before the first token
        self._scored: list[tuple[float | None, Top]] = [] if config.logprobs is None else [(None, ())]
        self._decoder, self._stopper = StreamDecoder(tokenizer), StopStrings(config.stop)
        self._count, self._cached = 0, 0
        self._logprobs: list[TokenLogprob] = []
        self.finished = False

    def feed(self, event: TokenEvent) -> list[Delta]:
        """The pieces that became certain; the last one has the reason.

        Raises:
            QwenOnnxError: the engine's, when the event carries one.
        """
        if event.error is not None:
            self.finished = True
            raise event.error
        self._cached = max(self._cached, event.cached_tokens)
        if event.prompt:
            self._scored += event.prompt
            return []
        echoed = [] if event.finish == "cancelled" else self._echoed()
        if event.token is not None and event.logprob is not None:
            self._logprobs.append(self._entry(event.token, event.logprob, event.top))
        if event.last:
            return echoed + self._end("length" if event.finish == "length" else "stop")
        return echoed + self._continued(cast("int", event.token))

    def _continued(self, token: int) -> list[Delta]:
        self._count += 1
        text = self._stopper.push(self._decoder.push(token))
        if self._stopper.hit:
            # the tokens of the stop string are no part of the answer
            self._logprobs.clear()
            return [*self._piece(text), self._last("stop")]
        return self._piece(text)

    def _echoed(self) -> list[Delta]:
        """The prompt as the model read it, once, before anything else."""
        if not self._echo:
            return []
        ids, self._echo = self._echo, []
        text = b"".join(self._tokenizer.piece(token)[1] for token in ids).decode("utf-8", "replace")
        scored = zip(ids, self._scored, strict=True) if self._scored else ()
        entries = tuple(self._entry(token, *told) for token, told in scored)
        return [Delta(text, self._prompt_tokens, 0, None, self._cached, entries)]

    def _entry(self, token: int, logprob: float | None, top: Top = ()) -> TokenLogprob:
        alternatives = tuple(self._entry(other, value) for other, value in top)
        return TokenLogprob(*self._tokenizer.piece(token), logprob, alternatives)

    def _piece(self, text: str) -> list[Delta]:
        if not text:
            return []
        entries, self._logprobs = tuple(self._logprobs), []
        return [Delta(text, self._prompt_tokens, self._count, None, self._cached, entries)]

    def _end(self, reason: FinishReason) -> list[Delta]:
        rest = self._stopper.push(self._decoder.flush()) + self._stopper.flush()
        return [*self._piece(rest), self._last("stop" if self._stopper.hit else reason)]

    def _last(self, reason: FinishReason) -> Delta:
        self.finished = True
        return Delta("", self._prompt_tokens, self._count, reason, self._cached, tuple(self._logprobs))


class StopStrings:
    """Cuts text at the first stop string, also one that spans tokens; the stop string itself is dropped."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(len(stop), Search(stop)) for stop in stops]
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """The part of the text so far that can no longer become a stop string."""
        if self.hit:
            return ""
        before = len(self._held)
        self._held += text
        ends = [(size, search.push(text)) for size, search in self._stops]
        begins = [before + end - size for size, end in ends if end is not None]
        if begins:
            self.hit = True
            return self._release(min(begins))
        return self._release(len(self._held) - max((search.begun for _, search in self._stops), default=0))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def flush(self) -> str:
        """What was held back when no stop string came."""
        return "" if self.hit else self._release(len(self._held))
