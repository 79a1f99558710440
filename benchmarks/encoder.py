"""Time and memory of a vision encoder beside PyTorch's, for pictures of several sizes.

``python -m benchmarks.encoder [--layers 8] [--megapixels 0.25 1 4] [--rounds 3] [--threads 2] [--gate …]``

The encoder has the widths of Qwen2.5-VL-3B's and random weights in bfloat16; of every eight layers seven attend within
windows and one to the whole picture, as there. ``--layers 32`` is the whole tower. Each figure comes from a process of
its own, which loads the encoder and encodes one picture twice: the first time memory counts, the second the clock. They
take turns: PyTorch in float32, the graph with weights of the checkpoint's type (``float``), and with weights of 8 bits
(``int8``). Ratios are paired within a round, with PyTorch.

* ``..._seconds`` for one picture; ``..._added_mb`` above what the process holds once the encoder is loaded;
  ``..._loaded_mb`` that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.figures import Bound, Figure, conclude
from qwen_onnx.errors import run

KINDS = ("torch", "float", "int8")
WIDTH, INNER, HEADS, OUTPUT, PATCH, MERGE = 1280, 3420, 16, 2048, 14, 2
SCALE, SEED = 0.02, 20261130
MB = 1e6


def settings_of(layers: int) -> dict[str, Any]:
    """``config.json`` of a Qwen2.5-VL with such a tower."""
    vision = {
        "model_type": "qwen2_5_vl",
        "depth": layers,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_heads": HEADS,
        "out_hidden_size": OUTPUT,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": list(range(7, layers, 8)),
    }
    text = {
        "hidden_size": OUTPUT,
        "num_hidden_layers": 1,
        "vocab_size": 64,
        "num_attention_heads": 16,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "image_token_id": 60,
        "video_token_id": 61,
        "vision_start_token_id": 62,
        "vision_config": vision,
        "text_config": {**text, "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
    }


def write(folder: Path, layers: int) -> None:
    """A checkpoint with the tower alone, and its graphs."""
    import torch
    from safetensors.torch import save_file

    from qwen_onnx.export.drawing import FLOAT, Drawing
    from qwen_onnx.export.passes.pack_weights.data_file import DataFile
    from qwen_onnx.export.passes.vision_encoder.tower import draw_tower, inputs, outputs
    from qwen_onnx.export.weights import CheckpointWeights
    from qwen_onnx.sources.checkpoint import SINGLE_FILE
    from qwen_onnx.sources.vision_config import VISION_CONFIG, tower_of
    from qwen_onnx.verify.tower import empty_model

    settings = settings_of(layers)
    (folder / VISION_CONFIG).write_text(json.dumps(settings), encoding="utf-8")
    model, _ = empty_model(settings)
    random = torch.Generator().manual_seed(SEED)
    tensors = {
        f"visual.{name}": (torch.randn(value.shape, generator=random) * SCALE).to(torch.bfloat16)
        for name, value in model.visual.state_dict().items()
    }
    save_file(tensors, folder / SINGLE_FILE)
    tower = tower_of(settings, str(folder))
    for kind, bits in (("float", None), ("int8", 8)):
        with DataFile(folder / f"{kind}.onnx.data") as data:
            draw = Drawing(CheckpointWeights(folder, plain=True), data, bits)
            draw_tower(draw, tower, FLOAT)
            draw.save(folder / f"{kind}.onnx", inputs(tower), outputs(tower, FLOAT))


def patches_of(megapixels: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A square picture of about so many pixels, as the encoder takes it."""
    side = round(megapixels**0.5 * 1000 / PATCH / MERGE) * MERGE
    pixels = np.random.default_rng(SEED).normal(size=(side * side, 3 * 2 * PATCH**2)).astype(np.float32)
    return pixels, np.array([[1, side, side]], np.int64)


def worker(kind: str, folder: Path, megapixels: float, threads: int) -> dict[str, float]:
    """What one process measures."""
    pixels, grid = patches_of(megapixels)
    encode = _torch(folder, threads) if kind == "torch" else _onnx(folder / f"{kind}.onnx", threads)
    loaded = _resident()
    # from here on the kernel tells the most that was held
    Path("/proc/self/clear_refs").write_text("5")
    encode(pixels, grid)
    added = _resident("VmHWM") - loaded
    begin = time.perf_counter()
    encode(pixels, grid)
    return {"seconds": time.perf_counter() - begin, "added_mb": added / MB, "loaded_mb": loaded / MB}


def _torch(folder: Path, threads: int) -> Any:
    import torch

    from qwen_onnx.verify.tower import VisionTower

    torch.set_num_threads(threads)
    module = VisionTower(folder).module

    @torch.inference_mode()
    def encode(pixels: Any, grid: Any) -> None:
        module(torch.tensor(pixels), torch.tensor(grid))

    return encode


def _onnx(file: Path, threads: int) -> Any:
    from qwen_onnx.runtime.engines.batch.session import open_session

    session = open_session(file, threads)
    return lambda pixels, grid: session.run(None, {"pixel_values": pixels, "image_grid_thw": grid})


def _resident(field: str = "VmRSS") -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def benchmark(given: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """``head`` and ``figures``, as in the module's docstring."""
    values: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        say(f"writing an encoder of {given.layers} layers")
        write(Path(scratch), given.layers)
        for number in range(given.rounds):
            for size in given.megapixels:
                say(f"round {number + 1} of {given.rounds}: {size:g} megapixels")
                turns = KINDS if number % 2 == 0 else KINDS[::-1]
                found = {kind: _measured(kind, scratch, size, given.threads) for kind in turns}
                for kind in KINDS:
                    for name, value in found[kind].items():
                        values[f"{kind}_{size:g}_{name}"].append(value)
                    speedup = found["torch"]["seconds"] / found[kind]["seconds"]
                    values[f"{kind}_{size:g}_speedup"].append(speedup)
    head = {
        "layers": given.layers,
        "rounds": given.rounds,
        "threads": given.threads,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    return {"head": head, "figures": {name: Figure.of(found) for name, found in values.items()}}


def _measured(kind: str, folder: str, size: float, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.encoder", "--threads", str(threads), "--worker", kind, folder]
    done = subprocess.run([*command, str(size)], stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 when a bound is broken."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoder", description="time and memory of a vision encoder beside PyTorch's"
    )
    parser.add_argument("--layers", type=int, default=8, help="of the encoder; 32 is the whole one")
    parser.add_argument("--megapixels", type=float, nargs="+", default=[0.25, 1.0, 4.0], help="sizes of pictures")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of onnxruntime and of PyTorch")
    parser.add_argument("--gate", action="append", default=[], metavar="NAME<=VALUE", help="exit 1 when it is broken")
    parser.add_argument("--worker", nargs=3, metavar=("KIND", "FOLDER", "MEGAPIXELS"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    bounds = [Bound.parse(text) for text in given.gate]
    if given.worker:
        kind, folder, size = given.worker
        print(json.dumps(worker(kind, Path(folder), float(size), given.threads)))
        return 0
    told = benchmark(given, Console(stderr=True).print)
    return conclude(told, f"an encoder of Qwen2.5-VL-3B's widths, {given.layers} layers", bounds)


if __name__ == "__main__":
    run(main)
