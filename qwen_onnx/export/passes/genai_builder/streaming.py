"""genai's builder with its weights in files: what it holds in memory does not grow with the model.

Four places of genai 0.18 hold a whole model in anonymous memory. ``load_weights`` has transformers stack all experts;
the experts' preprocessing stacks a layer's again, thrice; ``to_nbits`` copies the graph into one protobuf message,
quantises inside it and copies it back; and tensors that the builder makes itself (fused q, k and v) stay until they
are saved. Here each is done in pieces (``mapped_model``, ``graph_steps``), and every tensor that is not a view of the
mapped checkpoint goes to a memory-mapped file at once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from qwen_onnx.catalog.architectures import DENSE
from qwen_onnx.export.olive_format import UNCODED
from qwen_onnx.export.passes.genai_builder.graph_steps import ExpertSteps, external, quantize_matrices
from qwen_onnx.export.passes.genai_builder.mapped_model import mapped_model
from qwen_onnx.export.weights import mapped
from qwen_onnx.export.workfolder import WorkFolder
from qwen_onnx.sources.checkpoint import read_json

# smaller tensors cost more as files than they free
SMALLEST = 1 << 16  # bytes


@contextmanager
def weights_in_files(folder: Path, identity: Any, kept: Path | None = None) -> Iterator[None]:
    """Within, models of genai's builder keep their weights in files.

    Args:
        folder: the files are below it and go away afterwards.
        identity: what the quantised weights depend on.
        kept: folder for finished layers instead, which the same build finds again.
    """
    from onnxruntime_genai.models import builder

    model = _model_class(builder)
    with tempfile.TemporaryDirectory(prefix=".weights-", dir=folder) as place:
        spill, work = _Spill(Path(place)), WorkFolder(kept or Path(place, "steps"), identity)
        ours = _replacements(model, spill, work)
        stock = {name: getattr(model, name) for name in ours}
        for name, method in ours.items():
            setattr(model, name, method)
        try:
            yield
        finally:
            for name, method in stock.items():
                setattr(model, name, method)


def _replacements(model: Any, spill: _Spill, work: WorkFolder) -> dict[str, Any]:
    """Methods of genai's builders by name, as they are while weights go to files."""
    make_initializer, to_nbits, load_weights = model.make_initializer, model.to_nbits, model.load_weights
    experts = ExpertSteps(work)

    def make(self: Any, tensor: Any, /, name: str, **options: Any) -> None:
        make_initializer(self, spill.kept(tensor), name, **options)
        spill.move(self.model.graph.initializers[name])

    def loaded(self: Any, input_path: str) -> Any:
        config = read_json(Path(input_path, "config.json"))
        [architecture] = config["architectures"]
        # genai's own reader takes every matrix of a quantised checkpoint for codes
        plain = architecture in DENSE and UNCODED not in config.get("quantization_config", {})
        return load_weights(self, input_path) if plain else mapped_model(Path(input_path))

    def packed(self: Any, layer_id: int, moe: Any) -> None:
        experts.make(self, layer_id, moe.experts.stored)
        names, count = self.make_moe_expert_names(layer_id), self.moe_attrs["num_experts"]
        for name, width in (("gate_up_bias", 2 * self.moe_intermediate_size), ("down_bias", self.hidden_size)):
            self.make_initializer(torch.zeros(count, width), names[name], to=self.io_dtype)

    def quantized(self: Any) -> Any:
        return quantize_matrices(self, to_nbits, work)

    return {
        "make_initializer": make,
        "load_weights": loaded,
        "make_interleaved_swiglu_moe_preprocessing": packed,
        "to_nbits": quantized,
    }


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
        small = not isinstance(tensor, torch.Tensor) or tensor.nbytes < SMALLEST
        if small or _is_mapped(tensor.data_ptr()):
            return tensor
        return mapped(self._file(), tuple(tensor.shape), dtype=tensor.dtype).copy_(tensor.detach())

    def move(self, value: Any) -> None:
        """Put the bytes of an initializer into a file, unless they come from one or are made when saved."""
        tensor = value.const_value
        made_later = tensor is None or isinstance(tensor, ir.LazyTensor | ir.ExternalTensor)
        if made_later or tensor.nbytes < SMALLEST:
            return
        raw = getattr(tensor, "raw", None)
        if isinstance(raw, torch.Tensor) and _is_mapped(raw.data_ptr()):
            return
        path = self._file()
        with path.open("wb") as file:
            tensor.tofile(file)
        value.const_value = external(tensor, path, tensor.shape)


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
