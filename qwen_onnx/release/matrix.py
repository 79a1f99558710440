"""What a release builds: ``pipelines/release.yaml``, models × targets × precisions with gates and packages.

Every combination of an entry's lists is one job. A gate is a limit beyond the target's own: it may only be tighter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator

from qwen_onnx.catalog.faults import describe
from qwen_onnx.catalog.load import RELEASE_FILE, Catalog, read_yaml
from qwen_onnx.catalog.plan import Plan, make_plan
from qwen_onnx.catalog.schema import Limits, Precision
from qwen_onnx.catalog.select import BYTE_UNITS, parse_amount
from qwen_onnx.errors import ConfigError, PackageError
from qwen_onnx.package.devices import package_name
from qwen_onnx.package.records import Profile
from qwen_onnx.records import Name, Record

SCHEMA_FILE = "recipes/release.schema.json"
HINT = f"correct these keys; {SCHEMA_FILE} describes them"
SECONDS = {"s": 1, "min": 60, "h": 3600}
Amount = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(GB|GiB|MB|MiB)$")]
Duration = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(s|min|h)$")]
# measured figures: at most, or at least
UPPER = ("kld_mean", "kld_p99", "ppl_ratio", "max_bytes")
LOWER = ("top1", "decode_speedup", "prefill_speedup")


class Gates(Record):
    """What a job must reach beyond the verdict PASS; units as in a pipeline's ``limits``."""

    kld_mean: float | None = Field(default=None, gt=0)
    kld_p99: float | None = Field(default=None, gt=0)
    top1: float | None = Field(default=None, gt=0, le=1)
    ppl_ratio: float | None = Field(default=None, ge=1)
    decode_speedup: float | None = Field(default=None, gt=0)
    prefill_speedup: float | None = Field(default=None, gt=0)
    max_bytes: int | None = Field(default=None, gt=0, description="of the artifact's files together")
    foundry: bool = Field(default=False, description="Foundry Local must load the package and answer with it")
    unverified: Literal["refuse", "allow"] = Field(
        default="refuse", description="allow: nothing is measured, and the release says so"
    )

    @model_validator(mode="after")
    def _nothing_measured_nothing_gated(self) -> Gates:
        if self.unverified == "allow" and (asked := sorted(self.limits.keys() - {"max_bytes"})):
            raise ValueError(f"{', '.join(asked)}: nothing is measured with `unverified: allow`")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return {name: limit for name in (*UPPER, *LOWER) if (limit := getattr(self, name)) is not None}

    def looser_than(self, limits: Limits) -> list[str]:
        """What is asked less strictly here than by ``limits``, each as a sentence."""
        faults = []
        for name, gate in self.limits.items():
            own = getattr(limits, name)
            if own is not None and (gate > own if name in UPPER else gate < own):
                faults.append(f"gates.{name}: {gate!r} is looser than the target's own {own!r}")
        return faults


class Entry(Record):
    """Some models on some targets; every combination is a job."""

    models: tuple[Name, ...] = Field(min_length=1)
    targets: tuple[Name, ...] = Field(min_length=1)
    precisions: tuple[Precision, ...] = Field(default=(), description="empty: each target's own default")
    gates: Gates = Gates()
    packages: tuple[Profile, ...] = Field(min_length=1)
    memory: Amount = Field(description="resident memory of a job's processes together, e.g. 8GB; more ends the job")
    timeout: Duration = Field(description="time of a job, e.g. 45min; a job that takes longer is ended")
    cpus: int = Field(default=1, ge=1, description="of a machine, that Ray reserves for a job")


class Matrix(Record):
    """``pipelines/release.yaml``."""

    version: int = Field(default=1, ge=1, description="version in the packages' ids")
    matrix: tuple[Entry, ...] = Field(min_length=1)


class ReleaseJob(Record):
    """One artifact of a release with its packages.

    Attributes:
        memory: most resident bytes of its processes together.
        seconds: most time.
        version: in the packages' ids.
        recipe: text of the user's own recipe of the model; None: the catalogue has the model. Text, since a worker may
            not have the file, and since another text is another job.
    """

    model: str
    target: str
    precision: Precision
    gates: Gates
    packages: tuple[Profile, ...]
    memory: int
    seconds: float
    cpus: int
    version: int
    recipe: str | None = None

    @property
    def name(self) -> str:
        """``<model>/<target>-<precision>``, as below ``artifacts/``."""
        return f"{self.model}/{self.target}-{self.precision}"

    @property
    def slug(self) -> str:
        """The name as one part of a path."""
        return f"{self.model}--{self.target}-{self.precision}"


def load_matrix(catalog: Catalog, path: Path | None = None) -> tuple[ReleaseJob, ...]:
    """The jobs of a matrix file, by default of ``pipelines/release.yaml``.

    Raises:
        ConfigError: with every fault of the file, of its names and of its gates.
    """
    file = path or catalog.root / RELEASE_FILE
    shown = RELEASE_FILE if path is None else str(path)
    if not file.is_file():
        raise ConfigError([f"{shown}: no such file"], hint=f"write one after {RELEASE_FILE}")
    faults: list[str] = []
    jobs: list[ReleaseJob] = []
    for data in read_yaml(file, shown, faults).values():
        version = 1
        try:
            version = Matrix.model_validate(data).version
        except ValidationError as error:
            faults += describe(shown, error, data)
        for index, entry in enumerate(_sound_entries(data)):
            jobs += _jobs(catalog, entry, version, f"{shown}: matrix.{index}", faults) if entry else []
    names = [job.name for job in jobs]
    faults += [f"{shown}: {name}: stands for two jobs" for name in sorted({n for n in names if names.count(n) > 1})]
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)), hint=HINT)
    return tuple(jobs)


def _sound_entries(data: Any) -> list[Entry | None]:
    """The entries at their positions; None for one with faults, so that those of the others are told too."""
    entries = data.get("matrix") if isinstance(data, dict) else None
    found: list[Entry | None] = []
    for item in entries if isinstance(entries, list) else []:
        try:
            found.append(Entry.model_validate(item))
        except ValidationError:
            found.append(None)
    return found


def _jobs(catalog: Catalog, entry: Entry, version: int, place: str, faults: list[str]) -> list[ReleaseJob]:
    wanted = [
        (model, target, precision)
        for model in entry.models
        for target in entry.targets
        for precision in entry.precisions or (None,)
    ]
    jobs = []
    for model, target, precision in wanted:
        try:
            plan = make_plan(catalog, model, target, precision)
            package_name(plan, None)
        except ConfigError as error:
            faults += [f"{place}: {fault}" for fault in error.faults]
            continue
        except PackageError as error:
            faults.append(f"{place}: {error.what}")
            continue
        faults += [f"{place}.{fault}, for {plan.name}" for fault in entry.gates.looser_than(plan.limits)]
        jobs.append(_job(entry, plan, version, catalog.texts.get(catalog.file_of(model))))
    return jobs


def _job(entry: Entry, plan: Plan, version: int, recipe: str | None) -> ReleaseJob:
    unit = next(unit for unit in ("min", "s", "h") if entry.timeout.endswith(unit))
    return ReleaseJob(
        model=plan.model,
        target=plan.target,
        precision=plan.precision,
        gates=entry.gates,
        packages=entry.packages,
        memory=parse_amount(entry.memory, BYTE_UNITS, "memory"),
        seconds=float(entry.timeout.removesuffix(unit)) * SECONDS[unit],
        cpus=entry.cpus,
        version=version,
        recipe=recipe,
    )


def committed_files(catalog: Catalog) -> dict[str, str]:
    """Text of every file that `make plans` generates from the release's records, by path.

    Raises:
        ConfigError: what the release lists cannot be built.
    """
    if (catalog.root / RELEASE_FILE).exists():
        load_matrix(catalog)
    return {SCHEMA_FILE: json.dumps(Matrix.model_json_schema(), indent=2) + "\n"}
