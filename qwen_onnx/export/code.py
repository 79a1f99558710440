"""The code that carries out a plan, for the key of what it makes."""

from __future__ import annotations

from pathlib import Path

from qwen_onnx.artifact.code import code_digest
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.catalog.registry import passes
from qwen_onnx.export.readback.common import reader_of
from qwen_onnx.files import PACKAGE
from qwen_onnx.sources.fetch import importers

# whatever the plan: what runs Olive, collects its files and reads them back
ALWAYS = ("qwen_onnx.export.olive", "qwen_onnx.export.readback.common")


def modules_of(plan: Plan, source: Path | None) -> tuple[str, ...]:
    """The modules that a build of ``plan`` starts from: its passes, its reader, and what converts its weights.

    Args:
        source: local weights instead of the recipe's.
    """
    own = (passes()[step["type"]].module() for step in plan.olive["passes"].values())
    return (*own, *ALWAYS, reader_of(plan.readback), *importers(plan, source))


def exporter_digest(plan: Plan, source: Path | None, package: Path = PACKAGE) -> str:
    """Digest of the code that ``modules_of`` reaches: an edit of it may make another artifact, of no other code."""
    return code_digest(modules_of(plan, source), package)
