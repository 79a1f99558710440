"""What this machine lacks for a recipe, each with the command that mends it."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from qwen_onnx.environments import is_ready
from qwen_onnx.estimate import estimate
from qwen_onnx.plan import Plan
from qwen_onnx.sources import cache_root, checkpoint_at_hand

EXTRAS = ("serve", "export", "dev")


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``remedy`` is empty when ``ok``."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def examine(plan: Plan, root: Path) -> list[Finding]:
    """Check Python, the extras' packages, memory and disk for ``plan``."""
    findings = [_python(), *(_extra(extra) for extra in EXTRAS)]
    memory = psutil.virtual_memory().available
    needs = estimate(plan, checkpoint_at_hand(plan, cache_root(root), None))
    needed = max(needs.memory, needs.verification)
    findings.append(_amount(f"memory for {plan.model}", memory, needed, "close programs, or build on another machine"))
    disk = shutil.disk_usage(root).free
    wanted = needs.disk + needs.download
    if plan.environment:
        ready, size = is_ready(plan.environment, cache_root(root)), plan.environment.bytes
        made = "there" if ready else f"made when it is first needed: {size / 1e9:.1f} GB from the package index"
        findings.append(Finding(f"environment {plan.environment.name}", True, made))
        wanted += 0 if ready else size
    findings.append(_amount(f"disk for {plan.model}", disk, wanted, "free space, or --output on another disk"))
    return findings


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info >= (3, 11)
    return Finding("Python", ok, version, "" if ok else "install Python 3.11 or newer")


def _amount(name: str, available: int, needed: int, remedy: str) -> Finding:
    ok = available >= needed
    found = f"{available / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed"
    return Finding(name, ok, found, "" if ok else remedy)


def _extra(extra: str) -> Finding:
    """Are the packages of an extra there, in versions that its requirements accept?"""
    from packaging.requirements import Requirement

    faults = []
    for line in metadata.requires("qwen-onnx") or []:
        requirement = Requirement(line)
        if not requirement.marker or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name == "qwen-onnx":
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            faults.append(f"{requirement.name} missing")
            continue
        if not requirement.specifier.contains(version.split("+")[0], prereleases=True):
            faults.append(f"{requirement.name} {version}, needs {requirement.specifier}")
    remedy = f"pip install -c constraints.txt 'qwen-onnx[{extra}]'" if faults else ""
    return Finding(f"extra {extra}", not faults, "; ".join(faults) or "complete", remedy)
