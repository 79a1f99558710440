"""Checkpoints whose weights are quantised already: which of them can be dequantised, and what the others are called."""

from __future__ import annotations

from typing import Any, Literal

from qwen_onnx.errors import UnsupportedModelError

# by ``quant_method``, as their makers write them
CALLED = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "auto-round": "AutoRound",
    "autoround": "AutoRound",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fp8": "FP8",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "torchao": "torchao",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "aqlm": "AQLM",
    "quark": "Quark",
}
LARGEST_BLOCK = 1 << 14
HINT = "give the model that it was made of, unquantised"


def quantization_of(config: dict[str, Any], where: str, hint: str = HINT) -> Literal["fp8"] | None:
    """How the weights of a checkpoint are stored: None as plain floats, ``fp8`` in blocks with scales.

    Raises:
        UnsupportedModelError: in another way, which it names.
    """
    said = config.get("quantization_config")
    if said is None and "quantization" not in config:
        return None
    if said is None:
        # what mlx-lm writes, with no other key beside
        raise _refused("MLX", where, hint)
    method = str(said.get("quant_method") or "") if isinstance(said, dict) else ""
    if not method and isinstance(said, dict) and (said.get("load_in_4bit") or said.get("load_in_8bit")):
        method = "bitsandbytes"
    if method == "fp8" and block_of(config):
        return "fp8"
    if method == "fp8":
        raise _refused("FP8 without the block size of its scales", where, hint)
    raise _refused(CALLED.get(method.lower(), method[:40] or "an unnamed method"), where, hint)


def block_of(config: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the block that shares one scale in an FP8 checkpoint; None: it says none that can be."""
    said = config.get("quantization_config")
    block = said.get("weight_block_size") if isinstance(said, dict) else None
    whole = isinstance(block, list) and len(block) == 2 and all(type(size) is int for size in block)
    if not whole or not all(1 <= size <= LARGEST_BLOCK for size in block):  # type: ignore[union-attr]
        return None
    return block[0], block[1]  # type: ignore[index]


def _refused(name: str, where: str, hint: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the weights are already quantised ({name}); quantising them again would add to their loss",
        where=where,
        hint=hint,
    )
