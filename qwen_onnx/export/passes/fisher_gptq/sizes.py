"""Bytes of the model's files: what they may have, what the smallest grids take, what is no matrix."""

from __future__ import annotations

from qwen_onnx.errors import ExportError
from qwen_onnx.export.experts import STACKED
from qwen_onnx.export.passes.fisher_gptq import experts
from qwen_onnx.export.passes.fisher_gptq.kernels import kernel_of, plane_bytes
from qwen_onnx.export.passes.fisher_gptq.options import FLOAT_BITS, LAYER_BYTES, FisherGptqOptions
from qwen_onnx.export.passes.fisher_gptq.solver import Grid, stored_bytes
from qwen_onnx.export.skeleton import EMBEDDING, Skeleton

# of 4 bits; DirectML, WebGPU and TensorRT have no smaller ones
LEAST_BLOCK = 32
# of a DequantizeLinear and a Transpose in front of a product
QDQ_BYTES = 600


def grids(config: FisherGptqOptions) -> tuple[Grid, ...]:
    """What a matrix may get, those of most bits last: the best of each size, and what rounding alone does well."""
    block = config.group_size
    if config.kernel == "int8":
        return tuple(Grid(bits, block) for bits in (4, 5, 6, 7, 8))
    if config.kernel == "symmetric":
        return Grid(4, block, symmetric=True), Grid(FLOAT_BITS, block)
    halves = [Grid(4, block // 2)] if block > LEAST_BLOCK else []
    return Grid(4, block), *halves, Grid(8, block)


def head_grid(config: FisherGptqOptions) -> Grid:
    """What head and shared embedding get."""
    return Grid(config.head_bits, config.group_size)


def nodes_bytes(grid: Grid, config: FisherGptqOptions) -> int:
    """What a matrix that gets ``grid`` adds to the graph file beyond an operator."""
    if grid.symmetric:
        return QDQ_BYTES
    return 0 if grid.bits == FLOAT_BITS else plane_bytes(grid, kernel_of(grid, config))


def counted(planes: int, config: FisherGptqOptions) -> int:
    """Bytes of nodes, of which a bound for files knows and one for weights does not."""
    return planes if config.bits_per_weight is None else 0


def out_of_reach(skeleton: Skeleton, config: FisherGptqOptions, least: str) -> ExportError:
    """No allocation keeps to the bound; ``least`` is what one could."""
    return ExportError(
        f"no choice of {', '.join(grid.name for grid in grids(config))} keeps to the bound; least: {least}",
        where=str(skeleton.weights.folder),
        hint="give a larger --max-size or --max-kld",
    )


def require_room(skeleton: Skeleton, config: FisherGptqOptions) -> None:
    """The smallest grids keep to the size that is asked for; known before anything is computed."""
    if config.max_kld is not None:
        return
    least = stored_bytes(skeleton.weights.tensor(skeleton.head_name), head_grid(config))
    least += other_bytes(skeleton, config) + sum(
        min(stored_bytes(module.weight, grid) + counted(nodes_bytes(grid, config), config) for grid in grids(config))
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
    head, grid = skeleton.weights.tensor(skeleton.head_name), head_grid(config)
    coded, apart = (0, stored_bytes(head, grid)) if grid.bits == FLOAT_BITS else (head.numel(), 0)
    weights = coded + _matrices(skeleton)
    return int(weights * config.bits_per_weight / 8) + apart + other_bytes(skeleton, config)


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
    rotary = head_dim * sizes.max_position_embeddings
    shared = skeleton.head_name == EMBEDDING and config.shared_embedding
    table = 0 if shared else sizes.vocab_size * sizes.hidden_size
    layers = sum(parameter.numel() for parameter in skeleton.model.model.layers.parameters())
    floats = layers - _matrices(skeleton) + sizes.hidden_size
    graph = LAYER_BYTES * (skeleton.count + 1) + nodes_bytes(head_grid(config), config)
    number = 4 if config.activation_bits == 8 else 2
    total: int = number * (rotary + table + floats + _biases(skeleton)) + graph
    return total


def _biases(skeleton: Skeleton) -> int:
    """Zeros that genai's builder gives the experts, one for each output."""
    return sum(
        module.get_parameter(name).shape[:2].numel()
        for index in range(skeleton.count)
        for module in skeleton.experts(index).values()
        for name in STACKED
    )
