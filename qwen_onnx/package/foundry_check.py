"""A package in Foundry Local itself: in a process of its environment, without a network, with folders of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qwen_onnx.artifact.checksums import check_sums
from qwen_onnx.catalog.load import Catalog
from qwen_onnx.errors import PackageError
from qwen_onnx.package.contents import Contents
from qwen_onnx.package.pictures import BLIND, CONVERSATION, asked_about
from qwen_onnx.package.records import Package
from qwen_onnx.package.sdk.job import Job
from qwen_onnx.package.verify import verify_package
from qwen_onnx.processes.children import last_words
from qwen_onnx.processes.environments import Interpreter, interpreter_of
from qwen_onnx.processes.progress import progress
from qwen_onnx.runtime.processing.template import ChatTemplate
from qwen_onnx.runtime.processing.tokenizer import TextTokenizer
from qwen_onnx.sources.chat import CheckpointTemplate

# environment and backend of each profile
STACKS = {"sdk2": ("foundry", "sdk2"), "cli1": ("foundry-cli1", "cli1")}
# seconds that a child gets to tidy up once it has been told to end
GRACE = 10
PROMPTS: dict[str, list[dict[str, str]]] = {
    "user": [{"role": "user", "content": "What is the capital of France?"}],
    "system": [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "What is the capital of Peru?"},
    ],
    "turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Write a line about rain"},
        {"role": "assistant", "content": "Grey drops on the roof."},
        {"role": "user", "content": "Another one, please"},
    ],
    "unicode": [{"role": "user", "content": "naïve café Straße 你好，世界 日本語 한국어 مرحبا 👍🏽"}],
    "special tokens": [{"role": "user", "content": "What do <|im_start|>, <|im_end|> and <think> mean?"}],
    "code": [{"role": "user", "content": "def f(x):\n\treturn {k: v**2 for k, v in x.items()}  # ok\n\n\n"}],
    "markup": [{"role": "user", "content": "{{ 7 * 7 }} {% raw %} <b>&amp;</b> \\u00e9 'quotes' \"double\""}],
}


@dataclass(frozen=True)
class Step:
    """One thing that was done with the package.

    Attributes:
        found: what came of it, or what went wrong.
        seconds: that it took; None when it failed.
        limit: Foundry Local itself stops here; ``found`` says where.
    """

    step: str
    ok: bool
    found: str
    seconds: float | None = None
    limit: bool = False


@dataclass(frozen=True)
class Outcome:
    """All steps up to the first that failed."""

    package: Package
    steps: tuple[Step, ...]

    @property
    def passed(self) -> bool:
        """Whether none failed."""
        return all(step.ok for step in self.steps)


def check_in_foundry(folder: Path, catalog: Catalog, cache: Path, *, seconds: float = 600.0) -> Outcome:
    """Verify the package and do with it what programs do.

    Args:
        cache: where the environment is, or is made.
        seconds: after which the child is ended and the step that it was at has failed.

    Raises:
        PackageError: the package is not what it says; then nothing runs.
        EnvironmentFault: the environment cannot be made.
    """
    package = verify_package(folder)
    environment, backend = STACKS[package.record.profile]
    interpreter = interpreter_of(catalog.environment(environment), cache)
    contents = Contents(folder)
    prompts = [
        {"name": name, "messages": messages, "tokens": tokens}
        for (name, messages), tokens in zip(PROMPTS.items(), expected_counts(folder, PROMPTS.values()), strict=True)
    ]
    seeing = asked_about(contents, *expected_counts(folder, (CONVERSATION, BLIND))) if contents.sees else {}
    progress(f"{package.record.id} in the environment {environment}")
    job = Job(backend, str(folder.resolve()), package.record.id, contents.strings, contents.ints, prompts, seeing)
    return Outcome(package, (*run_steps(job, interpreter, seconds), _assets_kept(folder)))


def expected_counts(folder: Path, conversations: Any) -> list[int]:
    """Tokens of each conversation by the model's own template and tokenizer: transformers', or else ours.

    Special tokens in messages count as one token, as Hugging Face and Foundry Local have it; our own service encodes
    them as text.
    """
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        template, tokenizer = ChatTemplate(folder), TextTokenizer(folder)
        texts = [template.render(messages) for messages in conversations]
        return [len(tokenizer.encode(text, allow_special=True, add_special_tokens=False)) for text in texts]
    reference = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    # a package may be a stranger's: its template runs in a process of its own
    checkpoint_template = CheckpointTemplate(reference)
    texts = [checkpoint_template.render(messages, prompt=True) for messages in conversations]
    return [len(reference.encode(text, add_special_tokens=False)) for text in texts]


def run_steps(job: Job, interpreter: Interpreter, seconds: float) -> Iterator[Step]:
    """The child's steps as they come; one that fails is the last. Ends the child in any case, and its folder."""
    with tempfile.TemporaryFile() as log, _child(interpreter, log, seconds) as child:
        last = "start"
        failed = False
        try:
            child.process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            child.process.stdin.flush()
        except BrokenPipeError:
            # it died at once: its exit code and its last words tell more
            progress("the process ended before it read its job")
        for line in child.process.stdout:
            told = json.loads(line)
            if "state" in told:
                child.state = told["state"]
                continue
            step = Step(**told)
            last, failed = step.step, failed or not step.ok
            progress(f"{step.step}: {step.found}" if step.found else step.step)
            yield step
        code = child.process.wait()
        if child.expired.is_set():
            yield Step(f"after {last}", False, f"not finished within {seconds:g} s")
        elif code != 0 and not failed:
            yield Step(f"after {last}", False, f"the process died (exit {code}){last_words(log)}")


@dataclass
class _Child:
    """The process, the folder that it made, and whether its time is over."""

    process: Any
    expired: threading.Event
    state: str = ""


@contextmanager
def _child(interpreter: Interpreter, log: Any, seconds: float) -> Iterator[_Child]:
    """It tidies up and ends when its input does; when it was killed instead, its folder is removed here."""
    command = [str(interpreter.python), "-m", "qwen_onnx.package.sdk.job"]
    process = subprocess.Popen(
        command, env=interpreter.variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
    )
    child = _Child(process, threading.Event())

    def expire() -> None:
        child.expired.set()
        _end(process)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield child
    finally:
        timer.cancel()
        _end(process)
        assert process.stdout is not None
        process.stdout.close()
        if child.state:
            shutil.rmtree(child.state, ignore_errors=True)


def _end(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    try:
        child.stdin.close()
    except BrokenPipeError:
        # it is gone already
        return
    try:
        child.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _assets_kept(folder: Path) -> Step:
    try:
        return Step("files of the package", True, f"{len(check_sums(folder))} unchanged")
    except PackageError as error:
        return Step("files of the package", False, error.what)


def report(outcome: Outcome, out: Console) -> None:
    """A table and one last line of JSON.

    Raises:
        PackageError: a step failed.
    """
    table = Table("step", "", "found", "seconds")
    for step in outcome.steps:
        mark = "[red]fault[/]" if not step.ok else "[yellow]limit[/]" if step.limit else "[green]ok[/]"
        table.add_row(step.step, mark, escape(step.found), "" if step.seconds is None else f"{step.seconds:.2f}")
    out.print(table)
    record = outcome.package.record
    limits = {step.step: step.found for step in outcome.steps if step.limit}
    summary = {
        "id": record.id,
        "profile": record.profile,
        "passed": outcome.passed,
        "steps": {step.step: step.ok for step in outcome.steps},
        **({"limits": limits} if limits else {}),
    }
    out.file.write(json.dumps(summary) + "\n")
    for step in outcome.steps:
        if not step.ok:
            raise PackageError(
                f"Foundry Local does not take the package: {step.step}: {step.found}",
                where=str(outcome.package.path),
                hint="docs/foundry.md says what each step needs; then make it again: qwen-onnx package ARTIFACT",
            )
