"""Checkpoints with ``vocab.json`` and ``merges.txt`` in place of ``tokenizer.json``, as Qwen publishes Qwen3-ASR."""

from __future__ import annotations

from pathlib import Path

from qwen_onnx.bounded import read_bytes
from qwen_onnx.errors import SourceError, UnsupportedModelError
from qwen_onnx.sources.checkpoint import (
    LARGEST_TOKENIZER,
    MOST_TOKENIZER_VALUES,
    SPLIT_TOKENIZER,
    TOKENIZER_FILE,
    read_json,
)

# where processors kept their template before transformers 5, and where it belongs
TEMPLATE_JSON, TEMPLATE = "chat_template.json", "chat_template.jinja"


def write_tokenizer(checkpoint: Path, folder: Path) -> None:
    """Write what ``folder`` lacks of the tokenizer: ``tokenizer.json`` as transformers makes it, and the chat template.

    Raises:
        SourceError: a file is missing, damaged or too large.
        UnsupportedModelError: transformers makes no tokenizer of them.
    """
    if not (checkpoint / TOKENIZER_FILE).exists():
        vocabulary, merges = (checkpoint / name for name in SPLIT_TOKENIZER)
        read_json(vocabulary, most_bytes=LARGEST_TOKENIZER, most_values=MOST_TOKENIZER_VALUES)
        read_bytes(merges.resolve(), most_bytes=LARGEST_TOKENIZER, error=SourceError)
        from transformers import Qwen2Tokenizer

        try:
            made = Qwen2Tokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
        # tokenizers raises bare Exception for what it cannot use
        except Exception as error:
            raise UnsupportedModelError(
                f"no tokenizer can be made of {vocabulary.name} and {merges.name}: {str(error)[:200]}",
                where=str(checkpoint),
                hint="save one beside the weights: AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
            ) from error
        made.backend_tokenizer.save(str(folder / TOKENIZER_FILE))
    if (checkpoint / TEMPLATE_JSON).exists() and not (checkpoint / TEMPLATE).exists():
        source = read_json(checkpoint / TEMPLATE_JSON).get("chat_template")
        if not isinstance(source, str):
            raise SourceError(f"{TEMPLATE_JSON} holds no template", where=str(checkpoint), hint="fetch it again")
        (folder / TEMPLATE).write_text(source, encoding="utf-8")
