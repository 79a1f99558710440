"""The check ``tasks``: made when benchmarks are asked for."""

from __future__ import annotations

from qwen_onnx.errors import VerificationError
from qwen_onnx.processes.progress import progress
from qwen_onnx.verify.checks import LOADED, check
from qwen_onnx.verify.context import Context
from qwen_onnx.verify.latency import pytorch_fits
from qwen_onnx.verify.records import CheckResult, TaskResult, worst
from qwen_onnx.verify.tasks.recovery import judged

LAYERWISE = "PyTorch does not fit in memory: it answered layer by layer"


@check("tasks", LOADED, asked=lambda options: options.tasks is not None)
def recovery_of_tasks(context: Context) -> CheckResult:
    """The artifact answers benchmarks nearly as well as PyTorch does, on the same items."""
    from qwen_onnx.verify.tasks.harness import answered
    from qwen_onnx.verify.tasks.items import tasks_of
    from qwen_onnx.verify.tasks.models import artifact_side, torch_side

    options = context.options.tasks
    if options is None:
        raise VerificationError("no tasks are named", hint="--tasks gsm8k,hellaswag")
    context.release()
    tasks, whole = tasks_of(options), pytorch_fits(context.checkpoint, context.options)
    # one after the other: each holds its own weights
    with torch_side(context, whole=whole) as model:
        progress(f"tasks: PyTorch fp32 answers {', '.join(options.names)}")
        baseline = answered(model, tasks, options.items)
    context.release()
    with artifact_side(context) as model:
        progress(f"tasks: the artifact answers {', '.join(options.names)}")
        artifact = answered(model, tasks, options.items)
    found = []
    for task in tasks:
        ours, theirs = artifact[task.name], baseline[task.name]
        if ours.items != theirs.items:
            raise VerificationError("both sides were not asked the same", where=task.name)
        found.append(
            judged(
                task.name,
                ours.metric,
                task.source,
                ours.right,
                theirs.right,
                options.recovery,
                resamples=context.options.resamples,
                seed=context.options.seed,
            )
        )
    context.tasks = tuple(found)
    return _result(found, options.recovery, "" if whole else LAYERWISE)


def _result(found: list[TaskResult], limit: float, how: str) -> CheckResult:
    measured: dict[str, float | str] = {}
    for task in found:
        if task.recovery:
            measured |= {
                task.name: task.recovery.value,
                f"{task.name}_lower": task.recovery.lower,
                f"{task.name}_upper": task.recovery.upper,
            }
    unclear = [task.name for task in found if not task.recovery]
    return CheckResult(
        name="tasks",
        verdict=worst(task.verdict for task in found),
        measured=measured,
        limit={task.name: limit for task in found},
        detail="; ".join(
            filter(None, (how, f"PyTorch answers too few items rightly: {', '.join(unclear)}" if unclear else ""))
        ),
    )
