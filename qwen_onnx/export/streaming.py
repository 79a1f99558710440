"""genai's builder with its weights in files: what it holds in memory does not grow with the model.

Two places of genai 0.18 hold a whole model in anonymous memory. ``to_nbits`` copies the graph into one protobuf
message, quantises inside it and copies it back; and tensors that the builder makes itself (fused q, k and v; whatever
it quantises) stay until they are saved. Here ``to_nbits`` sees one node at a time, with the same quantiser and so the
same bytes, and every tensor that is not a view of the mapped checkpoint goes to a memory-mapped file at once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from qwen_onnx.export.weights import mapped

# smaller tensors cost more as files than they free
SMALLEST = 1 << 16  # bytes
QUANTIZED = ("MatMul", "Gather")


@contextmanager
def weights_in_files(folder: Path) -> Iterator[None]:
    """Within, models of genai's builder keep their weights in files below ``folder``, which go away afterwards."""
    from onnxruntime_genai.models import builder

    model = _model_class(builder)
    make_initializer, to_nbits = model.make_initializer, model.to_nbits
    with tempfile.TemporaryDirectory(prefix=".weights-", dir=folder) as place:
        spill = _Spill(Path(place))

        def make(self: Any, tensor: Any, /, name: str, **options: Any) -> None:
            make_initializer(self, spill.kept(tensor), name, **options)
            spill.move(self.model.graph.initializers[name])

        def quantized(self: Any) -> Any:
            return _node_by_node(self, to_nbits, spill)

        model.make_initializer, model.to_nbits = make, quantized
        try:
            yield
        finally:
            model.make_initializer, model.to_nbits = make_initializer, to_nbits


def _model_class(builder: Any) -> Any:
    """The class that all of genai's builders come from, as the builder itself imported it."""
    return next(kind for kind in builder.Qwen3Model.__mro__ if "to_nbits" in vars(kind))


class _Spill:
    """Moves what is in anonymous memory into files of ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def _file(self) -> Path:
        self.count += 1
        return self.folder / str(self.count)

    def kept(self, tensor: Any) -> Any:
        """A torch tensor that an initializer made when saved will hold on to, in a file if it was in memory."""
        if not isinstance(tensor, torch.Tensor) or tensor.nbytes < SMALLEST or _is_mapped(tensor.data_ptr()):
            return tensor
        return mapped(self._file(), tuple(tensor.shape), dtype=tensor.dtype).copy_(tensor.detach())

    def move(self, value: Any) -> None:
        """Put the bytes of an initializer into a file, unless they come from one or are made when saved."""
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.LazyTensor | ir.ExternalTensor) or tensor.nbytes < SMALLEST:
            return
        raw = getattr(tensor, "raw", None)
        if isinstance(raw, torch.Tensor) and _is_mapped(raw.data_ptr()):
            return
        path = self._file()
        with path.open("wb") as file:
            tensor.tofile(file)
        value.const_value = ir.ExternalTensor(
            path.name,
            offset=0,
            length=tensor.nbytes,
            dtype=tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            base_dir=self.folder,
        )


def _is_mapped(address: int) -> bool:
    """Is there a file behind an address? Without Linux's list of maps nobody knows, and the answer is no."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return False
    for line in maps.read_text(encoding="utf-8").splitlines():
        span, _, _, _, inode, *_ = line.split()
        begin, end = (int(bound, 16) for bound in span.split("-"))
        if begin <= address < end:
            return inode != "0"
    return False


def _node_by_node(self: Any, to_nbits: Any, spill: _Spill) -> Any:
    """genai's ``to_nbits`` on graphs of one node each, put back into the whole graph."""
    whole = self.model
    if getattr(self, "exact_quant_override_names", None):
        # it checks that every name is in the graph: not for graphs of one node, and no recipe can ask for it
        return to_nbits(self)
    for node in list(whole.graph):
        if node.op_type not in self.quant_attrs["op_types_to_quantize"] or node.op_type not in QUANTIZED:
            continue
        weight = node.inputs[0 if node.op_type == "Gather" else 1]
        if weight is None or weight.const_value is None or node.name in self.quant_attrs["nodes_to_exclude"]:
            continue
        self.model = _alone(node, whole)
        try:
            found = to_nbits(self)
        finally:
            self.model = whole
        whole.graph.opset_imports.update(found.graph.opset_imports)
        _put_back(whole.graph, node, found.graph, spill)
        if not weight.uses():
            del whole.graph.initializers[weight.name]
    return whole


def _alone(node: Any, whole: ir.Model) -> ir.Model:
    """A model of one node; its weights are the whole graph's, its other inputs are inputs."""
    copies = {value.name: _copy(value) for value in node.inputs}
    outputs = [_copy(value) for value in node.outputs]
    inputs = [copies[value.name] for value in node.inputs]
    graph = ir.Graph(
        [value for value in copies.values() if value.const_value is None],
        outputs,
        nodes=[_node_like(node, inputs, outputs)],
        initializers=[value for value in copies.values() if value.const_value is not None],
        opset_imports=dict(whole.graph.opset_imports),
        name=whole.graph.name,
    )
    return ir.Model(graph, ir_version=whole.ir_version)


def _copy(value: Any) -> Any:
    return ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)


def _node_like(node: Any, inputs: list[Any], outputs: list[Any]) -> ir.Node:
    attributes = list(node.attributes.values())
    return ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=node.name)


def _put_back(graph: Any, node: Any, found: Any, spill: _Spill) -> None:
    """Replace ``node`` by what the quantiser made of it."""
    known: dict[str, Any] = {value.name: value for value in node.inputs}
    for name, value in found.initializers.items():
        if name in known:
            continue
        # two nodes with one weight share what becomes of it
        if name not in graph.initializers:
            copy = _copy(value)
            spill.move(copy)
            graph.register_initializer(copy)
        known[name] = graph.initializers[name]
    made = []
    for item in found:
        outputs = [_copy(value) for value in item.outputs]
        made.append(_node_like(item, [None if value is None else known[value.name] for value in item.inputs], outputs))
        known |= {value.name: value for value in outputs}
    news = [known[value.name] for value in node.outputs]
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, list(node.outputs), news)
