"""Run a plan through Olive in a child process and judge what came out.

Olive exits 0 when it failed, so its word is not enough: the child must report an output model, and the
files of a genai model must be there.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from qwen_onnx.artifact.genai_config import GENAI_CONFIG, GenaiConfig
from qwen_onnx.catalog.registry import options_of
from qwen_onnx.errors import ExportError, full_disk
from qwen_onnx.export.progress import PROGRESS
from qwen_onnx.export.workfolder import KEPT_FOLDER
from qwen_onnx.processes.children import kill_group
from qwen_onnx.processes.environments import Interpreter, own_interpreter
from qwen_onnx.processes.progress import progress

REQUIRED = (GENAI_CONFIG, "tokenizer.json")
# Olive's own bookkeeping beside a model: times and paths of the machine
BOOKKEEPING = ("model_config.json", "footprint.json", "output_footprint.json", "run_history.txt")
HINT = "next:"
RUNNING_PASS = re.compile(r"Running pass (\S+)")


def run_olive(
    config: dict[str, Any],
    checkpoint: Path,
    work: Path,
    log: Path,
    kept: Path | None = None,
    interpreter: Interpreter | None = None,
    companion: Interpreter | None = None,
) -> Path:
    """Run an Olive config.

    Args:
        config: complete Olive run config; it reads ``checkpoint`` and writes below ``work``.
        checkpoint: folder that becomes ``work/checkpoint``.
        work: scratch folder of this build.
        log: file that takes everything that Olive says.
        kept: folder for finished steps of our passes, which a later run with the same build key goes on with.
        interpreter: Python that Olive runs in; None is the one that runs this.
        companion: Python of the target's environment, for passes that start a process in it.

    Returns:
        Folder with the model.

    Raises:
        ExportError: Olive failed or gave no model; carries the last error of its log.
        EnvironmentFault: the disk ran full.
    """
    work.mkdir(parents=True, exist_ok=True)
    (work / "checkpoint").symlink_to(checkpoint.resolve(), target_is_directory=True)
    if kept is not None:
        (work / KEPT_FOLDER).symlink_to(kept.resolve(), target_is_directory=True)
    (work / "olive.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    chosen = interpreter or own_interpreter()
    command = [str(chosen.python), "-m", "qwen_onnx.export.worker", "olive.json", "result.json"]
    environment = {**chosen.variables, "OLIVE_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
    environment |= companion.announced() if companion else {}
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            command,
            cwd=work,
            env=environment,
            # nothing that it loads may ask whether to trust a checkpoint
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            for line in child.stdout or ():
                file.write(line)
                started = RUNNING_PASS.search(line)
                if started:
                    progress(f"Olive: {started.group(1).split(':')[0]}")
                elif line.startswith(PROGRESS):
                    progress(line.removeprefix(PROGRESS).strip())
            code = child.wait()
        except BaseException:
            kill_group(child)
            raise
    return _judge(code, work, log)


def _judge(code: int, work: Path, log: Path) -> Path:
    text = log.read_text(encoding="utf-8", errors="replace")
    result = work / "result.json"
    if code != 0 or not result.exists():
        if "No space left on device" in text:
            raise full_disk(work)
        told, hint = _last_error(text)
        raise ExportError(f"Olive failed (exit {code}): {told}", where=str(log), hint=hint or "read that log")
    folder = Path(work, json.loads(result.read_text(encoding="utf-8"))["model_path"])
    folder = folder if folder.is_dir() else folder.parent
    missing = [name for name in REQUIRED if not (folder / name).exists()] or _missing_model(folder)
    if missing:
        raise ExportError(f"Olive's output lacks {', '.join(missing)}", where=str(log), hint="read that log")
    return folder


def _missing_model(folder: Path) -> list[str]:
    """The model that ``genai_config.json`` names, when it is not there."""
    name = GenaiConfig.read(folder, ExportError, hint=None).graph_file
    return [] if (folder / name).exists() else [name]


def _last_error(text: str) -> tuple[str, str | None]:
    """The last error that a log tells of, and what to do about it where that is one of ours."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    places = [number for number, line in enumerate(lines) if re.match(r"^[\w.]*(Error|Exception|Fault)\b", line)]
    last = places[-1] if places else len(lines) - 1
    told = lines[last] if lines else "no message"
    # an error of ours is followed by lines of where and next
    hints = [line.removeprefix(HINT).strip() for line in lines[last + 1 : last + 3] if line.startswith(HINT)]
    ours = told.startswith("qwen_onnx.errors.")
    return (told.partition(": ")[2] if ours else told)[:500], hints[0][:500] if ours and hints else None


def collect(model: Path, artifact: Path) -> None:
    """Move the files of a genai model into the artifact; Olive's own bookkeeping stays behind."""
    artifact.mkdir(exist_ok=True)
    for path in sorted(model.iterdir()):
        if path.is_file() and path.name not in BOOKKEEPING:
            shutil.move(path, artifact / path.name)


def reference_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same run, but one fp32 export: what graph and tokenizer do without quantisation.

    Raises:
        ExportError: no step has such a form.
    """
    steps = {name: (step["type"], options_of(step).reference()) for name, step in config["passes"].items()}
    kept = {name: (kind, options) for name, (kind, options) in steps.items() if options is not None}
    passes = {name: {"type": kind, **options.model_dump(exclude_unset=True)} for name, (kind, options) in kept.items()}
    if not passes:
        hint = "give one of its passes a `reference`, or build with --no-verify"
        raise ExportError("no step of the plan has a form without quantisation to compare with", hint=hint)
    return {**config, "passes": passes}
