"""Faults of recipes and pipelines as lines for people: file, key, what is wrong."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from qwen_onnx.catalog.registry import passes
from qwen_onnx.catalog.schema import Limits, Readback
from qwen_onnx.records import Record


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
    faults, builds = [], {}
    for file, data in pipelines.items():
        precisions = _dict(_get(data, "precisions"))
        beside = [step for key in ("vision", "audio", "drafts") for step in _list(_get(data, key))]
        builds[_get(data, "target")] = [_layers(build, beside) for build in precisions.values()]
        for precision, build in precisions.items():
            for name, step in _layers(build, [])["steps"].items():
                faults += step_faults(f"{file}: precisions.{precision}: steps.{name}", step)
    for file, data in recipes.items():
        rows = [(f"sizes.{_get(row, 'id')}.", row) for row in _list(_get(data, "sizes"))]
        for place, holder in [("", data), *rows]:
            for target, override in _dict(_get(holder, "targets")).items():
                for address, value in _dict(_get(override, "set")).items():
                    known = builds.get(target, [])
                    if target in builds and not any(find(layers, address, value) for layers in known):
                        faults.append(f"{file}: {place}targets.{target}.set.{address}: matches nothing in the pipeline")
    return faults


def step_faults(place: str, step: dict[str, Any]) -> list[str]:
    """Faults of one step, a mapping of ``type`` and its options."""
    kind, options = step.get("type"), {key: value for key, value in step.items() if key != "type"}
    record = passes().get(str(kind))
    if record is None:
        return [f"{place}.type: no pass {kind!r}; known: {', '.join(sorted(passes()))}"]
    try:
        record.model_validate(options)
    except ValidationError as error:
        return describe(f"{place}.config", error)
    return []


def find(layers: dict[str, Any], address: str, value: Any) -> tuple[dict[str, Any], str] | None:
    """The mapping that holds what an override sets at ``address``, and its key there; None when nothing does.

    An option at its default counts as there. A whole step cannot be set, only left out (null): what it would become is
    the pipeline's business.

    Args:
        layers: ``steps`` by name, each with its type and options; ``readback``; ``limits``.
    """
    *path, field = str(address).split(".")
    if path == ["steps"]:
        return (layers["steps"], field) if value is None and field in layers["steps"] else None
    node: Any = layers
    for part in path:
        node = _get(node, part)
    if not path or not isinstance(node, dict):
        return None
    records: dict[str, type[Record]] = {"readback": Readback, "limits": Limits}
    record = passes().get(str(node.get("type"))) if path[0] == "steps" else records[path[0]]
    return (node, field) if field in node or (record and field in record.model_fields) else None


def _get(data: Any, key: str) -> Any:
    return data.get(key) if isinstance(data, dict) else None


def _list(data: Any) -> list[Any]:
    return data if isinstance(data, list) else []


def _dict(data: Any) -> dict[Any, Any]:
    return data if isinstance(data, dict) else {}


def _layers(build: Any, beside: list[Any]) -> dict[str, Any]:
    """What an override addresses, of a build and of steps ``beside`` it, of which nothing is known to be right."""
    steps = [step for step in (*_list(_get(build, "steps")), *beside) if isinstance(step, dict)]
    return {
        "steps": {str(step.get("name")): {**_dict(step.get("config")), "type": step.get("type")} for step in steps},
        "readback": _dict(_get(build, "readback")),
        "limits": _dict(_get(build, "limits")),
    }
