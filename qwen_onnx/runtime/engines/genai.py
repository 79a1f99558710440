"""Token ids in, token ids out. Text is the business of ``tokenizer`` and ``template``.

``Engine`` drives a genai ``Generator``, which keeps Python's GIL while it computes: one request at a time, on any
execution provider. It is what verification measures, and what ``serial`` serves where ``batching`` cannot.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from qwen_onnx.artifact.genai_config import GenaiConfig, ids_of
from qwen_onnx.errors import ArtifactError, PromptTooLongError, RequestError
from qwen_onnx.processes.memory import return_free_memory
from qwen_onnx.runtime.engines.media import Medium, Picture, places_of
from qwen_onnx.runtime.engines.sampling import GREEDY, Sampling, search_options

# a prompt goes in by pieces, so that a cancelled request stops within one of them; genai keeps the logits of a
# whole piece: 128 tokens prefill as fast as 512 and need 80 MB less (docs/lab-log.md)
PREFILL_CHUNK = 128
# weights in QDQ form become floats when the model is loaded: a CPU would unpack all of them for every token
UNPACK_QDQ = {"session.disable_quant_qdq": "1"}

Cancelled = Callable[[], bool]


@dataclass(frozen=True)
class Shape:
    """What a request is checked against, and the execution provider that the model was built for."""

    context_length: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    provider: str = "cpu"

    @classmethod
    def read(cls, folder: Path) -> Shape:
        """From ``genai_config.json``; ArtifactError when it is missing, damaged or says more than it may."""
        config = GenaiConfig.read(folder)
        model = config.model
        return cls(model.context_length, model.vocab_size, frozenset(ids_of(model.eos_token_id)), config.provider)

    def check(self, prompt_ids: Sequence[int], new_tokens: int, *, least: int = 1) -> None:
        """Refuse what genai would accept in silence.

        Raises:
            RequestError: no ids, ids out of the vocabulary, fewer than ``least`` tokens to generate.
            PromptTooLongError: prompt plus ``new_tokens`` exceed the context.
        """
        if not prompt_ids:
            raise RequestError("the prompt is empty", where="prompt", hint="send some text")
        if new_tokens < least:
            raise RequestError(f"max_new_tokens is {new_tokens}, the least is {least}", where="max_new_tokens")
        wrong = next((token for token in prompt_ids if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise RequestError(f"token id {wrong} is outside [0, {self.vocab_size})", where="prompt")
        if len(prompt_ids) + new_tokens > self.context_length:
            raise PromptTooLongError(
                f"{len(prompt_ids)} prompt and {new_tokens} new tokens exceed the context of {self.context_length}",
                where="prompt",
                hint="shorten the prompt or lower max_tokens",
            )


def _presented(config: GenaiConfig) -> dict[str, Any]:
    """What genai is told besides of a model that hears, which reads text alone there.

    genai 0.18 has no type with an audio encoder alone. Gemma 3 is a decoder of embeddings with plain positions: the
    encoder stands in the place of its vision encoder, which text never runs.
    """
    speech, embedding = config.model.speech, config.model.embedding
    if speech is None or embedding is None:
        return {}
    return {
        "type": "gemma3",
        "image_token_id": config.model.audio_token_id,
        "embedding": {"inputs": {"image_features": embedding.inputs.audio_features}},
        "vision": {
            "filename": speech.filename,
            "inputs": {"pixel_values": speech.inputs.audio_embeds},
            "outputs": {"image_features": speech.outputs.audio_features},
        },
    }


class Engine:
    """One exported model in this process.

    Args:
        folder: flat folder with ``genai_config.json`` and ``model.onnx``.
        threads: threads within an operator; None leaves it to onnxruntime.
        on_cpu: run on the CPU whatever provider the artifact was built for.
        graphs: run these serialised graphs, whose weights are in the folder, instead of the folder's of such names.

    Raises:
        ArtifactError: the folder holds no model that genai loads.
    """

    def __init__(
        self,
        folder: Path,
        *,
        threads: int | None = None,
        on_cpu: bool = False,
        graphs: Mapping[str, bytes] | None = None,
    ) -> None:
        self.shape = Shape.read(folder)
        self.context_length = self.shape.context_length
        self.vocab_size = self.shape.vocab_size
        self.eos_token_ids = self.shape.eos_token_ids
        model = GenaiConfig.read(folder).model
        # what stands for a part of a picture; None: it reads text alone
        self.image_token = model.image_token_id if model.vision is not None else None
        self._unspoken = list(model.unspoken)
        try:
            config = og.Config(str(folder))
            session: dict[str, Any] = {} if threads is None else {"intra_op_num_threads": threads}
            if on_cpu:
                config.clear_providers()
                session |= UNPACK_QDQ
            for name, content in (graphs or {}).items():
                config.add_model_data(name, content)
            told: dict[str, Any] = {"decoder": {"session_options": session}, **_presented(GenaiConfig.read(folder))}
            config.overlay(json.dumps({"model": told}))
            self._model = og.Model(config)
            # what ONNX Runtime folded while it loaded is freed, and as large as the weights
            return_free_memory()
        # genai raises bare RuntimeError, and OrtException derived from it, for whatever it cannot load
        except RuntimeError as error:
            needed = self.shape.provider
            hint = f"serve it where onnxruntime-genai has {needed}; here: make optimize TARGET=cpu"
            raise ArtifactError(
                f"onnxruntime-genai cannot load the model: {error}",
                where=str(folder),
                hint="build it again" if on_cpu or needed == "cpu" else hint,
            ) from error

    def _generator(self, max_length: int, options: Sampling, min_length: int) -> Any:
        params = og.GeneratorParams(self._model)
        # genai allocates the KV cache for max_length at once: it is never left at the context's default
        params.set_search_options(max_length=max_length, min_length=min_length, **search_options(options))
        return og.Generator(self._model, params)

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        options: Sampling = GREEDY,
        stop_on_eos: bool = True,
        cancelled: Cancelled | None = None,
        media: Sequence[Medium] = (),
    ) -> Iterator[int]:
        """Yield new token ids one by one; EOS ends it and is not yielded.

        Args:
            prompt_ids: ids in [0, vocab_size), at least one.
            max_new_tokens: most tokens to yield.
            options: how tokens are chosen.
            stop_on_eos: false suppresses EOS, to measure a fixed number of tokens.
            cancelled: asked between tokens and between pieces of the prompt.
            media: pictures, in the order in which the prompt has room for them.

        Raises:
            RequestError, PromptTooLongError: see ``Shape.check`` and ``places_of``; raised at the call, not at the
                first token.
        """
        ids = list(prompt_ids)
        self.shape.check(ids, max_new_tokens)
        places_of(ids, media, self.image_token)
        return self._tokens(ids, max_new_tokens, options, stop_on_eos, cancelled or (lambda: False), media)

    def _tokens(
        self,
        ids: list[int],
        max_new_tokens: int,
        options: Sampling,
        stop_on_eos: bool,
        cancelled: Cancelled,
        media: Sequence[Medium],
    ) -> Iterator[int]:
        length = len(ids) + max_new_tokens
        generator = self._generator(length, options, 0 if stop_on_eos else length)
        if media:
            # it takes a prompt with pictures whole
            generator.set_inputs(_with_pictures(ids, media))
            ids = []
        for start in range(0, len(ids), PREFILL_CHUNK):
            if cancelled():
                return
            generator.append_tokens(np.asarray(ids[start : start + PREFILL_CHUNK], dtype=np.int32))
        for _ in range(max_new_tokens):
            if cancelled():
                return
            if self._unspoken:
                # genai would put a part of the prompt's pictures there, or fail for want of one
                logits = np.array(generator.get_logits())
                logits[..., self._unspoken] = -np.inf
                generator.set_logits(logits)
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if stop_on_eos and token in self.eos_token_ids:
                return
            yield token
            if generator.is_done():
                return

    def forced_logits(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], media: Sequence[Medium] = ()
    ) -> np.ndarray[Any, Any]:
        """Logits after the prompt and after each continuation token, which goes through the KV cache alone.

        Returns:
            float32 [len(continuation_ids) + 1, vocab_size].
        """
        prompt, continuation = list(prompt_ids), list(continuation_ids)
        self.shape.check([*prompt, *continuation], 1)
        generator = self._generator(len(prompt) + len(continuation) + 1, GREEDY, 0)
        rows: list[np.ndarray[Any, Any]] = []
        for piece in (prompt, *([token] for token in continuation)):
            if media and not rows:
                generator.set_inputs(_with_pictures(prompt, media))
            else:
                generator.append_tokens(np.asarray(piece, dtype=np.int32))
            rows.append(np.array(generator.get_logits(), dtype=np.float32).reshape(-1, self.vocab_size)[-1])
        return np.stack(rows)

    def close(self) -> None:
        """Free the model; the engine cannot be used afterwards."""
        del self._model


def _with_pictures(ids: list[int], media: Sequence[Medium]) -> Any:
    """A prompt and its pictures under the names that genai's own preparation gives them."""
    pictures = [medium for medium in media if isinstance(medium, Picture)]
    given = og.NamedTensors()
    given["input_ids"] = np.array([ids], np.int32)
    given["pixel_values"] = np.concatenate([picture.pixels for picture in pictures])
    given["image_grid_thw"] = np.array([picture.grid for picture in pictures], np.int64)
    given["num_image_tokens"] = np.array([picture.tokens for picture in pictures], np.int64)
    return given
