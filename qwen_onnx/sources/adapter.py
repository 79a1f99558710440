"""A LoRA adapter as a folder: peft's two files, and our manifest where we trained it. A stranger may have written it.

Nothing of it is run: weights are safetensors alone, and an option that the merge does not carry out is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from qwen_onnx.bounded import open_plain, read_object, read_record
from qwen_onnx.catalog.plan import Adapted
from qwen_onnx.catalog.training import MOST_RANK, Training
from qwen_onnx.errors import ChecksumError, SourceError, UnsupportedModelError
from qwen_onnx.files import sha256_of
from qwen_onnx.records import Grown, Name, Record, Sha256, Verdict, digest_of
from qwen_onnx.sources.plain import PICKLES, require_plain
from qwen_onnx.sources.streamed import Stored, tensors_of

CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "adapter.json"
NAMED = re.compile(
    r"base_model\.model\.(?P<module>(?:\w+\.)*layers\.\d+\.(?:\w+\.)?"
    r"(?P<matrix>q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj))\.lora_(?P<part>[AB])\.weight"
)
KINDS = ("F32", "F16", "BF16")
# bytes
LARGEST_CONFIG, LARGEST_MANIFEST, LARGEST_HEADER = 1 << 16, 1 << 20, 16 << 20
HINT = "give a folder that `qwen-onnx finetune` wrote, or a plain LoRA of peft, saved as safetensors"
# keys of peft's config that the merge carries out, that say nothing about the weights, or that a plain LoRA leaves so
CARRIED_OUT = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules"}
SILENT = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "init_lora_weights",
    "megatron_core",
    "qalora_group_size",
}
PLAIN: dict[str, Any] = {"bias": "none"}


class AdapterBase(Record):
    """The checkpoint that an adapter belongs to; ``weights`` is the digest of its weights' checksums."""

    model: str
    origin: str
    revision: str
    weights: Sha256


class TrainedAgainst(Record):
    """The artifact whose rounded weights an adapter was trained on; ``graph``: digest of its graph and weights."""

    artifact: str
    graph: Sha256


class AdapterData(Record):
    """What an adapter learnt from: ``sha256`` of the file, its examples, and how many of them were held out."""

    sha256: Sha256
    examples: int = Field(ge=1)
    held_out: int = Field(ge=1)


class AdapterRetained(Record):
    """What an adapter was to leave as it was.

    Attributes:
        rows: of texts; ``held_out``, how many of them no step saw.
        divergence: of the model with the adapter from its base over those held out, KL in nats per token.
    """

    rows: int = Field(ge=2)
    held_out: int = Field(ge=1)
    divergence: float


class AdapterManifest(Grown):
    """Everything about an adapter that we trained, but its bytes.

    Attributes:
        verdict: PASS where the loss of the held-out examples fell.
        against: None where it was trained on the checkpoint's own weights.
        retained: None where its examples named nothing to retain.
        loss_before: of the held-out examples, in nats per trained token; ``loss_after`` of what was kept.
        files: SHA-256 by name, the manifest itself apart.
    """

    added = frozenset({"against", "retained"})

    schema_version: Literal[1] = 1
    name: Name
    verdict: Verdict
    base: AdapterBase
    against: TrainedAgainst | None = None
    data: AdapterData
    retained: AdapterRetained | None = None
    training: Training
    loss_before: float = Field(ge=0)
    loss_after: float = Field(ge=0)
    steps: int = Field(ge=1)
    tokens: int = Field(ge=1)
    seconds: float = Field(ge=0)
    packages: dict[str, str]
    files: dict[str, Sha256]


@dataclass(frozen=True)
class Adapter:
    """An adapter whose every byte was checked but for the numbers themselves.

    Attributes:
        scale: what B @ A counts, times.
        tensors: A and B by the name of their module, without peft's prefix.
        manifest: None for an adapter of somebody else's.
        digest: of its weights and its config.
    """

    folder: Path
    name: str
    rank: int
    scale: float
    tensors: dict[str, dict[str, tuple[str, Stored]]]
    manifest: AdapterManifest | None
    digest: str

    def adapted(self) -> Adapted:
        """What a plan says of it, which has it merged.

        Raises:
            UnsupportedModelError: it was trained against the rounded weights of an artifact.
        """
        made = self.manifest
        if made and made.against:
            raise UnsupportedModelError(
                f"it was trained against {made.against.artifact} and repairs the rounding of that artifact's weights; "
                "merged into the checkpoint, it would repair what is not broken",
                where=str(self.folder),
                hint="serve it in the slots of that artifact: qwen-onnx adapter convert FOLDER --base ARTIFACT",
            )
        return Adapted(
            name=self.name,
            digest=self.digest,
            rank=self.rank,
            weights=made.base.weights if made else None,
            data=made.data.sha256 if made else None,
        )


def open_adapter(folder: Path) -> Adapter:
    """Read an adapter back.

    Raises:
        SourceError: a file is missing, damaged or not plain.
        ChecksumError: a file differs from the manifest.
        UnsupportedModelError: pickled weights, not a LoRA, or one that asks for more than the merge carries out; its
            training did not pass.
    """
    if not folder.is_dir():
        raise SourceError("there is no adapter", where=str(folder), hint=HINT)
    require_plain(folder)
    _require_no_pickle(folder)
    config = read_object(folder / CONFIG, most_bytes=LARGEST_CONFIG, error=SourceError, hint=HINT)
    rank, scale = _rank_and_scale(config, str(folder / CONFIG))
    tensors = _tensors(folder / WEIGHTS, rank)
    files = {name: sha256_of(folder / name) for name in (CONFIG, WEIGHTS)}
    manifest = _manifest(folder, files, rank) if (folder / MANIFEST).exists() else None
    name = manifest.name if manifest else adapter_name(folder.resolve().name)
    return Adapter(folder, name, rank, scale, tensors, manifest, digest_of(files))


def _require_no_pickle(folder: Path) -> None:
    found = sorted(path.name for path in folder.iterdir() if path.name.lower().endswith(PICKLES))
    if found:
        raise UnsupportedModelError(
            f"it holds pickled files, which run code when they are loaded: {', '.join(found)[:200]}",
            where=str(folder),
            hint="if you trust it, save it again with peft: save_pretrained(FOLDER) writes safetensors",
        )


def _rank_and_scale(config: Mapping[str, Any], where: str) -> tuple[int, float]:
    """Of peft's config, all of whose other options must be those of a plain LoRA."""
    if config.get("peft_type") != "LORA":
        kind = str(config.get("peft_type"))[:40]
        raise UnsupportedModelError(f"it is a {kind}, only a LORA can be merged", where=where, hint=HINT)
    asked = sorted(key for key, value in config.items() if key not in CARRIED_OUT | SILENT and value != PLAIN.get(key))
    beyond = [key for key in asked if config[key] not in (None, False, {}, [], "")]
    if beyond:
        raise UnsupportedModelError(
            f"it asks for more than a plain LoRA: {', '.join(map(str, beyond))[:300]}", where=where, hint=HINT
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        raise UnsupportedModelError(f"its rank r is {str(rank)[:40]}, not 1 to {MOST_RANK}", where=where, hint=HINT)
    if type(alpha) not in (int, float) or not 0 < float(str(alpha)) <= 10_000:
        what = f"its lora_alpha is {str(alpha)[:40]}, not a number above 0"
        raise UnsupportedModelError(what, where=where, hint=HINT)
    return rank, float(str(alpha)) / (math.sqrt(rank) if config.get("use_rslora") is True else rank)


def _tensors(file: Path, rank: int) -> dict[str, dict[str, tuple[str, Stored]]]:
    from safetensors import SafetensorError

    with open_plain(file, SourceError, hint=HINT) as opened:
        header = int.from_bytes(opened.read(8), "little")
    if header > LARGEST_HEADER:
        raise SourceError(f"{file.name} has a header of {header:,} bytes", where=str(file), hint=HINT)
    try:
        stored = tensors_of([file])
    except SafetensorError as error:
        raise SourceError(f"{file.name} is truncated or altered: {error}", where=str(file), hint=HINT) from error
    return paired(stored, rank, file)


def paired(stored: Mapping[str, Stored], rank: int, file: Path) -> dict[str, dict[str, tuple[str, Stored]]]:
    """A and B by the name of their module, of tensors with peft's names that ``file`` holds.

    Raises:
        UnsupportedModelError: another name, another rank, A without B or B without A, or none at all.
    """
    found: dict[str, dict[str, tuple[str, Stored]]] = {}
    for name, entry in stored.items():
        named = NAMED.fullmatch(name)
        if named is None:
            raise UnsupportedModelError(
                f"{name[:200]!r} is not A or B of a matrix that can be merged", where=str(file), hint=HINT
            )
        side = 0 if named["part"] == "A" else 1
        if entry.kind not in KINDS or len(entry.shape) != 2 or entry.shape[side] != rank:
            what = f"{name[:200]} is {entry.kind} {list(entry.shape)}, its config says rank {rank}"
            raise UnsupportedModelError(what, where=str(file), hint=HINT)
        found.setdefault(named["module"], {})[named["part"]] = (name, entry)
    halves = sorted(module for module, parts in found.items() if len(parts) != 2)
    if halves or not found:
        what = f"{halves[0]} has A or B alone" if halves else "it holds no weights"
        raise UnsupportedModelError(what, where=str(file), hint=HINT)
    return found


def _manifest(folder: Path, files: dict[str, str], rank: int) -> AdapterManifest:
    found = read_record(
        folder / MANIFEST, AdapterManifest, most_bytes=LARGEST_MANIFEST, error=SourceError, hint="train it again"
    )
    altered = sorted(name for name, digest in files.items() if found.files.get(name) != digest)
    if altered:
        raise ChecksumError(f"{', '.join(altered)}: altered since it was trained", where=str(folder), hint=HINT)
    if found.training.rank != rank:
        what = f"its manifest says rank {found.training.rank}, its config {rank}"
        raise SourceError(what, where=str(folder), hint=HINT)
    if found.verdict is not Verdict.PASS:
        raise UnsupportedModelError(
            f"its training ended with {found.verdict}: the held-out loss went from {found.loss_before:.3g} to "
            f"{found.loss_after:.3g}",
            where=str(folder),
            hint="train it again: qwen-onnx finetune MODEL --data FILE --set learning_rate=...",
        )
    return found


def adapter_name(text: str) -> str:
    """``text`` as a part of a model's name.

    Raises:
        SourceError: nothing of it can be.
    """
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-")[:60]
    if not name:
        raise SourceError(f"{text[:60]!r} is not a name", hint="give the adapter's folder another name")
    return name
