"""Recipe row and pipeline → one frozen, self-contained Plan with a digest.

The effective configuration has exactly two layers; ``recipes/plans.lock`` records the digest of
each (model, target), so that an edit shows which sizes it moved.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import Field, ValidationError

from qwen_onnx.catalog import Catalog, describe
from qwen_onnx.errors import ConfigError
from qwen_onnx.passes import CALIBRATED, STEP_CONFIGS
from qwen_onnx.schema import Family, Limits, Pipeline, Readback, Record, Row, Shape, Source, Variant


class Plan(Record):
    """Everything that decides what the artifact will be, and nothing of this machine.

    ``olive`` is a complete Olive run config; its paths are relative to the folder that Olive runs in.
    """

    model: str
    title: str
    target: str
    precision: str
    architecture: str
    parameters: int = Field(gt=0)
    context: int = Field(gt=0)
    license: str | None
    shape: Shape
    sources: tuple[Source, ...]
    olive: dict[str, Any]
    readback: Readback
    limits: Limits

    @property
    def digest(self) -> str:
        """SHA-256 of the plan in canonical JSON."""
        return digest_of(self.model_dump(mode="json"))

    @property
    def name(self) -> str:
        """Where the artifact goes below ``artifacts/``: ``<model>/<target>-<precision>``."""
        return f"{self.model}/{self.target}-{self.precision}"


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of ``value`` as JSON with sorted keys and no spaces."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def make_plan(catalog: Catalog, model: str, target: str) -> Plan:
    """Compose the plan of ``model`` on ``target``.

    Raises:
        ConfigError: unknown model or target, or every fault of their composition.
    """
    family, row = catalog.row(model)
    return _compose(family, row, catalog.pipeline(target), _file_of(catalog, family))


def make_variant_plan(catalog: Catalog, model: str, target: str, variant: Variant) -> Plan:
    """The plan of ``model`` with the steps of ``variant``; ConfigError with every fault."""
    family, row = catalog.row(model)
    pipeline = catalog.pipeline(target)
    file = f"pipelines/variants/{target}.yaml"
    try:
        readback = Readback.model_validate(pipeline.readback.model_dump() | variant.readback)
    except ValidationError as error:
        raise ConfigError(describe(f"{file}: variants.{variant.name}.readback", error)) from error
    changed = pipeline.model_copy(update={"steps": variant.steps, "readback": readback})
    return _compose(family, row, changed, _file_of(catalog, family), pipeline_file=f"{file}: variants.{variant.name}")


def make_all_plans(catalog: Catalog) -> list[Plan]:
    """The plan of every (model, target) that can be built; ConfigError with the faults of all of them."""
    plans, faults = [], []
    for family, row in (found for found in catalog.rows.values() if not found[1].planned):
        for pipeline in catalog.pipelines.values():
            try:
                plans.append(_compose(family, row, pipeline, _file_of(catalog, family)))
            except ConfigError as error:
                faults += error.faults
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)), hint="correct these keys, then: make plans")
    return plans


def _file_of(catalog: Catalog, family: Family) -> str:
    return next(file for file, known in catalog.families.items() if known is family)


def _compose(family: Family, row: Row, pipeline: Pipeline, file: str, pipeline_file: str | None = None) -> Plan:
    if row.planned or row.parameters is None or row.context is None:
        raise ConfigError([f"{file}: {row.id} cannot be built yet: {row.planned}"], hint="qwen-onnx list")
    faults: list[str] = []
    steps: dict[str, dict[str, Any]] = {s.name: {"type": s.type, **s.config} for s in pipeline.steps}
    layers: dict[str, Any] = {
        "steps": steps,
        "readback": pipeline.readback.model_dump(),
        "limits": pipeline.limits.model_dump(),
    }
    _apply_size(layers, row, pipeline, faults)
    _apply_override(layers, row, pipeline.target, file, faults)
    _check_steps(steps, pipeline_file or f"pipelines/{pipeline.target}.yaml", faults)
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
        precision=pipeline.precision,
        architecture=family.architecture,
        parameters=row.parameters,
        context=row.context,
        license=row.license,
        shape=row.shape,
        sources=row.sources,
        olive=_olive_config(steps, pipeline),
        readback=Readback.model_validate(layers["readback"]),
        limits=Limits.model_validate(layers["limits"]),
    )


def _apply_size(layers: dict[str, Any], row: Row, pipeline: Pipeline, faults: list[str]) -> None:
    for entry in pipeline.larger:
        unknown = sorted(set(entry.limits) - set(layers["limits"]))
        faults += [f"pipelines/{pipeline.target}.yaml: larger.limits.{name}: unknown key" for name in unknown]
        if row.parameters and row.parameters >= entry.parameters:
            layers["limits"] |= entry.limits


def _apply_override(layers: dict[str, Any], row: Row, target: str, file: str, faults: list[str]) -> None:
    override = row.targets.get(target)
    for address, value in (override.set if override else {}).items():
        *path, field = address.split(".")
        if path == ["steps"] and field in layers["steps"] and value is None:
            del layers["steps"][field]
            continue
        if _is_option(layers["steps"], path, field):
            layers["steps"][path[1]][field] = value
            continue
        node: Any = layers
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        # a whole step cannot be set, only left out: what it would become is the pipeline's business
        if not isinstance(node, dict) or field not in node or path in ([], ["steps"]):
            faults.append(f"{file}: sizes.{row.id}.targets.{target}.set.{address}: matches nothing in the pipeline")
        else:
            node[field] = value


def _is_option(steps: dict[str, dict[str, Any]], path: list[str], field: str) -> bool:
    """Whether the address is an option of a step, given in the pipeline or left at its default there."""
    step = steps.get(path[1]) if len(path) == 2 and path[0] == "steps" else None
    record = STEP_CONFIGS.get(step["type"]) if step else None
    return record is not None and field in record.model_fields


def _check_quantiser(steps: dict[str, dict[str, Any]], architecture: str, row: str, faults: list[str]) -> None:
    """What the step cannot quantise is known before anything is downloaded."""
    names = [name for name, step in steps.items() if step["type"] == "CalibratedGptq"]
    if architecture not in CALIBRATED:
        faults += [
            f"{row}: the step {name} (CalibratedGptq) cannot quantise a {architecture}; set: {{steps.{name}: null}}"
            for name in names
        ]
    if not steps:
        faults.append(f"{row}: no step is left")


def _check_steps(steps: dict[str, dict[str, Any]], file: str, faults: list[str]) -> None:
    for name, step in steps.items():
        record = STEP_CONFIGS.get(step["type"])
        if record is None:
            known = ", ".join(sorted(STEP_CONFIGS))
            faults.append(f"{file}: steps.{name}.type: no pass {step['type']!r}; known: {known}")
            continue
        try:
            record.model_validate({key: value for key, value in step.items() if key != "type"})
        except ValidationError as error:
            faults += describe(f"{file}: steps.{name}.config", error)


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
