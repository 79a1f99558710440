"""A graph drawn node by node, its weights copied from a checkpoint into a file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen_onnx.errors import ExportError
from qwen_onnx.export.passes.gptq.solver import round_to_nearest
from qwen_onnx.export.passes.pack_weights.data_file import DataFile
from qwen_onnx.export.tower_options import BLOCK
from qwen_onnx.export.weights import CheckpointWeights

OPSET, IR_VERSION = 21, 10
MICROSOFT = "com.microsoft"
# by torch's type: onnx.TensorProto.DataType, and the type of NumPy that has as many bytes
KINDS: dict[torch.dtype, tuple[int, Any]] = {
    torch.float32: (1, np.float32),
    torch.float16: (10, np.float16),
    torch.bfloat16: (16, np.int16),
}
FLOAT, UINT8, INT64 = 1, 2, 7
# behind a weight's name: what MatMulNBits takes of it
CODES, SCALES, ZEROS = ".codes", ".scales", ".zeros"
# activations are rounded to 8 bits by the same blocks
ACCURACY_LEVEL = 4


class Drawing:
    """Nodes and weights of one graph.

    Args:
        weights: of the checkpoint; data: the file that gets the bytes of those that are used.
        bits: of the weights of linear modules; None: their own type.
    """

    def __init__(self, weights: CheckpointWeights, data: DataFile, bits: int | None = None) -> None:
        self._weights, self._data, self._bits = weights, data, bits
        self.nodes: list[Any] = []
        self._tensors: dict[str, Any] = {}
        self._constants: dict[tuple[int, ...] | int, str] = {}

    def node(self, operator: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add a node; its output's name, or a list of them when there are several."""
        from onnx import helper

        name = f"/{operator}_{len(self.nodes)}"
        made = [f"{name}/output_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), made, name=name, domain=domain, **attributes))
        return made[0] if outputs == 1 else made

    def integer(self, value: int | Sequence[int]) -> str:
        """A constant of type int64; a sequence has one dimension."""
        from onnx import numpy_helper

        key = value if isinstance(value, int) else tuple(value)
        if key not in self._constants:
            name = self._constants[key] = f"constant_{len(self._constants)}"
            self._tensors[name] = numpy_helper.from_array(np.asarray(value, np.int64), name)
        return self._constants[key]

    def floats(self, name: str, values: np.ndarray[Any, Any]) -> str:
        """A small constant of type float32."""
        from onnx import numpy_helper

        self._tensors[name] = numpy_helper.from_array(values.astype(np.float32), name)
        return name

    def table(self, name: str, shape: Sequence[int]) -> tuple[str, int]:
        """A weight in its own type, and that type; ExportError unless it holds as many numbers as ``shape``."""
        tensor = self._read(name, shape)
        kind, numpy_type = KINDS[tensor.dtype]
        flat = tensor.contiguous()
        raw = flat.view(torch.int16) if tensor.dtype is torch.bfloat16 else flat
        self._tensors[name] = self._data.tensor(name, kind, shape, [raw.numpy().astype(numpy_type, copy=False)])
        return name, kind

    def _read(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        tensor = self._weights.tensor(name)
        if tensor.dtype not in KINDS:
            raise ExportError(f"the type {tensor.dtype} has no place in a graph", where=name)
        if tensor.numel() != int(np.prod(shape)):
            raise ExportError(f"{list(tensor.shape)} is not the shape {list(shape)} that config.json says", where=name)
        return tensor

    def weight(self, name: str, *shape: int) -> str:
        """A weight in float32: ONNX Runtime widens it once, when it loads."""
        found, kind = self.table(name, shape)
        return found if kind == FLOAT else str(self.node("Cast", found, to=FLOAT))

    def linear(
        self, name: str, value: str, inputs: int, outputs: int, *, bias: bool = True, exact: bool = False
    ) -> str:
        """A linear module of PyTorch on [rows, inputs]; ``exact`` keeps its weights' type whatever the others have."""
        if self._bits is not None and not exact:
            return self._coded(name, value, inputs, outputs, bias, self._bits)
        given = [value, self.weight(f"{name}.weight", outputs, inputs)]
        given += [self.weight(f"{name}.bias", outputs)] if bias else []
        return str(self.node("Gemm", *given, transB=1))

    def _coded(self, name: str, value: str, inputs: int, outputs: int, bias: bool, bits: int) -> str:
        """The same of codes in blocks of inputs, the last of which zeros fill."""
        weight = self._read(f"{name}.weight", (outputs, inputs)).float().reshape(outputs, inputs)
        blocks = -(-inputs // BLOCK)
        found = round_to_nearest(torch.nn.functional.pad(weight, (0, blocks * BLOCK - inputs)), bits, BLOCK)
        parts = {
            CODES: (UINT8, found.codes.to(torch.uint8), (outputs, blocks, BLOCK)),
            SCALES: (FLOAT, found.scales, (outputs, blocks)),
            ZEROS: (UINT8, found.zeros.to(torch.uint8), (outputs, blocks)),
        }
        given = [value]
        for part, (kind, tensor, shape) in parts.items():
            given.append(f"{name}.weight{part}")
            self._tensors[given[-1]] = self._data.tensor(given[-1], kind, shape, [tensor.contiguous().numpy()])
        told = {"K": inputs, "N": outputs, "bits": bits, "block_size": BLOCK, "accuracy_level": ACCURACY_LEVEL}
        product = str(self.node("MatMulNBits", *given, domain=MICROSOFT, **told))
        return str(self.node("Add", product, self.weight(f"{name}.bias", outputs))) if bias else product

    def result(self, name: str, kind: int) -> None:
        """Call the last node's output ``name``, in the type ``kind``; until here it has float32."""
        if kind != FLOAT:
            self.node("Cast", self.nodes[-1].output[0], to=kind)
        self.nodes[-1].output[0] = name

    def save(self, path: Path, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Write the graph; ``inputs`` and ``outputs`` are (name, type, shape)."""
        import onnx
        from onnx import helper

        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [helper.make_tensor_value_info(*told) for told in inputs],
            [helper.make_tensor_value_info(*told) for told in outputs],
            list(self._tensors.values()),
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION), str(path))
