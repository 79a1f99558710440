"""The graph of an artifact as verification needs it: read with its weights mapped, and rewritten in memory.

Nothing of a rewritten graph is saved: weights stay those of the artifact's files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qwen_onnx.artifact.folded import Folded
from qwen_onnx.artifact.stored import FLOAT, FLOAT16, Array, stored_array
from qwen_onnx.errors import VerificationError
from qwen_onnx.runtime.engines.batch.head import pruned_head

QUANTIZED = ("MatMulNBits", "QMoE")
# bytes of folded values that are kept, the last ones, since a layer is read anew for every text; and how many are kept
# at any size: codes, scales and zero points of the matrix that is read, some rows at a time
KEPT_BYTES, KEPT = 1 << 28, 3
COSINES = "cos_cache"
# these read a few rows of their first input, which is a whole table
READ_ROWS = ("Gather", "GatherBlockQuantized")


def attributes(node: Any) -> dict[str, Any]:
    """Attributes of a node by name."""
    import onnx

    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


class Graph:
    """A graph file and its constants, which are mapped or computed when they are asked for.

    Attributes:
        types: element type (onnx.TensorProto.DataType) of what nodes hand each other, as far as the file says.
        folded: what the file makes of its constants.

    Raises:
        VerificationError: the file is no graph.
    """

    def __init__(self, file: Path) -> None:
        import onnx
        from google.protobuf.message import DecodeError

        self.file = file
        try:
            self.model = onnx.load(str(file), load_external_data=False)
        except (OSError, DecodeError) as error:
            raise VerificationError(f"the graph cannot be read: {error}", where=str(file)) from error
        values = (*self.model.graph.value_info, *self.model.graph.output)
        self.types = {value.name: value.type.tensor_type.elem_type for value in values}
        self._tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.folded = Folded(self.model, file, VerificationError)
        self._made: dict[str, Array] = {}

    @property
    def nodes(self) -> Any:
        """Of the main graph, in order."""
        return self.model.graph.node

    @property
    def half(self) -> bool:
        """Whether activations, and floats that are stored, are float16; else they are float32."""
        logits = next(item for item in self.model.graph.output if item.name == "logits")
        return bool(logits.type.tensor_type.elem_type == FLOAT16)

    @property
    def half_tables(self) -> bool:
        """Whether tables of rotary positions are float16; a Qwen2.5-VL's are float32 among float16 activations."""
        kinds = [tensor.data_type for name, tensor in self._tensors.items() if name.endswith(COSINES)]
        return FLOAT16 in kinds if kinds else self.half

    def tensor(self, name: str) -> Array:
        """A constant as its reader sees it; of INT4 the bytes, two codes in each.

        An initialiser is mapped. What the graph makes of several is computed; the last ``KEPT_BYTES`` of it stay, and
        the last ``KEPT`` of any size.

        Raises:
            VerificationError: there is none of that name, or its data are not where the graph says.
        """
        if name in self._made:
            return self._made[name]
        if name not in self.folded:
            return self._initializer(name)
        self._made[name] = self.folded.value(name, self._initializer)
        while len(self._made) > KEPT and sum(item.nbytes for item in self._made.values()) > KEPT_BYTES:
            del self._made[next(iter(self._made))]
        return self._made[name]

    def kind(self, name: str) -> int | None:
        """Element type (onnx.TensorProto.DataType) of a constant; None for what is none."""
        if name in self.folded:
            return self.folded.kind(name).data_type
        found = self._tensors.get(name)
        return None if found is None else int(found.data_type)

    def _initializer(self, name: str) -> Array:
        found = self._tensors.get(name)
        if found is None:
            raise VerificationError(f"{name} is not a constant that can be read", where=str(self.file))
        return stored_array(found, self.file, VerificationError)

    def every_position(self) -> None:
        """Join again what ``prune_lm_head`` cut: logits of all positions, not of the last one.

        Weights and kernels stay those of the artifact; only the Gather and Unsqueeze before the head are passed by.
        """
        graph = self.model.graph
        found = pruned_head(graph)
        if found is not None:
            last, head = found
            head.input[0] = last.input[0]
            logits = next(output for output in graph.output if output.name == "logits")
            logits.type.tensor_type.shape.dim[1].dim_param = "sequence_length"

    def in_float32(self) -> None:
        """Have every operator compute in float32: accuracy level 1, and no float16 but in stored weights.

        Serving rounds activations to 8 bits (level 4) or to float16; what the graph itself says shows without it.
        """
        self.at_level_one()
        if self.half:
            self._widen()

    def at_level_one(self) -> None:
        """Have products with codes keep their activations in float32."""
        import onnx

        for node in self.nodes:
            if node.op_type in QUANTIZED:
                kept = [item for item in node.attribute if item.name != "accuracy_level"]
                del node.attribute[:]
                node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", 1)])

    def _widen(self) -> None:
        import onnx

        graph = self.model.graph
        halves = {tensor.name for tensor in graph.initializer if tensor.data_type == FLOAT16}
        for value in (*graph.input, *graph.output):
            if value.type.tensor_type.elem_type == FLOAT16:
                value.type.tensor_type.elem_type = FLOAT
        # what the file says of types in between is no longer true
        del graph.value_info[:]
        self.types = {name: FLOAT if kind == FLOAT16 else kind for name, kind in self.types.items()}
        nodes, widened = [], set()
        for node in graph.node:
            _widen_attributes(node)
            for place, name in enumerate(node.input):
                if name not in halves:
                    continue
                if node.op_type in READ_ROWS and place == 0:
                    # the rows that were read, not the whole table
                    output, node.output[0] = node.output[0], f"{node.output[0]}/half"
                    nodes += [node, onnx.helper.make_node("Cast", [node.output[0]], [output], to=FLOAT)]
                    break
                node.input[place] = f"{name}/float"
                if name not in widened:
                    widened.add(name)
                    nodes.append(onnx.helper.make_node("Cast", [name], [f"{name}/float"], to=FLOAT))
            else:
                nodes.append(node)
        del graph.node[:]
        graph.node.extend(nodes)

    def serialized(self) -> bytes:
        """The graph as it is now; its weights are still in the artifact's files."""
        found: bytes = self.model.SerializeToString()
        return found


def _widen_attributes(node: Any) -> None:
    """Casts to float16 and constants of float16 become float32."""
    from onnx import numpy_helper

    for item in node.attribute:
        if node.op_type == "Cast" and item.name == "to" and item.i == FLOAT16:
            item.i = FLOAT
        elif item.HasField("t") and item.t.data_type == FLOAT16:
            item.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item.t).astype(np.float32), item.t.name))
