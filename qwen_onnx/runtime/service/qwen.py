"""An artifact that answers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import cast

from qwen_onnx.artifact.genai_config import GENAI_CONFIG
from qwen_onnx.artifact.seal import Seal
from qwen_onnx.errors import PromptTooLongError, RequestError
from qwen_onnx.runtime.engines import QUEUE_SIZE, STREAMS, KvCache, Speculate
from qwen_onnx.runtime.engines.adapters import AdapterSource, Swapping
from qwen_onnx.runtime.engines.interface import Handle, Listener, TokenEngine, TokenRequest, cache_scope
from qwen_onnx.runtime.engines.loading import EngineOptions, load_verified
from qwen_onnx.runtime.engines.media import Medium
from qwen_onnx.runtime.engines.remote import RemoteEngine
from qwen_onnx.runtime.engines.sampling import Sampling
from qwen_onnx.runtime.processing.template import ChatTemplate, Message, has_template
from qwen_onnx.runtime.processing.tokenizer import TextTokenizer, check_size
from qwen_onnx.runtime.service.answers import Answer, Assembler
from qwen_onnx.runtime.service.generation import (
    Attached,
    AttachedVideo,
    ChatPrompt,
    GenerationConfig,
    Prompt,
)
from qwen_onnx.runtime.service.senses import Ears, Eyes, sense_of
from qwen_onnx.runtime.service.text import Prepared, TextService, as_chat, is_ids


class QwenService(TextService):
    """An artifact that answers.

    Args:
        folder: flat folder of an exported model.
        threads: threads of onnxruntime; None leaves it to onnxruntime.
        isolated: run the engine in a child process, so that this one's event loop stays free.
        streams: answers at once; queue_size: how many requests may wait beyond them.
        context: tokens of one conversation; None: the model's, or what the memory allows.
        speculate: ``off`` gives one token a step also where a text repeats itself.
        adapters: files of `qwen-onnx adapter convert`, by the names that a config's ``adapter`` may have.
        adapter_budget: bytes of others that ``load_adapter`` may load; None: it loads none.
        kv_cache: ``int8`` keeps keys and values in a quarter of the memory, where verification found that it may.
        verify: check every byte before it is loaded, and again whenever an isolated engine is started anew.
        expect: verify, and refuse what has another digest; see ``artifact.seal.runnable_digest``.

    Attributes:
        longest_sound: in seconds; None: it hears none.

    Raises:
        ArtifactError: the folder holds no model that loads, or not the verified one; an adapter does not fit it,
            or there is no int8 KV cache for it.
        ConfigError: an adapter cannot be called so.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        threads: int | None = None,
        isolated: bool = False,
        streams: int = STREAMS,
        queue_size: int = QUEUE_SIZE,
        context: int | None = None,
        verify: bool = False,
        expect: str | None = None,
        speculate: Speculate = "auto",
        adapters: Mapping[str, Path] | None = None,
        adapter_budget: int | None = None,
        kv_cache: KvCache = "float",
    ) -> None:
        folder = Path(folder)
        sources = tuple(AdapterSource.of(name, file) for name, file in (adapters or {}).items())
        verified = verify or expect is not None
        swapping = Swapping(adapter_budget) if adapter_budget is not None else None
        options = EngineOptions(
            streams, queue_size, context, threads, verified, expect, speculate, sources, swapping, kv_cache
        )
        # before anything else is read: it is the engine that verifies
        self.engine, seal = _engine(folder, options, isolated)
        try:
            self.tokenizer = TextTokenizer(folder)
            # a base model has no template and continues plain text all the same: the fault is told when a chat comes
            self.template = ChatTemplate(folder) if has_template(folder) else None
            self._sense = sense_of(folder)
            self.sees, self.hears = isinstance(self._sense, Eyes), isinstance(self._sense, Ears)
            self.transcribes = isinstance(self._sense, Ears) and self._sense.transcribes
            self.longest_sound = self._sense.longest if isinstance(self._sense, Ears) else None
            self.fingerprint = _fingerprint(folder)
            if seal:
                seal.require_untouched()
        except BaseException:
            self.engine.close()
            raise

    def prepare(self, prompt: Prompt, config: GenerationConfig) -> Prepared:
        """Token ids of ``prompt``, checked against the context.

        Raises:
            RequestError, PromptTooLongError, TemplateError.
        """
        outside = next((token for token in config.logit_bias if not 0 <= token < self.engine.shape.vocab_size), None)
        if outside is not None:
            raise RequestError(f"logit_bias names token {outside}, which does not exist", where="logit_bias")
        if config.adapter is not None and config.adapter not in self.adapters:
            raise RequestError(f"there is no adapter {config.adapter[:80]!r}", where="model")
        return prompt if isinstance(prompt, Prepared) else self._encoded(prompt, least=min(config.max_new_tokens, 1))

    def _encoded(self, prompt: Prompt, least: int) -> Prepared:
        context = self.engine.shape.context_length
        media: tuple[Medium, ...] = ()
        if isinstance(prompt, str):
            check_size(len(prompt), context)
            ids = self.tokenizer.encode(prompt)
        elif is_ids(prompt):
            ids = list(cast("Sequence[int]", prompt))
        else:
            ids, media = self._perceived(as_chat(cast("Sequence[Message] | ChatPrompt", prompt)), context)
        if self.room(ids) < least:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens, the context holds {context}", where="prompt", hint="shorten it"
            )
        self.engine.shape.check(ids, least, least=least)
        return Prepared(ids, media=media)

    def _perceived(self, chat: ChatPrompt, context: int) -> tuple[list[int], tuple[Medium, ...]]:
        """Token ids of a conversation, and its media; see ``Sense.take``."""
        if chat.pictures and not self.sees:
            raise RequestError("this model reads no pictures", where=chat.pictures[0].where, hint="leave them out")
        if chat.sounds and not self.hears:
            raise RequestError("this model hears no sounds", where=chat.sounds[0].where, hint="leave them out")
        if chat.videos and not self.sees:
            raise RequestError("this model watches no videos", where=chat.videos[0].where, hint="leave them out")
        # a model has one sense
        if not isinstance(self._sense, Eyes):
            ids = self.encode_chat(chat)
            return self._sense.take(ids, chat.sounds, context) if self._sense else (ids, ())
        eyes, special = self._sense, self.tokenizer.special_tokens
        clips = eyes.open_videos(chat.videos)
        ids = self.encode_chat(chat, lambda rendered: eyes.announced(rendered, clips, special))
        return eyes.take_all(ids, chat.pictures, clips, context)

    def check(self, one: Attached | AttachedVideo) -> None:
        """RequestError for what no prompt could have; a model of text alone takes no picture, sound or video."""
        if self._sense is None:
            raise RequestError("this model reads text alone", where=one.where)
        self._sense.check(one)

    def submit(self, prompt: Prompt, config: GenerationConfig, listener: Listener) -> tuple[Handle, Answer]:
        """Begin an answer; ``listener`` gets the engine's events, which the assembler makes pieces of.

        ``max_new_tokens`` is bounded by what the context leaves.

        Raises:
            RequestError, PromptTooLongError, TemplateError: faulty input.
            OverloadedError, WorkerDiedError: it cannot be served now.
        """
        ids = self.prepare(prompt, config)
        request = TokenRequest(
            tuple(ids),
            min(config.max_new_tokens, self.room(ids)),
            sampling(config),
            logprobs=config.logprobs,
            grammar=config.grammar,
            echo=config.echo,
            cache_scope=cache_scope.get(),
            media=ids.media,
            adapter=config.adapter,
        )
        return self.engine.submit(request, listener), Assembler(self.tokenizer, config, ids)

    def close(self) -> None:
        """Free the model and end the processes."""
        # first: what is being rendered would be waited for
        if self.template:
            self.template.close()
        self.engine.close()


def sampling(config: GenerationConfig) -> Sampling:
    """The part of a config that chooses tokens."""
    return Sampling(**{field.name: getattr(config, field.name) for field in fields(Sampling)})


def _engine(folder: Path, options: EngineOptions, isolated: bool) -> tuple[TokenEngine, Seal | None]:
    if not isolated:
        return load_verified(folder, options)
    engine = RemoteEngine(folder, options)
    return engine, engine.seal


def _fingerprint(folder: Path) -> str:
    """Changes with the artifact: OpenAI's ``system_fingerprint``."""
    manifest = folder / "manifest.json"
    content = (manifest if manifest.exists() else folder / GENAI_CONFIG).read_bytes()
    return f"fp_{hashlib.sha256(content).hexdigest()[:12]}"
