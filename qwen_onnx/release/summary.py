"""A release told to people (a table), to CI systems (JUnit) and to programs (one line of JSON)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from qwen_onnx.records import Verdict
from qwen_onnx.release.records import JobResult, Release

if TYPE_CHECKING:
    from rich.console import Console

# what XML 1.0 cannot hold, such as a terminal's escape
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(release: Release) -> str:
    """One suite per job; its cases are the steps, each gate and each package."""
    suites = [_suite(job) for job in release.jobs]
    cases = [case for suite in suites for case in suite]
    root = ElementTree.Element("testsuites", _counts("qwen-onnx release", cases))
    root.set("time", f"{sum(job.seconds for job in release.jobs if not job.cached):.3f}")
    root.extend(suites)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _counts(name: str, cases: list[ElementTree.Element]) -> dict[str, str]:
    failures = sum(case.find("failure") is not None for case in cases)
    return {"name": name, "tests": str(len(cases)), "failures": str(failures), "errors": "0", "skipped": "0"}


def _suite(job: JobResult) -> ElementTree.Element:
    steps = f"{job.stage}: {job.fault}" if job.stage not in (None, "gates") else None
    cases = [_case(job, "steps", steps, 0 if job.cached else job.seconds)]
    for gate in job.gates:
        fault = None if gate.verdict is Verdict.PASS else f"{gate.verdict}: {gate.told}"
        cases.append(_case(job, f"gate {gate.name}", fault))
    cases += [_case(job, f"package {package.id} {package.profile}", None) for package in job.packages]
    suite = ElementTree.Element("testsuite", _counts(job.name, cases))
    suite.extend(cases)
    return suite


def _case(job: JobResult, name: str, fault: str | None, seconds: float = 0) -> ElementTree.Element:
    case = ElementTree.Element("testcase", {"classname": job.name, "name": name, "time": f"{seconds:.3f}"})
    if fault is not None:
        text = NOT_XML.sub("", fault)
        failure = ElementTree.SubElement(case, "failure", {"message": text.splitlines()[0]})
        failure.text = text
    return case


def json_line(release: Release, place: Path, digest: str) -> str:
    """Whether it passed, what did not, where it is, and the SHA-256 of its ``SHA256SUMS``."""
    failed = [job.name for job in release.jobs if not job.passed]
    line = {
        "passed": release.passed,
        "complete": release.complete,
        "jobs": len(release.jobs),
        "cached": sum(job.cached for job in release.jobs),
        "failed": failed,
        "packages": [package.id for job in release.jobs for package in job.packages],
        "path": str(place),
        "digest": digest,
    }
    return json.dumps(line)


def print_summary(release: Release, console: Console) -> None:
    """The table, and below it the packages with their digests and what each failed job said."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"release: {'PASS' if release.passed else 'FAIL'}")
    right = ("KLD", "MB", "seconds", "peak GB")
    for column in ("job", "verdict", "gates", *right, "cached"):
        table.add_column(column, justify="right" if column in right else "left", no_wrap=column == "job")
    for job in release.jobs:
        table.add_row(*(escape(cell) for cell in _cells(job)), style=None if job.passed else "red")
    console.print(table)
    lines = [f"{package.digest}  {package.folder}" for job in release.jobs for package in job.packages]
    lines += [f"{job.name}: {job.stage}: {job.fault}" for job in release.jobs if not job.passed]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _cells(job: JobResult) -> tuple[str, ...]:
    passed = sum(gate.verdict is Verdict.PASS for gate in job.gates)
    kld = job.figures.get("kld_mean")
    return (
        job.name,
        job.verdict or "–",
        f"{passed} of {len(job.gates)}" if job.gates else "–",
        f"{kld:.3g}" if kld is not None else "–",
        f"{job.artifact_bytes / 1e6:.1f}" if job.artifact_bytes else "–",
        f"{job.seconds:.1f}",
        f"{job.peak_bytes / 1e9:.2f}",
        "yes" if job.cached else "no",
    )
