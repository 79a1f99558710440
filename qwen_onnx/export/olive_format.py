"""Checkpoints in Olive's quantised format, made of files that a pass finished one by one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_onnx.errors import ExportError
from qwen_onnx.export.experts import STACKED
from qwen_onnx.export.skeleton import Skeleton
from qwen_onnx.sources.checkpoint import INDEX_FILE, read_json

# names the matrices of layers that stay floats, in ``quantization_config``; as transformers calls it
UNCODED = "modules_to_not_convert"


@contextmanager
def work_folder(kept: Path | None, output: Path) -> Iterator[Path]:
    """Where a pass works: ``kept``, which stays, or a folder beside ``output``, which goes away."""
    if kept is not None:
        yield kept
        # it is not there when a build was killed behind its last step and this one found everything finished
        if (kept / "scratch").exists():
            shutil.rmtree(kept / "scratch")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.work-", dir=output.parent) as folder:
        yield Path(folder)


def require_blocks(skeleton: Skeleton, block: int) -> None:
    """Every matrix divides into blocks of ``block`` inputs; -1: a row is one.

    Raises:
        ExportError: one does not; the message names it.
    """
    for index in range(skeleton.count):
        widths = {name: module.in_features for name, module in skeleton.linears(index).items()}
        for name, experts in skeleton.experts(index).items():
            widths |= {f"{name}.{part}": experts.get_parameter(part).shape[2] for part in STACKED}
        for name, inputs in widths.items():
            if block > 0 and inputs % block:
                where = f"model.layers.{index}.{name}"
                raise ExportError(
                    f"{where} has {inputs} inputs, which is not a multiple of the block size {block}",
                    hint="set group_size of the quantize step for this model",
                )


def assemble(parts: Sequence[Path], checkpoint: Path, output: Path, quantization: dict[str, Any]) -> None:
    """Link finished safetensors into ``output``, with an index and the config that Olive's format asks for.

    Args:
        checkpoint: where the other files come from.
        quantization: ``quantization_config`` without what is the same for every pass.
    """
    from safetensors import safe_open

    output.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    for number, path in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        _link(path, output / name)
        with safe_open(path, framework="pt") as file:
            index |= dict.fromkeys(file.keys(), name)
    total = sum(path.stat().st_size for path in output.glob("model-*.safetensors"))
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    (output / INDEX_FILE).write_text(text, encoding="utf-8")
    settings = read_json(checkpoint / "config.json")
    settings["quantization_config"] = {"quant_method": "olive", "embeds": False, **quantization}
    (output / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    for path in checkpoint.iterdir():
        weights = path.suffix in {".safetensors", ".bin"} or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name != "config.json":
            shutil.copyfile(path, output / path.name)


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the folders are on two disks."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
