"""Faults of recipes and pipelines as lines for people: file, key, what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from qwen_onnx.passes import STEP_CONFIGS
from qwen_onnx.schema import Limits, Readback


def describe(file: str, error: ValidationError, data: Any = None) -> list[str]:
    """One line per fault: file, key path, what is wrong."""
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(_name(part, data, item["loc"][:index]) for index, part in enumerate(item["loc"]))
        message = "unknown key" if item["type"] == "extra_forbidden" else item["msg"]
        lines.append(f"{file}: {key or '(top level)'}: {message}")
    return lines


def _name(part: str | int, data: Any, path: tuple[str | int, ...]) -> str:
    """List positions read better by the id or name of what stands there."""
    if isinstance(part, str):
        return part
    for step in (*path, part):
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            return str(part)
    label = data.get("id") or data.get("name") if isinstance(data, dict) else None
    return str(label or part)


def further_faults(recipes: dict[str, Any], pipelines: dict[str, Any]) -> list[str]:
    """What composing plans would find besides, for files that cannot be composed since others have faults.

    A user who mistyped an option, a key and an address shall hear of all three at once.

    Args:
        recipes: what the files hold, by name; nothing about it is known to be right.
        pipelines: the same.
    """
    steps = [(file, name, step) for file, data in pipelines.items() for name, step in _steps(data)]
    faults = [fault for file, name, step in steps for fault in _option_faults(file, name, step)]
    by_target = {_get(data, "target"): data for data in pipelines.values()}
    for file, data in recipes.items():
        for row in _list(_get(data, "sizes")):
            for target, override in _dict(_get(row, "targets")).items():
                for address in _dict(_get(override, "set")):
                    if target in by_target and not _matches(by_target[target], address):
                        place = f"{file}: sizes.{_get(row, 'id')}.targets.{target}.set.{address}"
                        faults.append(f"{place}: matches nothing in the pipeline")
    return faults


def _get(data: Any, key: str) -> Any:
    return data.get(key) if isinstance(data, dict) else None


def _list(data: Any) -> list[Any]:
    return data if isinstance(data, list) else []


def _dict(data: Any) -> dict[Any, Any]:
    return data if isinstance(data, dict) else {}


def _steps(pipeline: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Steps of all precisions, each with the place that its build has in the file."""
    for precision, build in _dict(_get(pipeline, "precisions")).items():
        for step in _list(_get(build, "steps")):
            if isinstance(step, dict):
                yield f"precisions.{precision}", step


def _option_faults(file: str, place: str, step: dict[str, Any]) -> list[str]:
    where = f"{file}: {place}: steps.{step.get('name')}"
    record = STEP_CONFIGS.get(str(step.get("type")))
    if record is None:
        known = ", ".join(sorted(STEP_CONFIGS))
        return [f"{where}.type: no pass {step.get('type')!r}; known: {known}"]
    try:
        record.model_validate(_dict(step.get("config")))
    except ValidationError as error:
        return describe(f"{where}.config", error)
    return []


def _matches(pipeline: Any, address: Any) -> bool:
    kind, _, rest = str(address).partition(".")
    if kind in ("limits", "readback"):
        return rest in (Limits if kind == "limits" else Readback).model_fields
    name, _, field = rest.partition(".")
    named = [step for _, step in _steps(pipeline) if step.get("name") == name] if kind == "steps" else []
    records = [STEP_CONFIGS[step["type"]] for step in named if step.get("type") in STEP_CONFIGS]
    return bool(named) and (not field or any(field in record.model_fields for record in records))
