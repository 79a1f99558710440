"""Packages in Foundry Local itself. The first test that needs an environment makes it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from qwen_onnx.artifact.checksums import write_sums
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.errors import SourceError
from qwen_onnx.package.foundry_check import PROMPTS, expected_counts, run_steps
from qwen_onnx.package.sdk.job import Job
from qwen_onnx.processes.environments import Interpreter, interpreter_of
from qwen_onnx.sources.fetch import cache_root
from tests.conftest import REPOSITORY, as_in_a_terminal, run_cli
from tests.package.conftest import edit_json, packaged

STEPS = 17
ENDS_WITHIN = 30


def summary(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob("qwen-onnx-foundry-*"))


def children_of(place: Path) -> list[psutil.Process]:
    """Processes of the check that keep their state below ``place``."""
    found = []
    for process in psutil.process_iter():
        try:
            if "qwen_onnx.package.sdk.job" in process.cmdline() and process.environ().get("TMPDIR", "").startswith(
                str(place)
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_until(condition: Any) -> None:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < ENDS_WITHIN, "it did not come to pass"
        time.sleep(0.1)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files of the processes that the test starts go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.mark.slow
def test_a_folder_that_is_no_package_is_refused_before_anything_runs(tmp_path: Path, tiny_package: Path) -> None:
    assert run_cli("foundry-check", tmp_path / "none").returncode == 10
    altered = shutil.copytree(tiny_package, tmp_path / tiny_package.name)
    (altered / "model.onnx.data").write_bytes(b"")
    done = run_cli("foundry-check", altered)
    assert done.returncode == 10
    assert "model.onnx.data was altered" in done.stderr
    assert not done.stdout


def test_expected_counts_are_those_of_our_template_too(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_transformers = expected_counts(tiny_package, PROMPTS.values())
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert expected_counts(tiny_package, PROMPTS.values()) == by_transformers
    assert len(set(by_transformers)) > 3


def test_a_bomb_in_the_template_of_a_package_is_stopped(tiny_package: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_package / name, tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text("{{ 'a' * 1500000000 }}")
    with pytest.raises(SourceError, match="stopped: it needs more than 512 MiB"):
        expected_counts(tmp_path, PROMPTS.values())


# what the child needs of this package is in it; a backend of the tests stands for Foundry's
BACKEND = """
import os, time
PHASE_NAMES = ("one", "two")

def one(job, step):
    with step("first") as notes:
        notes.append("done")

def two(job, step):
    with step("second"):
        if job.model_id == "raise":
            raise RuntimeError("no such thing")
        if job.model_id == "die":
            os._exit(7)
        if job.model_id == "hang":
            open(job.state + "/hanging", "w").close()
            time.sleep(3600)

PHASES = {"one": one, "two": two}
"""


@pytest.fixture
def interpreter(tmp_path: Path) -> Interpreter:
    """This Python, with the real child process and the tests' backend."""
    runners = tmp_path / "package/qwen_onnx/package/sdk"
    runners.mkdir(parents=True)
    shutil.copy(REPOSITORY / "qwen_onnx/package/sdk/job.py", runners)
    (runners / "testing.py").write_text(BACKEND)
    return Interpreter(Path(sys.executable), tmp_path / "package")


def run_job(model_id: str, interpreter: Interpreter, seconds: float = 60) -> list[tuple[str, bool, str]]:
    job = Job("testing", "folder", model_id, {}, {}, [])
    return [(step.step, step.ok, step.found) for step in run_steps(job, interpreter, seconds)]


def test_steps_of_all_phases_are_told(interpreter: Interpreter, place: Path) -> None:
    steps = run_job("well", interpreter)
    assert [step[:2] for step in steps] == [("offline", True), ("first", True), ("second", True)]
    assert not leftovers(place)


@pytest.mark.parametrize(
    ("model_id", "step", "words"),
    [("raise", "second", "RuntimeError: no such thing"), ("die", "process of two", r"died \(exit 7\)")],
)
def test_a_step_that_fails_is_the_last(
    model_id: str, step: str, words: str, interpreter: Interpreter, place: Path
) -> None:
    steps = run_job(model_id, interpreter)
    assert [each[:2] for each in steps] == [("offline", True), ("first", True), (step, False)]
    assert re.search(words, steps[-1][2])
    assert not leftovers(place)


@pytest.mark.slow
def test_a_child_that_hangs_is_ended_with_all_that_it_began(interpreter: Interpreter, place: Path) -> None:
    steps = run_job("hang", interpreter, seconds=5)
    assert not steps[-1][1]
    assert "not finished within 5 s" in steps[-1][2]
    assert not children_of(place)
    assert not leftovers(place)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_check_leaves_nothing(number: signal.Signals, interpreter: Interpreter, place: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from qwen_onnx.processes.environments import Interpreter\n"
        "from qwen_onnx.package.foundry_check import run_steps; from qwen_onnx.package.sdk.job import Job\n"
        "job = Job('testing', 'folder', 'hang', {}, {}, [])\n"
        "list(run_steps(job, Interpreter(Path(sys.executable), Path(sys.argv[1])), 600))"
    )
    command = [sys.executable, "-c", code, str(interpreter.package)]
    parent = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=as_in_a_terminal,  # noqa: PLW1509 - the tests have one thread here
    )
    try:
        wait_until(lambda: list(place.glob("*/hanging")))
        assert children_of(place)
        parent.send_signal(number)
        parent.wait(timeout=ENDS_WITHIN)
    finally:
        parent.kill()
    wait_until(lambda: not children_of(place) and not leftovers(place))


@pytest.mark.slow
def test_the_tiny_package_passes_every_step(tiny_package: Path, place: Path) -> None:
    done = run_cli("foundry-check", tiny_package)
    assert done.returncode == 0, done.stderr
    said = summary(done)
    assert said["passed"]
    assert len(said["steps"]) == STEPS
    assert all(said["steps"].values())
    assert not leftovers(place)


@pytest.mark.release
@pytest.mark.parametrize("profile", ["sdk2", "cli1"])
def test_the_starters_package_passes(profile: str, artifact_dir: Path, tmp_path: Path, place: Path) -> None:
    made = run_cli("package", artifact_dir, "--output", tmp_path, "--profile", profile)
    assert made.returncode == 0, made.stderr
    done = run_cli("foundry-check", summary(made)["path"])
    assert done.returncode == 0, done.stderr
    said = summary(done)
    assert said["profile"] == profile
    assert said["passed"]
    assert not leftovers(place)


def without_task(folder: Path) -> None:
    edit_json(folder / "foundry_local.json", lambda data: data["string_properties"].pop("task"))


def other_template(folder: Path) -> None:
    """Foundry reads this one: it beats the file beside it, which we count by."""
    edit_json(folder / "tokenizer_config.json", lambda data: data.update(chat_template="{{ messages[0]['content'] }}"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "step"),
    [
        (lambda folder: edit_json(folder / "genai_config.json", lambda d: d["model"].update(type="abacus")), "load"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"no graph"), "load"),
        (
            lambda folder: edit_json(folder / "foundry_local.json", lambda d: d["string_properties"].pop("task")),
            "register",
        ),
        (other_template, "count tokens, session"),
    ],
)
def test_a_broken_package_fails_at_its_step(spoil: Any, step: str, tiny_package: Path, tmp_path: Path) -> None:
    """Its checksums are right: only Foundry Local can tell."""
    broken = Path(shutil.copytree(tiny_package, tmp_path / tiny_package.name))
    spoil(broken)
    write_sums(broken)
    interpreter = environment("foundry")
    sidecar = json.loads((broken / "foundry_local.json").read_text())
    counts = expected_counts(tiny_package, PROMPTS.values())
    prompts = [
        {"name": name, "messages": messages, "tokens": tokens}
        for (name, messages), tokens in zip(PROMPTS.items(), counts, strict=True)
    ]
    properties = sidecar["string_properties"], sidecar["int_properties"]
    job = Job("sdk2", str(broken), sidecar["model_id"], *properties, prompts)
    *before, last = run_steps(job, interpreter, 120)
    assert all(each.ok for each in before)
    assert (last.step, last.ok) == (step, False), last


@pytest.mark.release
def test_a_package_for_another_device_is_well_made_and_fails_where_there_is_none(
    tiny_checkpoint: Path, tmp_path: Path, place: Path
) -> None:
    """The environment's Foundry Local has no execution provider for CUDA."""
    artifact = tmp_path / "artifact"
    options = ("--target", "cuda", "--source", tiny_checkpoint, "--output", artifact, "--no-verify")
    built = run_cli("optimize", "starter", *options)
    assert built.returncode == 0, built.stderr
    package = packaged(artifact, tmp_path / "packages")
    assert package.name == "checkpoint-int4-cuda-gpu-1"
    done = run_cli("foundry-check", package)
    assert done.returncode == 10
    assert "load: " in done.stderr
    assert "CUDAExecutionProvider" in done.stderr
    assert all(word in done.stderr for word in ("where:", "next:"))
    said = summary(done)
    assert said["passed"] is False
    assert said["steps"]["list"] is True
    assert said["steps"]["load"] is False
    assert not leftovers(place)


@pytest.mark.slow
def test_the_real_check_leaves_nothing_when_killed(tiny_package: Path, place: Path) -> None:
    environment("foundry")
    command = [sys.executable, "-m", "qwen_onnx.cli.app", "foundry-check", str(tiny_package)]
    parent = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: children_of(place))
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not children_of(place) and not leftovers(place))


@pytest.mark.slow
def test_time_is_limited(artifact_dir: Path, tmp_path: Path, place: Path) -> None:
    package = packaged(artifact_dir, tmp_path)
    environment("foundry")
    done = run_cli("foundry-check", package, "--seconds", "1")
    assert done.returncode == 10
    assert "not finished within 1 s" in done.stderr
    assert summary(done)["passed"] is False
    assert not leftovers(place)


def environment(name: str) -> Interpreter:
    """The environment, made when it is not there."""
    return interpreter_of(load_catalog(REPOSITORY).environment(name), cache_root(REPOSITORY))
