"""``qwen-onnx adapter``: adapters as files for the slots of an artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qwen_onnx.cli.options import ARTIFACT, artifact_at

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


@adapter_app.callback()
def _adapters() -> None:
    """Adapters that `qwen-onnx serve --adapter` loads."""
