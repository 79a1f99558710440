"""``qwen-onnx package``: a verified artifact as a folder for Foundry Local."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from qwen_onnx.cli.options import ArtifactPath


def package(
    artifact: ArtifactPath,
    output: Annotated[Path | None, typer.Option(help="folder of packages; default artifacts/packages")] = None,
    profile: Annotated[
        Literal["sdk2", "cli1"], typer.Option(help="sdk2, or cli1 for the older drop-in folder")
    ] = "sdk2",
    name: Annotated[str | None, typer.Option(help="base of the id; default MODEL-PRECISION")] = None,
    version: Annotated[int, typer.Option(min=1, help="version in the id")] = 1,
    allow_unverified: Annotated[bool, typer.Option(help="package it without a PASS too; the package says so")] = False,
) -> None:
    """Make a Foundry Local package of an artifact; prints its folder and one line of JSON."""
    from qwen_onnx.artifact.checksums import package_digest
    from qwen_onnx.artifact.manifest import open_artifact
    from qwen_onnx.catalog.load import work_root
    from qwen_onnx.package.build import PackageJob, build_package

    folder = output or work_root() / "artifacts/packages"
    job = PackageJob(open_artifact(artifact.resolve()), folder.resolve(), profile, name, version, allow_unverified)
    made = build_package(job)
    print(made.path)
    print(
        json.dumps(
            {
                "id": made.record.id,
                "verdict": made.record.verdict,
                "path": str(made.path),
                "digest": package_digest(made.path),
            }
        )
    )
