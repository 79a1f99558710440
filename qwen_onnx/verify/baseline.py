"""The checkpoint itself: PyTorch in fp32 and the tokenizer that the model was trained with.

Torch and transformers are imported only inside functions: the child that times the artifact must not hold them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen_onnx.errors import SourceError, VerificationError
from qwen_onnx.sources.chat import CheckpointTemplate
from qwen_onnx.verify.corpus import Message


class TorchBaseline:
    """The checkpoint as a PyTorch model in fp32 on the CPU, whole in memory: what speed is compared with.

    Raises:
        VerificationError: transformers cannot load the folder.
    """

    def __init__(self, checkpoint: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint, dtype=torch.float32, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise VerificationError(f"PyTorch cannot load the checkpoint: {error}", where=str(checkpoint)) from error
        self._model = model.eval()

    def generate(self, ids: Sequence[int], count: int) -> Iterator[int]:
        """Greedy continuation of ``count`` tokens through the KV cache, without a stop token."""
        return greedy(self._model, ids, count)


def greedy(model: Any, ids: Sequence[int], count: int) -> Iterator[int]:
    """Greedy continuation by a PyTorch model, ``count`` tokens through its KV cache, without a stop token."""
    import torch

    tokens, cache = torch.tensor([list(ids)]), None
    for _ in range(count):
        with torch.inference_mode():
            # logits_to_keep: an engine that serves needs the last position only
            out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        yield int(tokens.item())


class CheckpointTokenizer:
    """The checkpoint's own ``tokenizer.json`` and chat template, as transformers runs them.

    ``AutoTokenizer`` is not the judge where that file exists: transformers 5 rebuilds a Qwen2
    tokenizer from ``config.json`` and then splits ``\\n\\n`` and NFD otherwise than the file says.
    """

    def __init__(self, checkpoint: Path) -> None:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        try:
            self._auto: Any = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
            saved = (checkpoint / "tokenizer.json").is_file()
            self._own: Any = (
                PreTrainedTokenizerFast.from_pretrained(checkpoint, trust_remote_code=False) if saved else self._auto
            )
        except (OSError, ValueError, KeyError) as error:
            raise VerificationError(
                f"The checkpoint's tokenizer does not load: {error}", where=str(checkpoint)
            ) from error
        self._template = CheckpointTemplate(self._own)

    @property
    def tokenizer(self) -> Any:
        """As transformers has it."""
        return self._own

    @property
    def chats(self) -> bool:
        """Whether there is a chat template; base models have none."""
        return bool(self._own.chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: nothing is added, special tokens in it are recognised."""
        return list(self._own.encode(text, add_special_tokens=False))

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a user's words: what looks like a special token in them stays text."""
        return list(self._own.encode(text, add_special_tokens=False, split_special_tokens=True))

    def auto_encode(self, text: str) -> list[int]:
        """What ``AutoTokenizer`` makes of the same text."""
        return list(self._auto.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included, spaces untouched."""
        return str(self._own.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """The conversation in the chat template; ``prompt`` adds the opening of an answer.

        Raises:
            VerificationError: the template refuses it, or was stopped.
        """
        try:
            return self._template.render(messages, prompt=prompt)
        except SourceError as error:
            raise VerificationError(error.what, where=error.where, hint=error.hint) from error
