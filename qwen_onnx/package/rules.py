"""Rules that a package must keep, each a function that names what breaks it.

Foundry Local checks little of this when a model is registered: what breaks a rule fails later, at load, in the middle
of an answer, or not at all but with wrong text. All faults are told together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from qwen_onnx.errors import PackageError
from qwen_onnx.package import model_rules  # noqa: F401 - registers its rules
from qwen_onnx.package.contents import INFERENCE, SIDECAR, Contents, Unreadable
from qwen_onnx.package.devices import DEVICES, NAME
from qwen_onnx.package.foundry import SEEING_TYPES, SEES, UNVERIFIED, modalities_of, model_megabytes
from qwen_onnx.package.registry import RULES, rule

# a canonical version: no sign, no leading zero; Foundry keeps it in 32 bits
VERSION = re.compile(r"0|[1-9]\d{0,8}")
TASKS = ("chat-completion", "coding", SEES)
STRINGS = {
    "task",
    "display_name",
    "publisher",
    "license",
    "min_fl_version",
    "parent_uri",
    "capabilities",
    "input_modalities",
    "output_modalities",
    "execution_provider",
    "device_type",
    "tool_call_start",
    "tool_call_end",
    "reasoning_start",
    "reasoning_end",
}
INTS = {"supports_tool_calling", "supports_reasoning", "max_output_tokens", "filesize_mb"}
# files that hold weights, or parts of a download
WEIGHTS = {".onnx", ".data", ".bin", ".xml", ".safetensors", ".gguf", ".ortpackage", ".tmp"}
DOWNLOAD = "download.tmp"
# the one rule about where a package lies: it is kept when one is made
FOLDER_NAME = "folder-name"
# properties of ``Contents``, each of a file that must be there
READ = (
    *("genai", "search", "sidecar", "inference", "tokenizer_config", "tokenizer", "templates", "record", "manifest"),
    *("graph", "external"),
)


def broken_rules(folder: Path) -> dict[str, list[str]]:
    """Faults by the name of the rule; empty when every rule is kept.

    Raises:
        EnvironmentFault: onnx is not installed.
    """
    contents = Contents(folder)
    found = {}
    for each in RULES.values():
        try:
            faults = list(each.find(contents))
        except Unreadable:
            continue
        if faults:
            found[each.name] = faults
    return found


def check_rules(folder: Path) -> None:
    """PackageError with every fault of every rule."""
    found = broken_rules(folder)
    if found:
        listing = "\n".join(f"  - {name}: {fault}\n    {RULES[name].reason}" for name in found for fault in found[name])
        count = sum(map(len, found.values()))
        raise PackageError(
            f"the package breaks {count} rule{'s' if count != 1 else ''}:\n{listing}",
            where=str(folder),
            hint="build the artifact again, then: qwen-onnx package ARTIFACT",
        )


@rule("readable", "What reads the package needs these files.")
def _readable(contents: Contents) -> Iterator[str]:
    told = set()
    for name in READ:
        try:
            getattr(contents, name)
        except Unreadable as error:
            told.add(error.what)
    yield from sorted(told)


@rule("id", "Foundry Local registers only <name>:<version> with a plain name and a canonical number.")
def _id(contents: Contents) -> Iterator[str]:
    name, colon, version = contents.record.id.partition(":")
    if not (NAME.fullmatch(name) and colon and VERSION.fullmatch(version)):
        yield f"{contents.record.id!r} is not such an id"


@rule("suffix", "The suffix tells users and the alias where the variant runs.")
def _suffix(contents: Contents) -> Iterator[str]:
    name = contents.record.id.partition(":")[0]
    suffix = DEVICES[contents.record.target].suffix if contents.record.target in DEVICES else None
    if not suffix or not name.endswith(f"-{suffix}") or name == f"-{suffix}":
        yield f"{name} does not end with -{suffix}, as packages for {contents.record.target} do"


@rule("one-name", "The older Foundry Local lists a model by inference_model.json, the newer by its registered id.")
def _one_name(contents: Contents) -> Iterator[str]:
    names = {INFERENCE: contents.inference.get("Name"), SIDECAR: contents.sidecar["model_id"]}
    for file, name in names.items():
        if name != contents.record.id:
            yield f"{file} says {name!r}, package.json {contents.record.id!r}"


@rule(FOLDER_NAME, "A colon cannot stand in a folder's name everywhere, so that the version follows a hyphen.")
def _folder_name(contents: Contents) -> Iterator[str]:
    wanted = contents.record.id.replace(":", "-")
    if contents.path.resolve().name != wanted:
        yield f"the folder is called {contents.path.resolve().name}, its id asks for {wanted}"


@rule("task", "Foundry Local opens a chat for these tasks only, and sends pictures to these types of models only.")
def _task(contents: Contents) -> Iterator[str]:
    if contents.strings.get("task") not in TASKS:
        yield f"task is {contents.strings.get('task')!r}, none of {', '.join(TASKS)}"
    elif (contents.strings["task"] == SEES) != contents.sees:
        told = "reads" if contents.sees else "has no encoder for"
        yield f"task is {contents.strings['task']!r}, the model {told} pictures"
    elif contents.sees and (kind := contents.genai.model.type) not in SEEING_TYPES:
        yield f"type of genai_config.json is {kind!r}, none of {', '.join(SEEING_TYPES)}"


@rule("modalities", "Programs choose a model that sees by these; without them Foundry Local goes by the task.")
def _modalities(contents: Contents) -> Iterator[str]:
    for key, wanted in modalities_of(contents).items():
        if (found := contents.strings.get(key, wanted)) != wanted:
            yield f"{key} is {found!r}, the model has {wanted!r}"


@rule("properties", "A property of another name or type is ignored or refused.")
def _properties(contents: Contents) -> Iterator[str]:
    for kind, known, properties in ((str, STRINGS, contents.strings), (int, INTS, contents.ints)):
        for key, value in properties.items():
            if key not in known:
                yield f"{key} is no known {kind.__name__} property"
            elif type(value) is not kind or "\0" in str(value) or value == "":
                yield f"{key} is {value!r}, not a {kind.__name__} that Foundry Local takes"


@rule("needed-properties", "Without these a user cannot tell what the model is and which Foundry Local it needs.")
def _needed_properties(contents: Contents) -> Iterator[str]:
    for key in ("display_name", "publisher", "min_fl_version", "capabilities"):
        if not contents.strings.get(key):
            yield f"{key} is missing"


@rule("licence", "Nobody may use weights without knowing under what terms.")
def _licence(contents: Contents) -> Iterator[str]:
    if not contents.strings.get("license"):
        yield "the property license is missing; the recipe's row says it"


@rule("size", "Foundry Local shows the size before a model is fetched.")
def _size(contents: Contents) -> Iterator[str]:
    whole = all((contents.path / name).is_file() for name in contents.model_files)
    if whole and (said := contents.ints.get("filesize_mb")) != (found := model_megabytes(contents)):
        yield f"filesize_mb is {said}, the model's files have {found} MB"


@rule("unverified", "What was not proven must not look as if it were.")
def _unverified(contents: Contents) -> Iterator[str]:
    record = contents.record
    if record.verdict != contents.manifest.verdict:
        yield f"package.json says {record.verdict}, the artifact's manifest {contents.manifest.verdict}"
    elif record.unverified != (record.verdict != "PASS"):
        yield f"package.json has the verdict {record.verdict} and unverified = {str(record.unverified).lower()}"
    elif record.unverified and UNVERIFIED not in str(contents.strings.get("display_name", UNVERIFIED)):
        yield f"display_name does not say {UNVERIFIED}"


@rule("flat", "A variant is one folder: Foundry Local takes what lies deeper for other variants, and no package roots.")
def _flat(contents: Contents) -> Iterator[str]:
    for path in sorted(contents.path.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield f"{path.name} is a folder"


@rule("download-marker", "Foundry Local skips a folder with this file as a download that was not finished.")
def _download_marker(contents: Contents) -> Iterator[str]:
    if (contents.path / DOWNLOAD).exists():
        yield f"{DOWNLOAD} is there"


@rule("external-data", "A graph without its weights does not load, and one that reads elsewhere is not a package.")
def _external_data(contents: Contents) -> Iterator[str]:
    for name, needed in contents.external.items():
        path = contents.path / name
        if Path(name).name != name or path.is_symlink():
            yield f"the graph reads {name!r}, which is not a file of this folder"
        elif not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size < needed:
            yield f"{name} has {path.stat().st_size} bytes, the graph reads {needed}"


@rule("stray", "Weights that nothing reads are dead load, or belong to another model.")
def _stray(contents: Contents) -> Iterator[str]:
    known = {*contents.model_files, DOWNLOAD}
    for path in sorted(contents.path.iterdir()):
        if path.is_file() and path.suffix in WEIGHTS and path.name not in known:
            yield f"nothing reads {path.name}"
