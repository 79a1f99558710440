"""The licences that travel with a package: of the weights, of our code, and the notices of both."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

from qwen_onnx.artifact.manifest import Manifest
from qwen_onnx.errors import EnvironmentFault, PackageError
from qwen_onnx.files import APACHE, PACKAGE

LICENCE, OWN_LICENCE, NOTICE = "LICENSE", "LICENSE.qwen-onnx", "NOTICE"
# of our own texts, what is said to readers of this repository only
NOTICES = "THIRD-PARTY-NOTICES.md"


def write_licences(folder: Path, manifest: Manifest) -> None:
    """Write ``LICENSE`` of the weights where the checkpoint brought none, ``LICENSE.qwen-onnx`` and ``NOTICE``.

    Raises:
        PackageError: nothing states the weights' licence, or its text is not at hand.
        EnvironmentFault: this installation lacks its own licence.
    """
    if manifest.plan.license is None:
        raise PackageError(
            f"nothing states the licence of the weights of {manifest.plan.model}",
            where=manifest.source.origin,
            hint="let README.md beside the weights begin with the lines ---, license: apache-2.0 (or theirs) and ---; "
            f"then: qwen-onnx optimize {manifest.plan.asked}",
        )
    licence = folder / LICENCE
    if not licence.exists():
        brought = sorted(path for path in folder.glob(f"{LICENCE}*") if path.name != OWN_LICENCE)
        if brought:
            shutil.copyfile(brought[0], licence)
        elif manifest.plan.license == APACHE:
            # our own licence is the same text
            licence.write_text(own_text(LICENCE), encoding="utf-8")
        else:
            raise _missing(manifest)
    (folder / OWN_LICENCE).write_text(own_text(LICENCE), encoding="utf-8")
    notice = folder / NOTICE
    brought_notice = notice.read_text(encoding="utf-8") if notice.exists() else ""
    notice.write_text(notice_text(manifest, brought_notice), encoding="utf-8")


def _missing(manifest: Manifest) -> PackageError:
    plan = manifest.plan
    return PackageError(
        f"the weights of {plan.model} are under {plan.license}, whose "
        f"text must travel with them, and their checkpoint brought no {LICENCE}",
        where=manifest.source.origin,
        hint=f"put its {LICENCE} into the checkpoint folder: "
        + (f"qwen-onnx optimize {plan.model} --source FOLDER" if plan.catalogued else "qwen-onnx optimize ./FOLDER"),
    )


def notice_text(manifest: Manifest, brought: str = "") -> str:
    """What was made of what, as Apache-2.0 (4b) asks; our notices on that model; the checkpoint's own."""
    plan, source = manifest.plan, manifest.source
    parts = [
        f"{plan.title}, converted to ONNX ({plan.precision}, {plan.target}) by qwen-onnx.\n"
        f"The weights come from {source.origin}, revision {source.revision}, under {plan.license}\n"
        f"({LICENCE}). They were changed: converted and, unless they are floats, quantised. qwen-onnx is under\n"
        f"{APACHE} ({OWN_LICENCE}).\n"
    ]
    name = plan.title.split()[0].lower()
    # of a model that is not in the catalogue the name says nothing
    paragraphs = own_text(NOTICES).split("\n- ")[1:] if plan.catalogued else []
    parts += [f"{text.strip()}\n" for text in paragraphs if name in text.split(":")[0].split(",")[0].lower()]
    return "\n".join([*parts, *([brought] if brought else [])])


def own_text(name: str) -> str:
    """A text of this project: beside the package in a checkout, among the metadata of an installation.

    Raises:
        EnvironmentFault: it is in neither.
    """
    beside = PACKAGE.parent / name
    if (PACKAGE.parent / "pyproject.toml").exists() and beside.exists():
        return beside.read_text(encoding="utf-8")
    try:
        found = [file for file in metadata.files("qwen-onnx") or () if file.name == name and "dist-info" in str(file)]
    except metadata.PackageNotFoundError:
        found = []
    if not found:
        raise EnvironmentFault(f"this installation of qwen-onnx lacks its {name}", hint="pip install qwen-onnx")
    return found[0].read_text(encoding="utf-8")
