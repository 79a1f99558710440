"""``qwen-onnx verify-package``: is a package what it says it is?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def verify_package(package: Annotated[Path, typer.Argument(help="package folder")]) -> None:
    """Check every byte of a package, offline."""
    from qwen_onnx.package.verify import package_digest
    from qwen_onnx.package.verify import verify_package as check

    made = check(package.resolve())
    print(json.dumps({"id": made.record.id, "verdict": made.record.verdict, "digest": package_digest(made.path)}))
