"""Bytes of the model's files: what they may have, what the smallest grids take, what is no matrix."""

from __future__ import annotations

from qwen_onnx.errors import ExportError
from qwen_onnx.export.experts import STACKED
from qwen_onnx.export.passes.fisher_gptq import experts
from qwen_onnx.export.passes.fisher_gptq.kernels import kernel_of, plane_bytes
from qwen_onnx.export.passes.fisher_gptq.options import BLOCK, LAYER_BYTES, FisherGptqOptions
from qwen_onnx.export.passes.fisher_gptq.solver import Grid, stored_bytes
from qwen_onnx.export.skeleton import EMBEDDING, Skeleton

# the best of each size, and what rounding alone does well: docs/lab-log.md
GRIDS = {
    "mixed": (Grid(4, BLOCK), Grid(4, BLOCK // 2), Grid(8, BLOCK)),
    "int8": tuple(Grid(bits, BLOCK) for bits in (4, 5, 6, 7, 8)),
}


def counted(planes: int, config: FisherGptqOptions) -> int:
    """Bytes of nodes, of which a bound for files knows and one for weights does not."""
    return planes if config.bits_per_weight is None else 0


def out_of_reach(skeleton: Skeleton, config: FisherGptqOptions, least: str) -> ExportError:
    """No allocation keeps to the bound; ``least`` is what one could."""
    return ExportError(
        f"no choice of {', '.join(grid.name for grid in GRIDS[config.kernel])} keeps to the bound; least: {least}",
        where=str(skeleton.weights.folder),
        hint="give a larger --max-size or --max-kld",
    )


def require_room(skeleton: Skeleton, config: FisherGptqOptions) -> None:
    """The smallest grids keep to the size that is asked for; known before anything is computed."""
    if config.max_kld is not None:
        return
    least = stored_bytes(skeleton.weights.tensor(skeleton.head_name), Grid(config.head_bits, BLOCK))
    least += other_bytes(skeleton, config) + sum(
        min(
            stored_bytes(module.weight, grid) + counted(plane_bytes(grid, kernel_of(grid, config)), config)
            for grid in GRIDS[config.kernel]
        )
        for index in range(skeleton.count)
        for module in skeleton.linears(index).values()
    )
    least += sum(
        stored_bytes(module.get_parameter(name).flatten(0, 1), min(experts.GRIDS, key=lambda grid: -grid.block))
        for index in range(skeleton.count)
        for module in skeleton.experts(index).values()
        for name in STACKED
    )
    if least > most_bytes(skeleton, config):
        raise out_of_reach(skeleton, config, f"{least / 1e6:.1f} MB of files")


def most_bytes(skeleton: Skeleton, config: FisherGptqOptions) -> int:
    """Bytes that the model's files may have."""
    if config.max_bytes is not None:
        return config.max_bytes
    assert config.bits_per_weight is not None, "the options have one bound"
    weights = skeleton.weights.tensor(skeleton.head_name).numel() + _matrices(skeleton)
    return int(weights * config.bits_per_weight / 8) + other_bytes(skeleton, config)


def _matrices(skeleton: Skeleton) -> int:
    """Weights of the layers that get codes."""
    total = 0
    for index in range(skeleton.count):
        total += sum(module.weight.numel() for module in skeleton.linears(index).values())
        for module in skeleton.experts(index).values():
            total += sum(module.get_parameter(name).numel() for name in STACKED)
    return total


def other_bytes(skeleton: Skeleton, config: FisherGptqOptions) -> int:
    """Bytes of the files besides the matrices: sines and cosines, an embedding of its own, floats, the graph."""
    sizes = skeleton.config
    head_dim = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
    rotary: int = 4 * head_dim * sizes.max_position_embeddings
    table = sizes.vocab_size * sizes.hidden_size
    own = 0 if skeleton.head_name == EMBEDDING else 4 * table
    layers = sum(parameter.numel() for parameter in skeleton.model.model.layers.parameters())
    floats = layers - _matrices(skeleton) + sizes.hidden_size
    grid = Grid(config.head_bits, BLOCK)
    head = plane_bytes(grid, kernel_of(grid, config))
    graph = LAYER_BYTES * (skeleton.count + 1) + head
    total: int = rotary + own + 4 * (floats + _biases(skeleton)) + graph
    return total


def _biases(skeleton: Skeleton) -> int:
    """Zeros that genai's builder gives the experts, one for each output."""
    return sum(
        module.get_parameter(name).shape[:2].numel()
        for index in range(skeleton.count)
        for module in skeleton.experts(index).values()
        for name in STACKED
    )
