"""``qwen-onnx adapter``: adapters as files for the slots of an artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_onnx.cli.options import ARTIFACT, Depth, SourceOption, artifact_at, cache_here

if TYPE_CHECKING:
    from qwen_onnx.artifact.manifest import Artifact
    from qwen_onnx.sources.adapter import Adapter

adapter_app = typer.Typer(help="Adapters that `qwen-onnx serve --adapter` loads.", no_args_is_help=True)


@adapter_app.command("convert")
def convert(
    adapter: Annotated[Path, typer.Argument(help="folder of a LoRA adapter: of `qwen-onnx finetune`, or plain peft")],
    base: Annotated[Path, typer.Option(parser=artifact_at, metavar="ARTIFACT", help=ARTIFACT)],
    output: Annotated[Path, typer.Option(help="file to write; it must not be there")],
    genai: Annotated[
        Path | None, typer.Option(help="write an .onnx_adapter of onnxruntime-genai, too; it must not be there")
    ] = None,
) -> None:
    """Write an adapter as one file for the slots of an artifact; prints its record."""
    from qwen_onnx.sources.adapter import open_adapter
    from qwen_onnx.sources.slotted import convert_adapter

    made = convert_adapter(open_adapter(adapter), base.resolve(), output, genai)
    print(json.dumps({"file": str(output), "bytes": output.stat().st_size, **made.model_dump(mode="json")}))


@adapter_app.command("verify")
def verify(
    file: Annotated[Path, typer.Argument(help="file of `qwen-onnx adapter convert`")],
    base: Annotated[Path, typer.Option(parser=artifact_at, metavar="ARTIFACT", help=ARTIFACT)],
    adapter: Annotated[Path, typer.Option(help="folder of the adapter that the file was made of")],
    source: SourceOption = None,
    depth: Depth = "quick",
) -> None:
    """Compare the artifact with the adapter to PyTorch with the adapter merged; the file's record gets the verdict.

    PyTorch has the weights that the adapter was trained on: the checkpoint's, or the artifact's (`finetune --against`).
    The limits are the artifact's own. Exits non-zero unless the verdict is PASS, and no server loads the file then.
    """
    from qwen_onnx.artifact.manifest import open_runnable
    from qwen_onnx.errors import VerdictError
    from qwen_onnx.verify.adapters import verify_adapter
    from qwen_onnx.verify.records import VerifyOptions

    opened = open_runnable(base.resolve())
    checkpoint, learnt = _trained(opened, file, adapter, source)
    record = verify_adapter(file, opened, checkpoint, VerifyOptions.of(depth), cache_here(), learnt)
    print(json.dumps({"file": str(file), **record.model_dump(mode="json")}))
    if record.drift is None or record.drift.verdict != "PASS":
        verdict = record.drift.verdict if record.drift else "not measured"
        raise VerdictError(f"the adapter's drift: {verdict}", where=str(file), hint="an artifact of higher precision")


@adapter_app.command("package")
def package(
    file: Annotated[Path, typer.Argument(help="file of `qwen-onnx adapter convert` that `adapter verify` passed")],
    output: Annotated[Path | None, typer.Option(help="folder of packages; default artifacts/packages")] = None,
    version: Annotated[int, typer.Option(min=1, help="version in the id")] = 1,
) -> None:
    """Make a package of an adapter for `qwen-onnx publish` and `pull`; prints its folder and one line of JSON."""
    from qwen_onnx.artifact.checksums import package_digest
    from qwen_onnx.catalog.load import work_root
    from qwen_onnx.package.adapters import package_adapter

    made = package_adapter(file, (output or work_root() / "artifacts/packages").resolve(), version)
    print(made.path)
    told = {"id": made.record.id, "verdict": made.record.verdict, "path": str(made.path)}
    print(json.dumps({**told, "digest": package_digest(made.path)}))


def _trained(opened: Artifact, file: Path, adapter: Path, source: Path | None) -> tuple[Path, Adapter | None]:
    """The checkpoint of an artifact with an adapter merged, which is the one that ``file`` was made of.

    One that was trained against the artifact is not merged: it comes beside the checkpoint.

    Raises:
        ArtifactError: it is not; or the checkpoint is another one.
    """
    from qwen_onnx.artifact.adapter_file import read_adapter_file
    from qwen_onnx.errors import ArtifactError
    from qwen_onnx.processes.progress import progress
    from qwen_onnx.sources.adapter import open_adapter
    from qwen_onnx.sources.fetch import fetch, weights_digest
    from qwen_onnx.sources.slotted import host_of

    manifest = opened.manifest
    host = host_of(opened.path, manifest)
    told, read = open_adapter(adapter), read_adapter_file(file, host)
    if told.digest != read.record.adapter:
        raise ArtifactError(
            f"{file.name} was made of another adapter than {adapter}", where=str(file), hint="give that with --adapter"
        )
    checkpoint = fetch(manifest.plan, cache_here(), local=source, progress=progress)
    if weights_digest(checkpoint.files) != host.weights:
        raise ArtifactError(
            "the artifact was built from other weights", where=str(checkpoint.path), hint="--source with those weights"
        )
    if read.record.against:
        return checkpoint.path, told
    plan = manifest.plan.model_copy(update={"adapter": told.adapted()})
    return fetch(plan, cache_here(), local=source, adapter=adapter, progress=progress).path, None


@adapter_app.callback()
def _adapters() -> None:
    """Adapters that `qwen-onnx serve --adapter` loads."""
