"""The two models that lm-eval asks: the artifact as it is served, and the checkpoint in PyTorch.

Both get the same token ids, the same end-of-text tokens and the same room, and both are greedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from lm_eval.api.model import TemplateLM

from qwen_onnx.catalog.schema import Verification
from qwen_onnx.errors import VerificationError
from qwen_onnx.runtime.engines.genai import Shape
from qwen_onnx.runtime.processing.tokenizer import StreamDecoder, TextTokenizer
from qwen_onnx.runtime.service.answers import StopStrings
from qwen_onnx.runtime.service.generation import GenerationConfig
from qwen_onnx.runtime.service.qwen import QwenService
from qwen_onnx.verify.context import Context
from qwen_onnx.verify.softmax import Logits

# what lm-eval's models generate where a task says nothing
MOST_NEW_TOKENS = 256
# lm-eval sends it to a server; such an answer depends on nothing else that runs
SEED = 1234

# (prompt, continuation) each → log probability of the continuation, and whether it is what greedy decoding gives
Score = Callable[[Sequence[tuple[list[int], list[int]]]], list[tuple[float, bool]]]


class Wanted(NamedTuple):
    """An answer: at most so many tokens, up to the first of the stop strings."""

    prompt: list[int]
    most: int
    stops: tuple[str, ...]


Generate = Callable[[Sequence[Wanted]], list[str]]


@contextmanager
def torch_side(context: Context, *, whole: bool) -> Iterator[Any]:
    """The checkpoint in PyTorch fp32.

    Args:
        whole: by lm-eval's own model, in memory; else layer by layer.

    Raises:
        VerificationError: transformers cannot load the folder.
    """
    if whole:
        yield _whole(context)
        return
    from qwen_onnx.verify.tasks.streamed import Streamed

    streamed = Streamed(context)
    yield Asked(context, streamed.score, streamed.generate)


def _whole(context: Context) -> Any:
    """lm-eval's own model.

    Raises:
        VerificationError: transformers cannot load the folder.
    """
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig as TorchGenerationConfig

    torch.set_num_threads(context.options.threads)
    shape = Shape.read(context.artifact)
    ends = sorted(shape.eos_token_ids)
    try:
        model = HFLM(
            pretrained=str(context.checkpoint),
            tokenizer=context.truth.tokenizer,
            dtype="float32",
            device="cpu",
            batch_size=1,
            # it leaves the last token out of what it counts
            max_length=shape.context_length - 1,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise VerificationError(
            f"PyTorch cannot load the checkpoint: {error}", where=str(context.checkpoint)
        ) from error
    # checkpoints bring a repetition penalty, which would bind one side alone
    model.model.generation_config = TorchGenerationConfig(eos_token_id=ends, pad_token_id=ends[0] if ends else 0)
    return model


@contextmanager
def artifact_side(context: Context) -> Iterator[Any]:
    """The artifact: through the batch engine where that serves it, else through the engine that verification measures.

    The latter reads a continuation token by token, as it would decode it.
    """
    service = _served(context)
    try:
        if service is not None:
            score, generate = _by_service(service)
        else:
            score, generate = _by_engine(context)
        yield Asked(context, score, generate)
    finally:
        if service is not None:
            service.close()


def _served(context: Context) -> QwenService | None:
    if context.level is not Verification.RUN:
        return None
    # steps of one token, as decoding was proven
    service = QwenService(context.artifact, threads=context.options.threads, streams=1, speculate="off")
    if "echo" in service.engine.features:
        return service
    service.close()
    return None


def _by_service(service: QwenService) -> tuple[Score, Generate]:
    scored = GenerationConfig(echo=True, max_new_tokens=0, logprobs=1, seed=SEED)

    def score(prompt: list[int], continuation: list[int]) -> tuple[float, bool]:
        entries = service.generate([*prompt, *continuation], scored).logprobs[len(prompt) :]
        values = [entry.logprob or 0.0 for entry in entries]
        return sum(values), all(entry.top[0].logprob == entry.logprob for entry in entries)

    def generate(wanted: Wanted) -> str:
        asked = GenerationConfig(max_new_tokens=wanted.most, stop=wanted.stops, seed=SEED)
        return service.generate(wanted.prompt, asked).text

    return _each(score), lambda asked: list(map(generate, asked))


def _by_engine(context: Context) -> tuple[Score, Generate]:
    engine, tokenizer = context.engine, context.tokenizer

    def score(prompt: list[int], continuation: list[int]) -> tuple[float, bool]:
        return scored(engine.forced_logits(prompt, continuation[:-1]), continuation)

    def generate(wanted: Wanted) -> str:
        return said(engine.generate(wanted.prompt, max_new_tokens=wanted.most), wanted.stops, tokenizer).text

    return _each(score), lambda asked: list(map(generate, asked))


def _each(score: Callable[[list[int], list[int]], tuple[float, bool]]) -> Score:
    return lambda pairs: [score(prompt, continuation) for prompt, continuation in pairs]


def scored(logits: Logits, continuation: Sequence[int]) -> tuple[float, bool]:
    """Log probability of a continuation in nats, and whether greedy decoding gives it.

    Args:
        logits: [tokens of the continuation, vocabulary], what each of them was drawn from.
    """
    rows = np.asarray(logits, np.float64)
    rows -= rows.max(axis=-1, keepdims=True)
    values = rows[np.arange(len(continuation)), continuation] - np.log(np.exp(rows).sum(axis=-1))
    return float(values.sum()), bool((rows.argmax(axis=-1) == continuation).all())


class Said(NamedTuple):
    """The text of tokens, and whether a stop string ended it."""

    text: str
    stopped: bool


def said(tokens: Iterable[int], stops: Sequence[str], tokenizer: TextTokenizer) -> Said:
    """The text before the first stop string; no more tokens are taken than it needs."""
    decoder, stopper, text = StreamDecoder(tokenizer), StopStrings(tuple(stops)), ""
    for token in tokens:
        text += stopper.push(decoder.push(token))
        if stopper.hit:
            return Said(text, True)
    text += stopper.push(decoder.flush())
    return Said(text + stopper.flush(), stopper.hit)


class Asked(TemplateLM):  # type: ignore[misc]
    """A model of ours behind lm-eval's interface.

    Args:
        score, generate: how it answers.
    """

    def __init__(self, context: Context, score: Score, generate: Generate) -> None:
        super().__init__()
        self._truth, self._score, self._generate = context.truth, score, generate
        self._shape = Shape.read(context.artifact)

    @property
    def eot_token_id(self) -> int:
        """What stands before a text that has nothing before it; as PyTorch's side has it."""
        return int(self._truth.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """See ``eot_token_id``."""
        first = self._truth.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        """Token ids by the checkpoint's tokenizer; the check ``tokenizer`` shows that ours gives the same."""
        return self._truth.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _pair, prompt, continuation in requests:
            room = self._shape.context_length - len(continuation)
            if room < 1:
                raise VerificationError(
                    f"a continuation of {len(continuation)} tokens fills the context of {self._shape.context_length}"
                )
            pairs.append((prompt[-room:], continuation))
        return self._score(pairs)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """See lm-eval's ``LM``."""
        return self._generate([self._wanted(*request.args) for request in requests])

    def _wanted(self, text: str, asked: dict[str, Any]) -> Wanted:
        if asked.get("do_sample"):
            raise VerificationError("this benchmark draws its answers, which two models cannot be compared by")
        until = asked.get("until") or []
        stops = [until] if isinstance(until, str) else until
        most = int(asked.get("max_gen_toks", MOST_NEW_TOKENS))
        room = self._shape.context_length - 1 - most
        if room < 1:
            raise VerificationError(f"an answer of {most} tokens fills the context of {self._shape.context_length}")
        return Wanted(self.tok_encode(text)[-room:], most, tuple(dict.fromkeys(stops)))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Not offered: the check ``drift`` measures perplexity."""
        raise VerificationError("benchmarks of perplexity are not run; the check drift measures it")
