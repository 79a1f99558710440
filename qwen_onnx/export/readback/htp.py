"""Read from the graphs of an HTP folder what the plan asked for: from the QDQ graphs, and from the contexts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto, numpy_helper

from qwen_onnx.artifact.htp.folder import CONTEXT, QDQ, HtpFolder
from qwen_onnx.errors import ExportError
from qwen_onnx.export.readback.common import provider_of, refuse

if TYPE_CHECKING:
    from qwen_onnx.catalog.schema import Readback

NODE, HEAD = "EPContext", "lm_head"
COMPATIBILITY = "ep_compatibility_info.qnn"
# fields of that text: HTP architecture, chip
ARCHITECTURE, CHIP = 4, 5
# what the HTP computes in float: the residual stream and the norms that read it
FLOAT_OPERATORS = {"Add", "RMSNormalization"}
WEIGHT_BITS = {TensorProto.INT4: 4, TensorProto.INT8: 8}
ACTIVATION_BITS = {TensorProto.UINT16: 16, TensorProto.UINT8: 8}


def read_back(folder: Path, asked: Readback) -> dict[str, Any]:
    """``compare_folder``, and the provider in ``genai_config.json``."""
    if provider_of(folder) != asked.provider:
        raise ExportError(f"provider is {provider_of(folder)}, asked {asked.provider}", where=str(folder))
    return compare_folder(read_folder(folder), asked)


def read_folder(folder: Path) -> dict[int, dict[str, Any]]:
    """Facts of each window's graphs, by its number of tokens: ``read_qdq`` and ``read_context``.

    Raises:
        ExportError: a file is missing or is no ONNX file.
    """
    facts = {}
    described = HtpFolder.read(folder, ExportError)
    for tokens in described.windows:
        qdq, context = (described.in_form(form).graph(tokens) for form in (QDQ, CONTEXT))
        missing = [path.name for path in (qdq, context) if not path.exists()]
        if missing:
            raise ExportError(f"{' and '.join(missing)} missing", where=str(folder))
        facts[tokens] = {"qdq": read_qdq(qdq), "context": read_context(context)}
    return facts


def read_qdq(path: Path) -> dict[str, Any]:
    """Quantisation facts of a QDQ graph.

    Returns:
        ``weights``: bits, symmetry and whether there is one scale per output, of each matrix; ``activation_bits``: of
        all tensors that are rounded; ``float_operators``: how many operators read a number that was never rounded;
        ``operators``: how many of each kind; ``interface``: type and shape of each input and output.
    """
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    rounded = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    weights: dict[str, dict[str, Any]] = {}
    activations: set[int | None] = set()
    floats: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and len(constants.get(node.input[0], TensorProto()).dims) == 2:
            weights[node.input[0]] = _weight(node, constants)
        elif node.op_type == "QuantizeLinear":
            activations.add(ACTIVATION_BITS.get(constants[node.input[2]].data_type))
        elif node.op_type != "DequantizeLinear" and not all(
            name in rounded or _is_index(constants.get(name)) for name in node.input
        ):
            floats[node.op_type] += 1
    return {
        "weights": weights,
        "activation_bits": sorted(activations, key=str),
        "float_operators": dict(floats),
        "operators": dict(Counter(node.op_type for node in graph.node)),
        "interface": _interface(graph),
    }


def _is_index(tensor: Any) -> bool:
    return tensor is not None and tensor.data_type == TensorProto.INT64


def _weight(node: Any, constants: dict[str, Any]) -> dict[str, Any]:
    codes, scales, zeros = (constants[name] for name in node.input)
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    outputs = codes.dims[attributes.get("axis", 1)]
    return {
        "bits": WEIGHT_BITS.get(codes.data_type),
        "symmetric": not numpy_helper.to_array(zeros).astype("int8").any(),
        "per_output": list(scales.dims) == [outputs] and "block_size" not in attributes,
    }


def read_context(path: Path) -> dict[str, Any]:
    """Facts of a compiled context.

    Returns:
        ``operators``; ``htp_arch`` and ``soc_model`` that it was compiled for; ``binary``: bytes of its file;
        ``interface``: type and shape of each input and output.
    """
    model = onnx.load(str(path), load_external_data=False)
    text = next((entry.value for entry in model.metadata_props if entry.key == COMPATIBILITY), "")
    fields = dict(enumerate(text.split(":")))
    nodes = [node for node in model.graph.node if node.op_type == NODE]
    names = {
        attribute.s.decode() for node in nodes for attribute in node.attribute if attribute.name == "ep_cache_context"
    }
    return {
        "operators": dict(Counter(node.op_type for node in model.graph.node)),
        "htp_arch": fields.get(ARCHITECTURE),
        "soc_model": fields.get(CHIP),
        "binary": sum((path.parent / name).stat().st_size for name in names if (path.parent / name).exists()),
        "interface": _interface(model.graph),
    }


def _interface(graph: Any) -> dict[str, Any]:
    return {
        value.name: [value.type.tensor_type.elem_type, *(size.dim_value for size in value.type.tensor_type.shape.dim)]
        for value in (*graph.input, *graph.output)
    }


def compare_folder(facts: dict[int, dict[str, Any]], asked: Readback) -> dict[str, Any]:
    """Compare the graphs of every window with the plan.

    Returns:
        A summary for the manifest, by window.

    Raises:
        ExportError: naming every kind of difference.
    """
    faults = []
    for tokens, found in facts.items():
        faults += [f"window {tokens}: {fault}" for fault in _differences(found["qdq"], found["context"], asked)]
    refuse("the graph", faults)
    return {str(tokens): _summary(found) for tokens, found in facts.items()}


def _differences(qdq: dict[str, Any], context: dict[str, Any], asked: Readback) -> list[str]:
    faults = [
        f"the context's {name} is {context[name]}, asked {getattr(asked, name)}"
        for name in ("htp_arch", "soc_model")
        if context[name] != getattr(asked, name)
    ]
    if context["operators"] != {NODE: 1}:
        faults.append(f"the context holds {context['operators']}, not one {NODE}")
    if not context["binary"]:
        faults.append("the context's binary is missing or empty")
    if context["interface"] != qdq["interface"]:
        faults.append("context and QDQ graph have other inputs or outputs")
    kinds = {kind for kind, *_ in qdq["interface"].values()}
    if kinds != {TensorProto.UINT16} or asked.io_bits != 16:
        faults.append(f"inputs and outputs have the types {sorted(kinds)}, asked codes of {asked.io_bits} bits")
    if qdq["activation_bits"] != [16]:
        faults.append(f"activations have {qdq['activation_bits']} bits, asked 16")
    undeclared = sorted(set(qdq["float_operators"]) - FLOAT_OPERATORS)
    if undeclared:
        faults.append(f"{', '.join(undeclared)} compute in float")
    return faults + _weight_differences(qdq["weights"], asked)


def _weight_differences(weights: dict[str, dict[str, Any]], asked: Readback) -> list[str]:
    faults = []
    for name, weight in weights.items():
        allowed = {asked.head_bits} if name == HEAD else {asked.body_bits, 8}
        if weight["bits"] not in allowed:
            faults.append(f"{name}: {weight['bits']} bits, asked {sorted(allowed)}")
        if weight["symmetric"] != asked.symmetric:
            faults.append(f"{name}: symmetric is {weight['symmetric']}, asked {asked.symmetric}")
        if not weight["per_output"]:
            faults.append(f"{name}: its scales are not one per output")
    if asked.body_bits not in [weight["bits"] for name, weight in weights.items() if name != HEAD]:
        faults.append(f"no matrix of the body has {asked.body_bits} bits")
    return faults


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    qdq, context = found["qdq"], found["context"]
    bits = Counter(weight["bits"] for weight in qdq["weights"].values())
    return {
        "matrices": {str(number): count for number, count in sorted(bits.items())},
        "activation_bits": qdq["activation_bits"],
        "float_operators": qdq["float_operators"],
        "operators": qdq["operators"],
        "context": {name: context[name] for name in ("operators", "htp_arch", "soc_model", "binary")},
    }
