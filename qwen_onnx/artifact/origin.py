"""Whose artifact stands at a place: two folders may have one name, and no manifest says where on this machine they are.

What is known besides stands in a hidden file beside the artifact, ``.<name>.origin.json``, which nothing publishes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from qwen_onnx.artifact.manifest import MANIFEST, Manifest, read_manifest
from qwen_onnx.artifact.store import rejected_place
from qwen_onnx.bounded import read_record
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.catalog.sources import FolderSource, HubSource
from qwen_onnx.errors import ArtifactError
from qwen_onnx.files import write_private
from qwen_onnx.records import Record

MOST_BYTES = 1 << 16


class Origin(Record):
    """``text`` names the source of the artifact that was built under ``key``; of any other it says nothing."""

    key: str
    text: str


def origin_of(plan: Plan, folder: Path | None, adapter: Path | None) -> str:
    """What a model is made of, here: the path of its folder, the address of its repository, or its recipe.

    Args:
        folder: that its weights are in, when the plan's source is one; a file works, too.
        adapter: folder of the adapter that the plan names.
    """
    source = plan.sources[0]
    if folder and isinstance(source, FolderSource):
        made_of = str(folder.resolve())
    elif isinstance(source, HubSource) and not plan.catalogued:
        made_of = f"{source.kind}:{source.repo.lower()}"
    else:
        made_of = f"the recipe {plan.base}"
    return f"{made_of} with the adapter {adapter.resolve()}" if adapter else made_of


def record_origin(artifact: Path, key: str, origin: str) -> None:
    """Write down what the artifact at this place, built under ``key``, was made of."""
    write_private(_file(artifact), Origin(key=key, text=origin).model_dump_json())


def recorded_origin(artifact: Path, manifest: Manifest) -> str | None:
    """What the artifact was made of; None where nothing tells."""
    if _file(artifact).exists():
        try:
            found = read_record(_file(artifact), Origin, most_bytes=MOST_BYTES, error=ArtifactError)
        except ArtifactError:
            return None
        return found.text if found.key == manifest.key else None
    plan = manifest.plan
    # a path that nobody wrote down
    unknown = plan.adapter is not None or isinstance(plan.sources[0], FolderSource)
    return None if unknown else origin_of(plan, None, None)


def require_replaceable(
    target: Path, plan: Plan, origin: str, revisions: Collection[str], *, by_name: bool, force: bool
) -> None:
    """Refuse to replace anything but an earlier artifact of the same model, target, precision and weights.

    Args:
        target: where the artifact goes; what was rejected there counts, too.
        revisions: any of these identifies the weights of ``plan``.
        by_name: the place is ours by its name, so that a damaged manifest is an artifact's.
        force: other weights of the same name give way.

    Raises:
        ArtifactError: says what is there.
    """
    for place in (target, rejected_place(target)):
        manifest = _standing(place, by_name=by_name)
        if manifest is None:
            continue
        if manifest.plan.name != plan.name:
            raise ArtifactError(
                f"an artifact of another build is there: {manifest.plan.name}; now asked for: {plan.name}",
                where=str(place),
                hint=f"another --output keeps both; to replace it, remove {place}",
            )
        there = recorded_origin(place, manifest)
        same = manifest.source.revision in revisions and manifest.plan.adapter == plan.adapter
        if there != origin and not same and not force:
            told = there or f"{manifest.source.origin}, wherever that was"
            raise ArtifactError(
                f"an artifact of the same name is there, made of other weights: {told}; now asked for: {origin}",
                where=str(place),
                hint=f"{'' if by_name else 'another '}--output FOLDER keeps both; --force replaces it",
            )


def _standing(place: Path, *, by_name: bool) -> Manifest | None:
    """The manifest of the artifact at a place; None where nothing would be lost.

    Raises:
        ArtifactError: something else is there.
    """
    if not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir())):
        return None
    hint = f"give another --output, or move away what is there: {place}"
    if not (place / MANIFEST).is_file():
        what = "the folder is not empty and holds no artifact" if place.is_dir() else "a file is there, not a folder"
        raise ArtifactError(f"{what}: it is not replaced", where=str(place), hint=hint)
    try:
        manifest = read_manifest(place)
    except ArtifactError as error:
        if by_name:
            # damaged: nothing is lost
            return None
        raise ArtifactError(
            f"what is there may not be an artifact: {error.what}", where=str(place), hint=hint
        ) from error
    found = {path.relative_to(place) for path in place.rglob("*") if path.is_file()}
    visible = {path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)}
    if added := sorted(visible - {MANIFEST, *manifest.files}):
        raise ArtifactError(
            f"an artifact is there with files that are not its own: {', '.join(added[:3])}",
            where=str(place),
            hint="move them away, or give another --output",
        )
    return manifest


def is_of_folder(artifact: Path, folder: Path, revision: Callable[[], str]) -> bool:
    """Whether an artifact was made of the checkpoint in ``folder``, by its path or, where another is known, its bytes.

    Args:
        revision: what identifies the weights there; asked only where the path does not decide, since it reads them all.

    Raises:
        ArtifactError: it has no manifest.
    """
    manifest = read_manifest(artifact)
    return recorded_origin(artifact, manifest) == str(folder.resolve()) or manifest.source.revision == revision()


def _file(artifact: Path) -> Path:
    return artifact.with_name(f".{artifact.name}.origin.json")
