"""Text to ids and back, with the ``tokenizers`` library: og.Tokenizer lacks NFC, stops at NUL and takes special
tokens out of user text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from qwen_onnx.bounded import read_bytes
from qwen_onnx.errors import ArtifactError, PromptTooLongError, RequestError
from qwen_onnx.runtime.engines import TOKENIZER_FILE

# tokens at the end of a prompt among which an open tag is looked for
TAIL = 64
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# no sensible text has more characters per token; what is longer is refused before any work
MOST_CHARACTERS_PER_TOKEN = 64
# a vocabulary of 250,000 has 20 MB; the parser takes several times what it reads
MOST_BYTES = 64 << 20


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes (Radford et al. 2019, GPT-2): shifted when unprintable."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTES = _byte_alphabet()


class TextTokenizer:
    """The tokenizer of an artifact.

    Raises:
        ArtifactError: ``tokenizer.json`` is missing, damaged, or larger than any known.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / TOKENIZER_FILE
        try:
            text = read_bytes(path, most_bytes=MOST_BYTES, error=ArtifactError).decode("utf-8")
            self._trusted, self._user = Tokenizer.from_str(text), Tokenizer.from_str(text)
        except ArtifactError:
            raise
        # tokenizers raises bare Exception for a damaged file
        except Exception as error:
            raise ArtifactError(
                f"the tokenizer cannot be read: {error}", where=str(path), hint="build the artifact again"
            ) from error
        self._user.encode_special_tokens = True
        added = self._trusted.get_added_tokens_decoder()
        # tokens that are never the sum of others, tool call and think tags among them
        self.added_tokens: dict[str, int] = {t.content: index for index, t in added.items()}
        self.special_tokens: dict[str, int] = {t.content: index for index, t in added.items() if t.special}

    def encode(self, text: str, *, allow_special: bool = False, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``.

        Args:
            text: any Unicode text without lone surrogates.
            allow_special: whether e.g. ``<|im_end|>`` in it is the token; false for all that users type.
            add_special_tokens: apply the tokenizer's post-processor, as Hugging Face does for plain text.

        Raises:
            RequestError: lone surrogates.
        """
        check_text(text)
        tokenizer = self._trusted if allow_special else self._user
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def piece(self, token: int) -> tuple[str, bytes]:
        """A single token as text and as bytes; a part of a character is U+FFFD as text."""
        written = self._trusted.id_to_token(token) or ""
        if token in self._trusted.get_added_tokens_decoder():
            return written, written.encode()
        raw = bytes(BYTES[character] for character in written if character in BYTES)
        return raw.decode("utf-8", "replace"), raw

    def tail(self, ids: Sequence[int]) -> str:
        """How the text of a prompt ends, special tokens included; enough of it to see a tag and what follows that."""
        return b"".join(self.piece(token)[1] for token in ids[-TAIL:]).decode("utf-8", "replace")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens."""
        text: str = self._trusted.decode(list(ids), skip_special_tokens=True)
        return text


def check_text(text: str) -> None:
    """RequestError when ``text`` is not encodable as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}",
            where="prompt",
            hint="send valid Unicode",
        ) from error


def check_size(characters: int, context_length: int) -> None:
    """PromptTooLongError for a text that cannot fit, before time is spent on tokenising it."""
    most = context_length * MOST_CHARACTERS_PER_TOKEN
    if characters > most:
        raise PromptTooLongError(
            f"the prompt has {characters:,} characters; a context of {context_length} tokens holds at most {most:,}",
            where="prompt",
            hint="shorten the prompt",
        )


class StreamDecoder:
    """Ids one by one to pieces of text that are whole UTF-8; their sum equals ``decode`` of all ids."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before, self._read = 0, 0

    def push(self, token: int) -> str:
        """The text that became certain with ``token``; empty in the middle of a character."""
        self._ids.append(token)
        text = self._pending()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._before, self._read = self._read, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left at the end; an incomplete character shows as U+FFFD."""
        text = self._pending()
        self._before = self._read = len(self._ids)
        return text

    def _pending(self) -> str:
        # decoding starts one piece early: some decoders treat the first token specially
        known = self._tokenizer.decode(self._ids[self._before : self._read])
        return self._tokenizer.decode(self._ids[self._before :])[len(known) :]
