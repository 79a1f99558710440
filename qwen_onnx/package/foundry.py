"""What Foundry Local reads of a package: its id, its configuration, its metadata."""

from __future__ import annotations

from pathlib import Path

from qwen_onnx.package.records import PackageRecord
from qwen_onnx.plan import Plan

# id suffixes of Foundry Local: execution provider and device
SUFFIXES = {"cpu": "generic-cpu"}


def package_name(plan: Plan, name: str | None) -> str:
    """Foundry's name of a variant: what it is, and the suffix that tells where it runs."""
    return f"{name or f'{plan.model}-{plan.precision}'}-{SUFFIXES[plan.target]}"


def write_foundry(folder: Path, record: PackageRecord) -> None:
    """Write what Foundry Local needs beside the model's files."""
