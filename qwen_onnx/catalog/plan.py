"""Recipe row and pipeline → one frozen, self-contained Plan with a digest.

The effective configuration has exactly two layers; ``recipes/plans.lock`` records the digest of
each (model, target, precision), so that an edit shows which sizes it moved.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError

from qwen_onnx.catalog.faults import describe, find, step_faults
from qwen_onnx.catalog.load import Catalog
from qwen_onnx.catalog.registry import options_of, passes
from qwen_onnx.catalog.schema import (
    About,
    Build,
    Family,
    Limits,
    Pipeline,
    Precision,
    Readback,
    Row,
    Shape,
    Step,
    Variant,
    Verification,
)
from qwen_onnx.catalog.sources import FolderSource, HubSource, Source
from qwen_onnx.errors import ConfigError
from qwen_onnx.processes.environments import Environment
from qwen_onnx.records import Grown, Name, Record, Sha256, digest_of

# the step that writes a vision tower
VISION, AUDIO = "VisionEncoder", "AudioEncoder"
# what every record of a model says that no recipe of ours describes
UNCATALOGUED = "the model is not in the catalogue"


class Adapted(Record):
    """The adapter that is merged into a plan's checkpoint.

    Attributes:
        digest: of its weights and its config; ``rank`` of its matrices.
        weights: digest of the base's weights that it names; None: it names none, and only shapes were compared.
        data: SHA-256 of the file that it learnt from; None: it does not say.
    """

    name: Name
    digest: Sha256
    rank: int = Field(ge=1)
    weights: Sha256 | None = None
    data: Sha256 | None = None


class Plan(Grown):
    """Everything that decides what the artifact will be, and nothing of this machine.

    ``olive`` is a complete Olive run config; its paths are relative to the folder that Olive runs in. ``about`` is for
    what comes after the build: a manifest holds it beside the plan.
    """

    added = frozenset({"catalogued", "quantization", "rope", "adapter"})

    model: str
    title: str
    target: str
    precision: Precision
    verification: Verification
    architecture: str
    parameters: int = Field(gt=0)
    context: int = Field(gt=0)
    license: str | None
    environment: Environment | None
    shape: Shape
    sources: tuple[Source, ...]
    # false: a recipe of the user's own, or a row that was made from the checkpoint's config.json
    catalogued: bool = True
    quantization: Literal["fp8"] | None = None
    rope: Literal["yarn"] | None = None
    # merged into the checkpoint before anything else; ``model`` is then the merged one
    adapter: Adapted | None = None
    olive: dict[str, Any]
    readback: Readback
    limits: Limits
    # a language more on a card is not another artifact: neither in the JSON nor in the digest
    about: About | None = Field(default=None, exclude=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the plan in canonical JSON."""
        return digest_of(self.model_dump(mode="json"))

    @property
    def needs_reference(self) -> bool:
        """Whether only an fp32 export proves the graph: another engine's, or one whose norms were altered."""
        if self.verification is Verification.STRUCTURE:
            return False
        return self.environment is not None or any(options_of(step).rewrites for step in self.olive["passes"].values())

    @property
    def name(self) -> str:
        """Where the artifact goes below ``artifacts/``: ``<model>/<target>-<precision>``."""
        return f"{self.model}/{self.target}-{self.precision}"

    @property
    def base(self) -> str:
        """The model's id without an adapter's name."""
        return self.model.removesuffix(f"-{self.adapter.name}") if self.adapter else self.model

    @property
    def asked(self) -> str:
        """What the command line takes for this model: its id, a hub's repository at a commit, or its folder.

        Of a model with an adapter it is the base, which `--adapter` follows.
        """
        if self.adapter:
            return self.model_copy(update={"model": self.base, "adapter": None}).asked
        source = self.sources[0]
        if self.catalogued or not isinstance(source, HubSource | FolderSource):
            return self.model
        if isinstance(source, FolderSource):
            return f"./{source.name}"
        hub = "" if source.kind == "huggingface" else f"{source.kind}:"
        return f"{hub}{source.repo}" + (f"@{source.revision}" if source.revision else "")

    @property
    def sees(self) -> bool:
        """Whether a step writes a vision tower."""
        return self._has(VISION)

    @property
    def hears(self) -> bool:
        """Whether a step writes an audio tower."""
        return self._has(AUDIO)

    @property
    def senses(self) -> bool:
        """Whether a step writes a tower."""
        return self.sees or self.hears

    def _has(self, kind: str) -> bool:
        return any(step["type"] == kind for step in self.olive["passes"].values())

    def claim(self, verdict: str, level: Verification | None = None) -> str:
        """What a report or manifest may say of an artifact with ``verdict``, found at ``level`` or the target's own."""
        return (level or self.verification).claim(verdict) + ("" if self.catalogued else f"; {UNCATALOGUED}")


def make_plan(catalog: Catalog, model: str, target: str, precision: str | None = None) -> Plan:
    """Compose the plan of ``model`` on ``target``, in the target's default precision unless told otherwise.

    Raises:
        ConfigError: unknown model, target or precision, one that is excluded or unavailable, or every fault of
            their composition.
    """
    family, row = catalog.row(model)
    chosen = catalog.precision(target, precision)
    return _compose(catalog, family, row, catalog.pipeline(target), chosen)


def make_variant_plan(catalog: Catalog, model: str, target: str, variant: Variant) -> Plan:
    """The plan of ``model`` with the steps of ``variant``; ConfigError with every fault."""
    family, row = catalog.row(model)
    pipeline, precision = catalog.pipeline(target), catalog.precision(target)
    build = pipeline.precisions[precision]
    file = f"pipelines/variants/{target}.yaml"
    try:
        readback = Readback.model_validate(build.readback.model_dump() | variant.readback)
    except ValidationError as error:
        raise ConfigError(describe(f"{file}: variants.{variant.name}.readback", error)) from error
    # what the pipeline changes of its own steps has no place in these
    larger = tuple(entry.model_copy(update={"set": {}}) for entry in build.larger)
    build = build.model_copy(update={"steps": variant.steps, "readback": readback, "larger": larger})
    changed = pipeline.model_copy(update={"precisions": {precision: build}})
    place = f"{file}: variants.{variant.name}"
    return _compose(catalog, family, row, changed, precision, pipeline_file=place)


def make_all_plans(catalog: Catalog) -> list[Plan]:
    """The plan of every (model, target, precision) that can be built; ConfigError with the faults of all of them."""
    plans, faults = [], []
    for family, row in (found for found in catalog.rows.values() if not found[1].planned):
        for pipeline in (catalog.pipelines[name] for name in catalog.targets_of(row)):
            for precision in catalog.precisions_of(row, pipeline.target):
                try:
                    plans.append(_compose(catalog, family, row, pipeline, precision))
                except ConfigError as error:
                    faults += error.faults
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)), hint="correct these keys, then: make plans")
    return plans


def _compose(
    catalog: Catalog,
    family: Family,
    row: Row,
    pipeline: Pipeline,
    precision: Precision,
    pipeline_file: str | None = None,
) -> Plan:
    file = catalog.file_of(row.id)
    if row.planned or row.parameters is None or row.context is None:
        raise ConfigError([f"{file}: {row.id} cannot be built yet: {row.planned}"], hint="qwen-onnx list")
    override = row.targets.get(pipeline.target)
    if override and override.excluded:
        fault = f"{file}: {row.id} is not built for {pipeline.target}: {override.excluded}"
        raise ConfigError([fault], hint="qwen-onnx list")
    if override and precision in override.without:
        fault = f"{file}: {row.id} has no {precision} for {pipeline.target}: {override.without[precision]}"
        raise ConfigError([fault], hint="qwen-onnx list")
    faults: list[str] = []
    build = pipeline.precisions[precision]
    place = pipeline_file or f"pipelines/{pipeline.target}.yaml: precisions.{precision}"
    beside = pipeline.beside(family.architecture, row.modality)
    layers = _layers(build, beside)
    steps: dict[str, dict[str, Any]] = layers["steps"]
    _apply_size(layers, row, build, place, faults)
    _apply_override(layers, row, pipeline, precision, beside, file, faults)
    _check_steps(steps, pipeline.execution_provider, place, faults)
    _check_speeds(layers["limits"], pipeline.verification, place, faults)
    _check_quantiser(steps, family.architecture, f"{file}: sizes.{row.id}.targets.{pipeline.target}", faults)
    for name, record in (("readback", Readback), ("limits", Limits)):
        try:
            record.model_validate(layers[name])
        except ValidationError as error:
            faults += describe(f"{file}: sizes.{row.id}.targets.{pipeline.target}.set.{name}", error)
    if faults:
        raise ConfigError(faults, hint="correct these keys, then: make plans")
    return Plan(
        model=row.id,
        title=row.title,
        target=pipeline.target,
        precision=precision,
        verification=pipeline.verification,
        architecture=family.architecture,
        parameters=row.parameters,
        context=catalog.context_of(row, pipeline.target) or row.context,
        license=row.license,
        environment=catalog.environments[pipeline.environment] if pipeline.environment else None,
        shape=row.shape,
        sources=row.sources,
        catalogued=file not in catalog.own,
        quantization=row.quantization,
        rope=row.rope,
        olive=_olive_config(steps, pipeline),
        readback=Readback.model_validate(layers["readback"]),
        limits=Limits.model_validate(layers["limits"]),
        about=About(kind=row.kind, tasks=row.tasks, languages=row.languages),
    )


def bounded(plan: Plan, *, max_bytes: int | None = None, max_kld: float | None = None) -> Plan:
    """The plan with another size: its quantiser keeps to ``max_bytes`` of model files or to a predicted ``max_kld``.

    Raises:
        ConfigError: both are given, or no step of the plan can be told a size.
    """
    bounds = {"bits_per_weight": None, "max_bytes": max_bytes, "max_kld": max_kld}
    if max_bytes is not None and max_kld is not None:
        raise ConfigError(["--max-size and --max-kld: each follows from the other; give one of the two"])
    return _told(plan, bounds, "a size or a KLD")


def calibrated(plan: Plan, digest: str) -> Plan:
    """The plan whose quantiser also reads the text with this SHA-256, which goes with the job.

    Raises:
        ConfigError: no step of the plan reads a text.
    """
    return _told(plan, {"calibration": digest}, "a calibration text")


def _told(plan: Plan, options: dict[str, Any], what: str) -> Plan:
    """The plan with ``options`` in every step that has all of them."""
    olive = copy.deepcopy(plan.olive)
    found = [step for step in olive["passes"].values() if options.keys() <= type(options_of(step)).model_fields.keys()]
    if not found:
        raise ConfigError(
            [f"{plan.name}: no step of this build takes {what}"], hint=f"qwen-onnx plan {plan.model} --target cpu"
        )
    for step in found:
        step.update(options)
    return plan.model_copy(update={"olive": olive})


def adapted(plan: Plan, adapter: Adapted) -> Plan:
    """The plan of the checkpoint with ``adapter`` merged into it: a model of its own, whose artifacts go elsewhere."""
    return plan.model_copy(
        update={
            "model": f"{plan.model}-{adapter.name}",
            "title": f"{plan.title} with the adapter {adapter.name}",
            # no row of the catalogue describes what an adapter made of the weights
            "catalogued": False,
            "adapter": adapter,
        }
    )


def _layers(build: Build, beside: Sequence[Step]) -> dict[str, Any]:
    """What an override addresses."""
    return {
        "steps": {step.name: {"type": step.type, **step.config} for step in (*build.steps, *beside)},
        "readback": build.readback.model_dump(),
        "limits": build.limits.model_dump(),
    }


def _apply_size(layers: dict[str, Any], row: Row, build: Build, place: str, faults: list[str]) -> None:
    for entry in build.larger:
        unknown = sorted(set(entry.limits) - set(layers["limits"]))
        faults += [f"{place}.larger.limits.{name}: unknown key" for name in unknown]
        places = {address: find(layers, address, value) for address, value in entry.set.items()}
        faults += [f"{place}.larger.set.{address}: matches nothing" for address, found in places.items() if not found]
        if row.parameters and row.parameters >= entry.parameters:
            layers["limits"] |= entry.limits
            for address, found in places.items():
                if found:
                    found[0][found[1]] = entry.set[address]


def _apply_override(
    layers: dict[str, Any],
    row: Row,
    pipeline: Pipeline,
    precision: Precision,
    beside: Sequence[Step],
    file: str,
    faults: list[str],
) -> None:
    override = row.targets.get(pipeline.target)
    if override is None:
        return
    builds = [build for name, build in pipeline.precisions.items() if name in override.precisions]
    for address, value in override.set.items():
        found = find(layers, address, value)
        matching = [build for build in builds if find(_layers(build, beside), address, value)]
        # a build that has it, but no longer: the step was left out by an address before this one
        gone = found is None and pipeline.precisions[precision] in matching
        if not matching or gone:
            place = f"{file}: sizes.{row.id}.targets.{pipeline.target}.set.{address}"
            faults.append(f"{place}: matches nothing in the pipeline")
        elif found is not None and precision in override.precisions:
            node, field = found
            if node is layers["steps"]:
                del node[field]
            else:
                node[field] = value


def _check_quantiser(steps: dict[str, dict[str, Any]], architecture: str, row: str, faults: list[str]) -> None:
    """What the step cannot quantise is known before anything is downloaded."""
    for name, step in steps.items():
        options = passes().get(step["type"])
        if options and options.architectures is not None and architecture not in options.architectures:
            what = f"the step {name} ({step['type']}) cannot quantise a {architecture}"
            faults.append(f"{row}: {what}; set: {{steps.{name}: null}}")
    if not steps:
        faults.append(f"{row}: no step is left")


def _check_speeds(limits: dict[str, Any], verification: Verification, place: str, faults: list[str]) -> None:
    """A limit that nobody measures would be a promise without proof."""
    if verification is not Verification.RUN:
        speeds = [name for name in ("decode_speedup", "prefill_speedup") if limits.get(name) is not None]
        faults += [f"{place}.limits.{name}: the target is not run here: {verification.text}" for name in speeds]


def _check_steps(steps: dict[str, dict[str, Any]], provider: str, file: str, faults: list[str]) -> None:
    for name, step in steps.items():
        place = f"{file}: steps.{name}"
        wrong = step_faults(place, step)
        faults += wrong
        if not wrong:
            faults += [f"{place}.config.{fault}" for fault in options_of(step).faults(provider)]


def _olive_config(steps: dict[str, dict[str, Any]], pipeline: Pipeline) -> dict[str, Any]:
    accelerator = {"device": pipeline.device, "execution_providers": [pipeline.execution_provider]}
    return {
        "input_model": {"type": "HfModel", "model_path": "checkpoint"},
        "systems": {"target": {"type": "LocalSystem", "accelerators": [accelerator]}},
        "passes": steps,
        "host": "target",
        "target": "target",
        "evaluate_input_model": False,
        "cache_dir": "cache",
        "output_dir": "model",
        "log_severity_level": 1,
    }
