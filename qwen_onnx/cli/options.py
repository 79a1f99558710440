"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ArtifactPath = Annotated[Path, typer.Argument(help="artifact folder, e.g. artifacts/starter/cpu-int4")]
Threads = Annotated[int | None, typer.Option(min=1, help="threads of onnxruntime; default: its own choice")]
MaxTokens = Annotated[int, typer.Option(min=1, help="most new tokens to generate")]
Temperature = Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy")]
