"""POST /v1/completions: https://platform.openai.com/docs/api-reference/completions"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.server.api.chat_response import finite, sse
from qwen_onnx.runtime.server.api.protocol import FIRST_FAULT, SamplingFields, Strict, Usage, ranged
from qwen_onnx.runtime.service.generation import Completion, Delta, TokenLogprob

MOST_PROMPTS = 128
# log probabilities of prompts in one answer, alternatives included: some 30 MB of JSON
MOST_TOLD = 1 << 19

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], FIRST_FAULT, Field(min_length=1)]
Texts = Annotated[list[str], FIRST_FAULT, Field(min_length=1, max_length=MOST_PROMPTS)]
SeveralIds = Annotated[list[Ids], FIRST_FAULT, Field(min_length=1, max_length=MOST_PROMPTS)]


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    model: str
    prompt: str | Texts | Ids | SeveralIds
    logprobs: int | None = Field(default=None, ge=0, le=20, description="Alternatives told beside each token.")
    max_tokens: int | None = ranged("max_new_tokens", least=0)
    echo: bool | None = Field(
        default=None,
        description="The answer begins with the prompt, and logprobs tell of its tokens too. Not with stream.",
    )
    suffix: Literal[""] | None = Field(default=None, description="There is no insertion.")
    best_of: int | None = Field(default=None, ge=1, description="Only equal to n: nothing is thrown away.")

    def prompts(self) -> list[str | list[int]]:
        """Each of them."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(cast("list[str | list[int]]", self.prompt))

    def options(self) -> dict[str, Any]:
        """Arguments of ``GenerationConfig`` that were given.

        Raises:
            RequestError: ``best_of`` is not ``n``; ``echo`` in a stream; ``max_tokens`` 0 without ``echo``.
        """
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens is 0: without echo nothing is left to answer", where="max_tokens")
        if self.echo and self.stream:
            raise RequestError("echo is for whole answers: leave stream out", where="echo")
        if self.best_of not in (None, self.choices):
            raise RequestError("best_of is supported only when it equals n", where="best_of")
        told = {} if self.logprobs is None else {"logprobs": self.logprobs}
        return {**self.sampling(), **told, **({"echo": True} if self.echo else {})}

    def check_told(self, prompt_tokens: int) -> None:
        """RequestError when the log probabilities of so many tokens of prompts make too long an answer."""
        count = prompt_tokens * self.choices * (1 + (self.logprobs or 0))
        if self.echo and self.logprobs is not None and count > MOST_TOLD:
            raise RequestError(
                f"echo would tell {count} log probabilities, the most is {MOST_TOLD}",
                where="echo",
                hint="send fewer prompts, or lower logprobs",
            )


class TextLogprobs(Strict):
    """Lists of one length; ``text_offset`` counts characters from the beginning of the answer.

    The first token of an echoed prompt has null instead of a log probability, and of alternatives. An echoed answer
    tells of the token that ended it, too.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(Strict):
    """The answers to the first prompt come first."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: TextLogprobs | None


class TextCompletion(Strict):
    """A whole answer."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[TextChoice]
    usage: Usage


class TextAnswers:
    """Builds the bodies of one request's answers.

    Args:
        choices: answers to each prompt; logprobs: alternatives told, None: no log probabilities.
    """

    def __init__(self, model: str, fingerprint: str, choices: int, *, logprobs: int | None, with_usage: bool) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._choices, self._most, self._with_usage = choices, logprobs, with_usage
        self._offsets: dict[int, int] = {}

    def whole(self, answers: list[list[Delta]]) -> bytes:
        """A ``text_completion``, as JSON."""
        choices = []
        for index, deltas in enumerate(answers):
            done = Completion.of(deltas)
            choices.append(self._choice(index, done.text, done.finish_reason, done.logprobs))
        used = Usage.of({index: deltas[-1] for index, deltas in enumerate(answers)}, self._choices)
        body = TextCompletion.model_validate({**self._head, "choices": choices, "usage": used})
        return body.model_dump_json().encode()

    def chunk(self, index: int, delta: Delta) -> str:
        """A piece of an answer."""
        choice = self._choice(index, delta.text, delta.finish_reason, delta.logprobs)
        return sse({**self._head, "choices": [choice], **({"usage": None} if self._with_usage else {})})

    def usage_chunks(self, last: dict[int, Delta]) -> list[str]:
        """The chunk that carries the usage and no choice, when it was asked for."""
        if not self._with_usage:
            return []
        return [sse({**self._head, "choices": [], "usage": Usage.of(last, self._choices).model_dump()})]

    def _choice(self, index: int, text: str, reason: str | None, entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        told = self._logprobs(index, entries) if self._most is not None and (entries or reason) else None
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": told}

    def _logprobs(self, index: int, entries: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        offsets = []
        for entry in entries:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(entry.token)
        return {
            "tokens": [entry.token for entry in entries],
            "token_logprobs": [finite(entry.logprob) for entry in entries],
            "top_logprobs": list(map(_likeliest, entries)) if self._most else None,
            "text_offset": offsets,
        }


def _likeliest(entry: TokenLogprob) -> dict[str, float | None] | None:
    """Alternatives by their text; parts of characters share one, and the likeliest of them is told."""
    told: dict[str, float | None] = {}
    for top in entry.top:
        told.setdefault(top.token, finite(top.logprob))
    return told or None
