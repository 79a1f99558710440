"""Ranks of a tiktoken file → ``tokenizer.json``, for Qwen 1.0, whose own tokenizer is remote code.

tiktoken merges the adjacent pair whose union has the lowest rank; a BPE of Hugging Face merges the pair that comes
first in a list. Both do the same when the list holds, by rising rank, the last two parts that tiktoken's own merging
leaves of each token: a token that is whole in a text was merged inside its own borders only.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from qwen_onnx.bounded import read_bytes
from qwen_onnx.errors import SourceError, UnsupportedModelError

TIKTOKEN_FILE = "qwen.tiktoken"
# bytes; the published file has 2.6 MB
LARGEST = 32 << 20
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# the ids after the last rank, as published with the model
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{index}|>" for index in range(205)))
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Rank of each token, 0 to n-1.

    Raises:
        SourceError: a line is not ``base64 rank``, or the file is missing, too large or not a plain file.
        UnsupportedModelError: ranks are not 0 to n-1, or a single byte has none.
    """
    if not path.exists():
        raise SourceError(f"{path.name} is missing", where=str(path.parent), hint="fetch it again")
    ranks: dict[bytes, int] = {}
    # the hub's cache has links to files
    body = read_bytes(path.resolve(), most_bytes=LARGEST, error=SourceError, hint="use the model's own file")
    for number, line in enumerate(body.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        # binascii.Error is one, too
        except ValueError as error:
            raise SourceError(
                f"{path.name} is damaged in line {number}", where=str(path), hint="fetch it again"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UnsupportedModelError("the ranks are not 0 to n-1", where=str(path), hint="use the model's own file")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UnsupportedModelError(f"byte {missing[0]} has no rank", where=str(path), hint="use the model's own file")
    return ranks


def parts_of(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What tiktoken's merging makes of ``token`` when the token itself may not be used."""
    parts = [bytes([byte]) for byte in token]
    limit = ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], limit) for i in range(len(parts) - 1)]
        best = min(pairs)
        if best >= limit:
            break
        index = pairs.index(best)
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return parts


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges by rising rank; UnsupportedModelError for a token that no merge reaches."""
    merges = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__):
        parts = parts_of(token, ranks)
        if len(parts) != 2:
            raise UnsupportedModelError(
                f"the token {token!r} is not the union of two others", where=TIKTOKEN_FILE, hint="report the model"
            )
        merges.append((parts[0], parts[1]))
    return merges


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level BPE (Radford et al. 2019, GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def write_tokenizer(tiktoken_file: Path, folder: Path) -> dict[str, int]:
    """Write ``tokenizer.json`` into ``folder``.

    Returns:
        Ids of the special tokens.

    Raises:
        SourceError, UnsupportedModelError: see ``read_ranks`` and ``merges_of``.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    ranks = read_ranks(tiktoken_file)
    characters = byte_characters()

    def text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    vocabulary = {text(token): rank for token, rank in ranks.items()}
    merges = [(text(left), text(right)) for left, right in merges_of(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    return {token: len(ranks) + index for index, token in enumerate(SPECIAL_TOKENS)}


def write_tokenizer_config(folder: Path, chat_template: str | None) -> None:
    """What Hugging Face wants beside ``tokenizer.json``; a base model has no template."""
    ends_with = END_OF_TEXT if chat_template is None else IM_END
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": ends_with,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
