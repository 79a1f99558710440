"""Walk ``recipes/`` and ``pipelines/``, check every file, and find models and targets.

All faults of all files are reported together, each with its file and key.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from qwen_onnx.catalog.architectures import SEEING, senses
from qwen_onnx.catalog.faults import describe, further_faults
from qwen_onnx.catalog.schema import Family, Override, Pipeline, Precision, Row, Variants
from qwen_onnx.errors import ConfigError
from qwen_onnx.files import PACKAGE
from qwen_onnx.processes.environments import Environment
from qwen_onnx.records import Record

R = TypeVar("R", bound=Record)
# how many names an unknown one is answered with
NEAREST = 5
RELEASE_FILE = "pipelines/release.yaml"
MERGE = "tag:yaml.org,2002:merge"
# where setup.py puts recipes/ and pipelines/ into a wheel
PACKAGED = PACKAGE / "data"


class _UniqueKeyLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML keeps the last of two equal keys in silence; here that is a fault."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", mark)
            seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


@dataclass(frozen=True)
class Catalog:
    """All families and pipelines of one checkout.

    Attributes:
        root: folder that holds ``recipes/`` and ``pipelines/``.
        families: by file path relative to the root.
        pipelines: by target name.
        environments: by name.
        own: those of ``families`` that are not of the catalogue: recipes of the user's, or made from a config.json.
        texts: what the files of the user's recipes hold, by the same path.
    """

    root: Path
    families: dict[str, Family]
    pipelines: dict[str, Pipeline]
    environments: dict[str, Environment]
    own: frozenset[str] = frozenset()
    texts: Mapping[str, str] = field(default_factory=dict)

    def with_own(self, place: str, family: Family) -> Catalog:
        """The same with a family beside it that has no recipe; messages call it ``place``."""
        return replace(self, families={**self.families, place: family}, own=self.own | {place})

    def is_catalogued(self, model: str) -> bool:
        """Whether a recipe of the catalogue itself describes ``model``."""
        families = (family for file, family in self.families.items() if file not in self.own)
        return any(row.id == model for family in families for row in family.sizes)

    def file_of(self, model: str) -> str:
        """The file that describes ``model``, as messages call it; ConfigError when none does."""
        family, _ = self.row(model)
        return next(file for file, known in self.families.items() if known is family)

    def own_file_of(self, model: str) -> str | None:
        """The user's own recipe that describes ``model``; None when the catalogue does."""
        file = self.file_of(model)
        return file if file in self.texts else None

    @cached_property
    def rows(self) -> dict[str, tuple[Family, Row]]:
        """Every size by its id."""
        pairs = ((family, row) for family in self.families.values() for row in family.sizes)
        return {
            row.id: (family, _bounded(_built(_inheriting(row, family), family, self.pipelines), self.pipelines))
            for family, row in pairs
        }

    def row(self, model: str) -> tuple[Family, Row]:
        """The row of ``model``.

        Raises:
            ConfigError: no recipe has that id; the message names the nearest ones.
        """
        if model not in self.rows:
            raise ConfigError([f"recipes/: no model {model!r}{_nearest(model, self.rows)}"], hint="qwen-onnx list")
        return self.rows[model]

    def pipeline(self, target: str) -> Pipeline:
        """The pipeline of ``target``; ConfigError when there is none."""
        if target not in self.pipelines:
            raise ConfigError(
                [f"pipelines/: no target {target!r}{_nearest(target, self.pipelines)}"], hint="qwen-onnx list"
            )
        return self.pipelines[target]

    def environment(self, name: str) -> Environment:
        """The environment ``name``; ConfigError when there is none."""
        if name not in self.environments:
            raise ConfigError([f"pipelines/environments/: no {name!r}{_nearest(name, self.environments)}"])
        return self.environments[name]

    def precision(self, target: str, precision: str | None = None) -> Precision:
        """``precision``, or the target's default one.

        Raises:
            ConfigError: no such target or precision, or the target cannot be built in it; then with the reason.
        """
        pipeline = self.pipeline(target)
        wanted = precision or pipeline.default
        if reason := next((why for name, why in pipeline.unavailable.items() if name == wanted), None):
            raise ConfigError([f"pipelines/{target}.yaml: {wanted} is unavailable: {reason}"], hint="qwen-onnx list")
        found = next((name for name in pipeline.precisions if name == wanted), None)
        if found is None:
            known = ", ".join(pipeline.precisions)
            raise ConfigError([f"pipelines/{target}.yaml: no precision {wanted!r}; known: {known}"])
        return found

    def precisions_of(self, row: Row, target: str) -> list[Precision]:
        """Precisions that ``row`` can be built in for ``target``."""
        override = row.targets.get(target)
        without = override.without if override else {}
        return [name for name in self.pipeline(target).precisions if name not in without]

    def context_of(self, row: Row, target: str) -> int | None:
        """Tokens that an artifact of ``row`` accepts on ``target``, whose shapes may be fixed."""
        known = [value for value in (row.context, self.pipeline(target).context) if value]
        return min(known, default=None)

    def targets_of(self, row: Row) -> list[str]:
        """Targets that ``row`` can be built for."""
        excluded = {name for name, override in row.targets.items() if override.excluded}
        return [name for name, pipeline in self.pipelines.items() if pipeline.precisions and name not in excluded]


def _inheriting(row: Row, family: Family) -> Row:
    return row.model_copy(update={"targets": {**family.targets, **row.targets}}) if family.targets else row


def _built(row: Row, family: Family, pipelines: Mapping[str, Pipeline]) -> Row:
    """The row without the targets whose pipelines do not build its tower, if it has one."""
    if not senses(family.architecture, row.modality):
        return row
    blind = [name for name, pipeline in pipelines.items() if not pipeline.tower(family.architecture)]
    kind = "a vision" if family.architecture in SEEING else "an audio"
    targets = {name: Override(excluded=f"the target's pipeline has no steps for {kind} tower") for name in blind}
    # a reason of the recipe's own says more
    own = {name: override for name, override in row.targets.items() if name not in blind or override.excluded}
    return row.model_copy(update={"targets": targets | own})


def _bounded(row: Row, pipelines: Mapping[str, Pipeline]) -> Row:
    """The row without those precisions of targets, or without the targets, that it is too large for."""
    targets = dict(row.targets)
    for name, pipeline in pipelines.items():
        override = targets.get(name)
        without = {
            precision: f"{build.largest.why}; the largest model has {build.largest.parameters / 1e9:.3g}B weights"
            for precision, build in pipeline.precisions.items()
            if build.largest and (row.parameters or 0) > build.largest.parameters
        }
        if without.keys() == pipeline.precisions.keys() and without:
            targets[name] = Override(excluded=next(iter(without.values())))
        elif without and not (override and override.excluded):
            own = override or Override(without=without)
            targets[name] = own.model_copy(update={"without": {**without, **own.without}})
    return row.model_copy(update={"targets": targets})


def _nearest(name: str, known: Iterable[str]) -> str:
    """What may have been meant: at most ``NEAREST`` names, for there are hundreds of models."""
    names = sorted(known)
    close = difflib.get_close_matches(name.lower(), names, n=NEAREST, cutoff=0.4)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    if len(names) <= NEAREST:
        return f"; known: {', '.join(names)}"
    return f"; the nearest: {', '.join(difflib.get_close_matches(name.lower(), names, n=NEAREST, cutoff=0))}"


def find_root(start: Path | None = None) -> Path:
    """The recipes and pipelines: the first folder that has both, upwards from ``start`` or the working
    directory, then beside this package, then those that a wheel carries."""
    begin = (start or Path.cwd()).resolve()
    for folder in (begin, *begin.parents, PACKAGE.parent, PACKAGED):
        if (folder / "recipes").is_dir() and (folder / "pipelines").is_dir():
            return folder
    raise ConfigError([f"{begin}: no recipes/ and pipelines/ here or above"], hint="run inside a qwen-onnx checkout")


def work_root() -> Path:
    """Where artifacts and downloads go: the checkout, or the working directory without one."""
    root = find_root()
    return Path.cwd() if root == PACKAGED else root


def own_recipes(root: Path, here: Path) -> list[Path]:
    """The user's own recipes: ``recipes/*.yaml`` below ``here``, unless they are those of the catalogue at ``root``."""
    folder = here / "recipes"
    if folder.resolve() == (root / "recipes").resolve():
        return []
    return sorted(folder.glob("*.y*ml"))


def load_catalog(root: Path, own: Sequence[Path] = ()) -> Catalog:
    """Read and check every recipe and pipeline below ``root``, and the recipes ``own`` beside them.

    Raises:
        ConfigError: with every fault of every file; two rows of one id are a fault that names both files.
    """
    faults: list[str] = []
    recipes, targets = _read_folder(root, "recipes", faults), _read_folder(root, "pipelines", faults)
    texts = _read_own(own, recipes, faults)
    added = {name: data for file, text in texts.items() for name, data in _parsed(text, file, faults).items()}
    recipes |= added
    # a list of builds, not a target: matrix.py reads it
    targets.pop(RELEASE_FILE, None)
    families, by_file = _checked(recipes, Family, faults), _checked(targets, Pipeline, faults)
    folder = "pipelines/environments"
    environments = _by_name(_checked(_read_folder(root, folder, faults), Environment, faults), "name", faults)
    pipelines = _by_name(by_file, "target", faults)
    faults += [
        f"{file}: environment: {folder}/ has no {pipeline.environment!r}"
        for file, pipeline in by_file.items()
        if pipeline.environment and pipeline.environment not in environments
    ]
    # of a file that cannot be read its own faults are enough
    found = {f"pipelines/{path.name}": path.stem for path in (root / "pipelines").glob("*.y*ml")}
    unread = {stem for file, stem in found.items() if file not in by_file and file != RELEASE_FILE}
    owner: dict[str, str] = {}
    for file, family in families.items():
        for row in family.sizes:
            if row.id in owner:
                faults.append(f"{file}: sizes.{row.id}: id already used in {owner[row.id]}")
            owner[row.id] = file
        places = [("targets", family.targets), *((f"sizes.{row.id}.targets", row.targets) for row in family.sizes)]
        for place, overrides in places:
            unknown = sorted(set(overrides) - set(pipelines) - unread)
            faults += [f"{file}: {place}.{name}: no such pipeline" for name in unknown]
    if faults:
        faults += further_faults(recipes, targets)
        raise ConfigError(list(dict.fromkeys(faults)), hint="correct these keys; recipes/*.schema.json describes them")
    return Catalog(root, families, pipelines, environments, frozenset(added), texts)


def _read_own(paths: Sequence[Path], known: Mapping[str, Any], faults: list[str]) -> dict[str, str]:
    """Recipes of the user's by the paths that messages show, which are never those of the catalogue's."""
    texts = {}
    for path in paths:
        if not path.is_file():
            faults.append(f"{path}: there is no such file")
            continue
        name = os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)
        file = f"./{name}" if name in known else name
        text = _read(path, file, faults)
        if text is not None:
            texts[file] = text
    return texts


def _by_name(files: dict[str, R], key: str, faults: list[str]) -> dict[str, R]:
    """Records by the name that they carry under ``key``, which must be their file's."""
    found = {}
    for file, record in files.items():
        name = getattr(record, key)
        if name != Path(file).stem:
            faults.append(f"{file}: {key}: is {name!r}, but the file is named {Path(file).stem!r}")
        found[name] = record
    return found


def load_variants(root: Path, target: str) -> Variants:
    """The variants of ``target``.

    Raises:
        ConfigError: there are none, or with every fault of their file.
    """
    file = f"pipelines/variants/{target}.yaml"
    if not (root / file).exists():
        raise ConfigError([f"{file}: no such file"], hint="write one after pipelines/variants/cpu.yaml")
    faults: list[str] = []
    loaded = _checked(read_yaml(root / file, file, faults), Variants, faults)
    if faults:
        raise ConfigError(faults, hint="correct these keys; recipes/variants.schema.json describes them")
    return loaded[file]


def _read_folder(root: Path, folder: str, faults: list[str]) -> dict[str, Any]:
    paths = sorted((root / folder).glob("*.y*ml"))
    return {file: data for path in paths for file, data in read_yaml(path, f"{folder}/{path.name}", faults).items()}


def read_yaml(path: Path, file: str, faults: list[str]) -> dict[str, Any]:
    """What a YAML file holds, by its name; nothing when it cannot be read."""
    text = _read(path, file, faults)
    return {} if text is None else _parsed(text, file, faults)


def _read(path: Path, file: str, faults: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        faults.append(f"{file}: not valid YAML: {error}")
    except OSError as error:
        faults.append(f"{file}: cannot be read: {error.strerror}")
    return None


def _parsed(text: str, file: str, faults: list[str]) -> dict[str, Any]:
    try:
        # the loader is a SafeLoader with one more check
        return {file: yaml.load(text, Loader=_UniqueKeyLoader)}
    except yaml.YAMLError as error:
        faults.append(f"{file}: not valid YAML: {' '.join(str(error).split())}")
        return {}


def _checked(files: dict[str, Any], record: type[R], faults: list[str]) -> dict[str, R]:
    """Those that are a ``record``; the faults of the others go to ``faults``."""
    found: dict[str, R] = {}
    for file, data in files.items():
        try:
            found[file] = record.model_validate(data)
        except ValidationError as error:
            faults += describe(file, error, data)
    return found
