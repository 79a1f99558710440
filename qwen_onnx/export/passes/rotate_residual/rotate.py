"""Our Olive pass ``RotateResidual``: a checkpoint that computes the same with a rotated residual stream.

One random orthogonal matrix turns the residual stream. It is folded into every matrix that writes or reads the stream,
and the norms' weights into those that read it, so nothing is left to compute at run time. Outlier channels are then
spread over all channels, which rounding with one scale per output needs (QuaRot, Ashkboos et al. 2024,
arXiv:2404.00456).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from qwen_onnx.export.options import chosen, parameters
from qwen_onnx.export.passes.rotate_residual.options import RotateResidualOptions
from qwen_onnx.export.progress import Steps
from qwen_onnx.export.skeleton import EMBEDDING, HEAD, NORM
from qwen_onnx.export.weights import CheckpointWeights, create_safetensors
from qwen_onnx.sources.checkpoint import INDEX_FILE, read_json

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
WEIGHT = ".weight"


class RotateResidual(Pass):  # type: ignore[misc]
    """Rotate the residual stream of a Qwen2 or Qwen3 checkpoint."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return parameters(RotateResidualOptions)

    def _run_for_config(self, model: HfModelHandler, config: BasePassConfig, output_model_path: str) -> HfModelHandler:
        rotate(Path(model.model_name_or_path), Path(output_model_path), chosen(RotateResidualOptions, config))
        return HfModelHandler(output_model_path)


def rotation(size: int, seed: int) -> torch.Tensor:
    """A random orthogonal matrix [size, size] in float64, uniformly distributed (Mezzadri, arXiv:math-ph/0609050)."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    turned: torch.Tensor = q * torch.sign(torch.diagonal(r))
    return turned


@torch.no_grad()
def rotate(checkpoint: Path, output: Path, config: RotateResidualOptions) -> None:
    """Write the rotated checkpoint to ``output`` in float32, one file per layer; a tied head becomes one of its own.

    Raises:
        ExportError: a weight is missing.
    """
    output.mkdir(parents=True, exist_ok=True)
    weights = CheckpointWeights(checkpoint)
    settings = read_json(checkpoint / "config.json")
    turn = rotation(settings["hidden_size"], config.seed)
    groups = [f"model.layers.{index}" for index in range(settings["num_hidden_layers"])]
    names = {group: weights.names(f"{group}.") for group in groups}
    inside = {name for group in groups for name in names[group]}
    outer = [*(name for name in weights.names() if name not in inside), *([] if HEAD in weights else [HEAD])]
    steps = Steps("rotated layer", len(groups))
    index: dict[str, str] = {}
    for number, (group, members) in enumerate([*names.items(), ("", outer)], 1):
        file = f"model-{number:05d}-of-{len(groups) + 1:05d}.safetensors"
        turned = {name: _turned(weights, name, group, turn) for name in members}
        for name, tensor in create_safetensors(
            output / file, {name: (torch.float32, tuple(tensor.shape)) for name, tensor in turned.items()}
        ).items():
            tensor.copy_(turned[name])
        index |= dict.fromkeys(members, file)
        if group:
            steps.step(number)
    text = json.dumps({"metadata": {}, "weight_map": index}, indent=1)
    (output / INDEX_FILE).write_text(text, encoding="utf-8")
    settings |= {"tie_word_embeddings": False, "dtype": "float32"}
    (output / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    for path in checkpoint.iterdir():
        weighty = path.suffix in {".safetensors", ".bin"} or path.name.endswith(".index.json")
        if path.is_file() and not weighty and path.name != "config.json":
            shutil.copyfile(path, output / path.name)


def _turned(weights: CheckpointWeights, name: str, layer: str, turn: torch.Tensor) -> torch.Tensor:
    """The tensor ``name`` of the rotated checkpoint."""
    source = EMBEDDING if name == HEAD and HEAD not in weights else name
    tensor = weights.tensor(source)
    if name == HEAD:
        return _multiply(tensor, weights.tensor(f"{NORM}{WEIGHT}"), turn)
    if name == EMBEDDING:
        return _multiply(tensor, None, turn)
    matrix = name.removeprefix(f"{layer}.").removesuffix(WEIGHT)
    if name == f"{NORM}{WEIGHT}" or matrix in READERS:
        return torch.ones_like(tensor, dtype=torch.float32)
    if name.endswith(WEIGHT) and matrix in WRITERS:
        return (turn.T @ tensor.double()).float()
    norm = next((norm for norm, readers in READERS.items() if matrix in readers), None)
    if norm and name.endswith(WEIGHT):
        return _multiply(tensor, weights.tensor(f"{layer}.{norm}{WEIGHT}"), turn)
    return tensor.float()


def _multiply(matrix: torch.Tensor, norm: torch.Tensor | None, turn: torch.Tensor) -> torch.Tensor:
    """``matrix · diag(norm) · turn`` in float64, by pieces of rows: an embedding in float64 would be large."""
    result = torch.empty(matrix.shape, dtype=torch.float32)
    for begin in range(0, len(matrix), 4096):
        rows = matrix[begin : begin + 4096].double()
        result[begin : begin + 4096] = ((rows if norm is None else rows * norm.double()) @ turn).float()
    return result
