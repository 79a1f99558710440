"""Releases by the command line: what is published, taken again, refused, and what survives a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest

from qwen_onnx.artifact.checksums import check_sums, package_digest
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.package.verify import verify_package
from qwen_onnx.release.matrix import load_matrix
from qwen_onnx.release.records import Release
from tests.conftest import REPOSITORY, as_in_a_terminal, run_cli
from tests.release.conftest import Run, last_line, release_command, write_matrix
from tests.release.test_guard import gone

INT4, FP32 = {"precisions": ["int4"]}, {"precisions": ["fp32"]}


def read_release(folder: Path) -> Release:
    return Release.model_validate_json((folder / "release.json").read_bytes())


def suites(folder: Path) -> dict[str, dict[str, str | None]]:
    """Of ``junit.xml``: job to case to the failure's message."""
    root = ElementTree.parse(folder / "junit.xml").getroot()
    found: dict[str, dict[str, str | None]] = {}
    for suite in root:
        failures = {case.get("name", ""): case.find("failure") for case in suite}
        assert suite.get("tests") == str(len(suite))
        assert suite.get("failures") == str(sum(failure is not None for failure in failures.values()))
        found[suite.get("name", "")] = {
            name: None if failure is None else failure.get("message") for name, failure in failures.items()
        }
    assert root.get("tests") == str(sum(len(cases) for cases in found.values()))
    return found


@pytest.mark.slow
def test_a_release_holds_packages_results_and_sums_and_is_taken_again(run: Run, place: Path) -> None:
    done = run(INT4)
    assert done.returncode == 0, done.stderr
    said, folder = last_line(done), place / "release"
    assert {key: said[key] for key in ("passed", "complete", "jobs", "cached", "failed")} == {
        "passed": True,
        "complete": True,
        "jobs": 1,
        "cached": 0,
        "failed": [],
    }
    assert said["path"] == str(folder)
    assert said["digest"] == package_digest(folder)
    listed = check_sums(folder)
    assert {"release.json", "junit.xml", "logs/starter--cpu-int4.log"} <= listed.keys()
    [job] = read_release(folder).jobs
    assert (job.passed, job.verdict, job.cached) == (True, "UNVERIFIED", False)
    [package] = job.packages
    assert package.id == said["packages"][0]
    assert package.id.endswith(":2")
    assert verify_package(folder / package.folder).record.unverified
    assert package.digest == package_digest(folder / package.folder)
    assert package.digest in done.stdout
    assert suites(folder) == {
        "starter/cpu-int4": {"steps": None, "gate verdict": None, f"package {package.id} sdk2": None}
    }
    assert {path.name for path in place.iterdir() if not path.name.startswith(".")} == {
        "release",
        "starter",
        "cache",
        "matrix.yaml",
    }

    again = run(INT4)
    assert again.returncode == 0, again.stderr
    assert last_line(again)["cached"] == 1
    assert "optimize" not in again.stderr
    [taken] = read_release(folder).jobs
    assert taken == job.model_copy(update={"cached": True})


@pytest.mark.slow
def test_a_package_that_was_altered_is_not_taken_again(run: Run, place: Path) -> None:
    assert run(INT4).returncode == 0
    [kept] = (place / "cache/release").rglob("packages/*/*/genai_config.json")
    kept.write_text("{}")
    done = run(INT4)
    assert done.returncode == 0
    assert last_line(done)["cached"] == 0
    check_sums(place / "release")


@pytest.mark.release
def test_other_gates_are_another_job_and_fresh_takes_nothing(run: Run, place: Path) -> None:
    assert run(INT4).returncode == 0
    built = (place / "starter/cpu-int4/manifest.json").read_bytes()
    done = run(INT4 | {"gates": {"unverified": "allow", "max_bytes": 10**8}})
    assert last_line(done)["cached"] == 0
    assert (place / "starter/cpu-int4/manifest.json").read_bytes() == built
    done = run(INT4, more=("--fresh",))
    assert done.returncode == 0, done.stderr
    assert last_line(done)["cached"] == 0
    assert (place / "starter/cpu-int4/manifest.json").read_bytes() != built


@pytest.mark.slow
def test_jobs_that_fail_stop_nobody_and_replace_nothing(run: Run, place: Path) -> None:
    assert run(INT4).returncode == 0
    good = package_digest(place / "release")
    done = run(
        FP32 | {"timeout": "0.5s"},
        {"precisions": ["int8"], "memory": "200MB"},
        INT4 | {"gates": {"unverified": "allow"}},
        {"targets": ["cuda"], "gates": {"unverified": "allow", "max_bytes": 1000}},
        more=("--jobs", "2"),
    )
    assert done.returncode == 12, done.stderr
    assert "3 of 4 jobs failed" in done.stderr
    assert package_digest(place / "release") == good
    rejected = place / "release.rejected"
    check_sums(rejected)
    late, large, fine, heavy = read_release(rejected).jobs
    assert late.stage == large.stage == "optimize"
    assert late.fault
    assert "0.5 s are allowed: it was ended" in late.fault
    assert large.fault
    assert "0.200 GB are allowed: it was ended" in large.fault
    assert large.peak_bytes > 200_000_000
    assert fine.passed
    assert heavy.stage == "gates"
    assert heavy.exit_code == 7
    cases = suites(rejected)
    assert cases["starter/cpu-fp32"]["steps"]
    assert cases["starter/cuda-int4"]["steps"] is None
    assert cases["starter/cuda-int4"]["gate max_bytes"]
    assert all(failure is None for failure in cases["starter/cpu-int4"].values())
    assert (rejected / fine.packages[0].folder / "SHA256SUMS").exists()
    assert (rejected / "logs/starter--cpu-int8.log").exists()


@pytest.mark.slow
def test_unverified_must_be_allowed_by_name(run: Run, place: Path) -> None:
    """Without ``unverified: allow`` the tiny checkpoint is measured, and random weights fail or cannot be measured."""
    done = run(INT4 | {"gates": {}, "memory": "1MB"})
    assert done.returncode == 12
    assert not (place / "release").exists()
    [job] = read_release(place / "release.rejected").jobs
    assert not job.passed
    assert "--no-verify" not in (place / "release.rejected/logs/starter--cpu-int4.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--only", "starter/cuda-*"), 2, ["matches no job", "starter/cpu-int4"]),
        (("--source", "starter"), 2, ["give MODEL=PATH"]),
        (("--source", "starter=/nonexistent/weights"), 2, ["there is no /nonexistent/weights"]),
        (("--source", "qwen3-0.6b=/"), 2, ["no job builds qwen3-0.6b"]),
        (("--jobs", "0"), 2, ["--jobs"]),
        (("--on", "ray", "--address", "ray://127.0.0.1:10001"), 2, ["a Ray client has no machine"]),
        (("--on", "moon"), 2, ["--on"]),
    ],
)
def test_bad_options_are_told_and_nothing_runs(
    run: Run, place: Path, more: tuple[str, ...], code: int, words: list[str]
) -> None:
    done = run(INT4, more=more)
    assert done.returncode == code, done.stderr
    said = " ".join(done.stderr.split())
    assert all(word in said for word in words), said
    assert "Traceback" not in done.stderr
    assert not (place / "release").exists()


@pytest.mark.slow
def test_a_bound_above_the_machines_memory_bounds_nothing(run: Run) -> None:
    done = run(INT4 | {"memory": "100000GB"})
    assert done.returncode == 3
    assert "may take 100000 GB, this machine has" in done.stderr


@pytest.mark.slow
def test_a_part_does_not_replace_the_whole(run: Run, place: Path) -> None:
    assert run(INT4).returncode == 0
    done = run(INT4, FP32, more=("--only", "*-int4"))
    assert done.returncode == 12
    assert "--only would replace it by a part" in done.stderr
    (place / "release/release.json").unlink()
    done = run(INT4)
    assert done.returncode == 12
    assert "the folder there is not a release" in done.stderr


def start(place: Path, checkpoint: Path, *entries: dict[str, Any]) -> subprocess.Popen[str]:
    arguments = release_command(place, checkpoint, write_matrix(place, *entries))
    command = [sys.executable, "-m", "qwen_onnx.cli.app", *arguments]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=as_in_a_terminal,  # noqa: PLW1509 - the tests have one thread here
    )


def kill_with_witness(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the release; fails unless all that it started ends."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert all(gone(child.pid) for child in family)


@pytest.mark.release
def test_a_release_that_was_killed_goes_on_where_it_was(run: Run, place: Path, tiny_checkpoint: Path) -> None:
    process = start(place, tiny_checkpoint, INT4, FP32)
    assert process.stderr
    while "starter/cpu-fp32: optimize" not in (line := process.stderr.readline()):
        assert line, "the release ended early"
    deadline = time.monotonic() + 30
    olive = "qwen_onnx.export.worker"
    while not any(olive in child.cmdline() for child in psutil.Process(process.pid).children(recursive=True)):
        assert time.monotonic() < deadline, "Olive did not start"
        time.sleep(0.02)
    kill_with_witness(process)
    assert not (place / "release").exists()
    assert not (place / "starter/cpu-fp32").exists()
    done = run(INT4, FP32)
    assert done.returncode == 0, done.stderr
    assert last_line(done)["cached"] == 1
    assert "starter/cpu-int4: finished already" in done.stderr
    assert "starter/cpu-int4: optimize" not in done.stderr
    check_sums(place / "release")
    assert not list(place.rglob(".*staging*"))
    assert not list(place.rglob(".unfinished*"))


@pytest.mark.release
def test_a_kill_at_any_moment_leaves_the_old_release_or_the_new(run: Run, place: Path, tiny_checkpoint: Path) -> None:
    for wait in (0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5):
        process = start(place, tiny_checkpoint, INT4)
        time.sleep(wait)
        if process.poll() is None:
            kill_with_witness(process)
        else:
            process.communicate()
        if (place / "release").exists():
            check_sums(place / "release")
    done = run(INT4)
    assert done.returncode == 0, done.stderr
    check_sums(place / "release")
    assert not list(place.rglob(".unfinished*"))


@pytest.mark.slow
def test_two_releases_of_one_place_do_not_mix(run: Run, place: Path, tiny_checkpoint: Path) -> None:
    process = start(place, tiny_checkpoint, INT4)
    assert process.stderr
    assert "optimize" in process.stderr.readline()
    done = run(INT4)
    assert done.returncode == 6
    assert "another process" in done.stderr
    process.communicate()
    assert process.returncode == 0


@pytest.mark.slow
def test_ctrl_c_ends_it_with_all_it_started(place: Path, tiny_checkpoint: Path) -> None:
    process = start(place, tiny_checkpoint, INT4)
    assert process.stderr
    assert "optimize" in process.stderr.readline()
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert all(gone(child.pid) for child in family)


@pytest.mark.slow
def test_the_starter_is_judged_by_its_report(place: Path, artifact_dir: Path) -> None:
    """Gates that its report keeps, and one that it cannot: read as measured, by their bounds."""
    report = json.loads((artifact_dir / "report.json").read_text())
    from qwen_onnx.artifact.manifest import read_manifest
    from qwen_onnx.release.gates import judge
    from qwen_onnx.release.matrix import Gates
    from qwen_onnx.verify.report import load_report

    measured = report["drift"]["kld_mean"]
    manifest, loaded = read_manifest(artifact_dir), load_report(artifact_dir)
    for limit, verdict in (
        (measured["upper"], "PASS"),
        (measured["value"], "INCONCLUSIVE"),
        (measured["lower"] * 0.999999, "FAIL"),
    ):
        own, gate = judge(Gates(kld_mean=limit), manifest, loaded)
        assert own.verdict == "PASS"
        assert (gate.measured, gate.lower, gate.upper) == (measured["value"], measured["lower"], measured["upper"])
        assert gate.verdict == verdict


def test_the_documented_matrix_is_one(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs/release.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "matrix.yaml").write_text(example)
    jobs = load_matrix(load_catalog(REPOSITORY), tmp_path / "matrix.yaml")
    assert [job.name for job in jobs] == ["starter/cpu-int4"]
    assert jobs[0].gates.limits == {"kld_mean": 0.15, "decode_speedup": 3.5}


def test_the_documented_options_exist() -> None:
    text = (REPOSITORY / "docs/release.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(--[a-z]+)", text)) - {"--head", "--check"}
    known = run_cli("release", "--help").stdout
    assert len(named) > 6
    assert {option for option in named if option not in known} == set()
