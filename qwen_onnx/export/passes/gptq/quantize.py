"""Our Olive pass ``CalibratedGptq``: mixed int4/int8 by sensitivity, GPTQ on calibration text.

Olive's own Gptq knows one precision per run of overrides, min-max grids, and needs a data set of the hub. The
result is a checkpoint in Olive's format, which genai's builder reads.

One decoder layer is in memory at a time. Each finished layer is a file of its own in a work folder, and a build that
was killed goes on behind the last of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from qwen_onnx.export.calibration import calibration_ids, own_text
from qwen_onnx.export.olive_format import assemble, require_blocks, work_folder
from qwen_onnx.export.options import chosen, parameters
from qwen_onnx.export.passes.gptq.blocks import HEAD_MATRIX, choose_blocks
from qwen_onnx.export.passes.gptq.options import BATCH, FLOAT_BITS, CalibratedGptqOptions
from qwen_onnx.export.passes.gptq.sensitivity import LEADER, choose_int8, named_as
from qwen_onnx.export.passes.gptq.solver import Quantized, gptq, round_to_nearest
from qwen_onnx.export.progress import Steps
from qwen_onnx.export.skeleton import EMBEDDING, HEAD, NORM, Skeleton, call
from qwen_onnx.export.weights import (
    Scratch,
    create_safetensors,
    mapped,
    reopened,
    row_pieces,
    write_safetensors,
)
from qwen_onnx.export.workfolder import KEPT_FOLDER, WorkFolder
from qwen_onnx.processes.memory import return_free_memory
from qwen_onnx.records import digest_of
from qwen_onnx.sources.checkpoint import read_json


class CalibratedGptq(Pass):  # type: ignore[misc]
    """Quantise the matrices of a Qwen checkpoint."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return parameters(CalibratedGptqOptions)

    def _run_for_config(self, model: HfModelHandler, config: BasePassConfig, output_model_path: str) -> HfModelHandler:
        settings, output = chosen(CalibratedGptqOptions, config), Path(output_model_path)
        kept = Path(KEPT_FOLDER)
        quantize(Path(model.model_name_or_path), output, settings, kept.resolve() if kept.exists() else None)
        return HfModelHandler(output_model_path)


def quantize(checkpoint: Path, output: Path, config: CalibratedGptqOptions, kept: Path | None = None) -> None:
    """Write a quantised copy of ``checkpoint`` in Olive's format to ``output``.

    Args:
        checkpoint: Hugging Face folder; its safetensors may be sharded.
        output: gets one safetensors file per layer and an index.
        kept: folder for finished layers, which the same call finds again; None keeps nothing.

    Raises:
        ExportError: a matrix does not divide into blocks, a weight is missing, or a kept file was altered.
    """
    from transformers import PreTrainedTokenizerFast

    with work_folder(kept, output) as folder:
        skeleton = Skeleton(checkpoint, Scratch(folder / "scratch"))
        require_blocks(skeleton, config.group_size)
        # not AutoTokenizer: transformers 5 rebuilds a Qwen2 tokenizer and then splits otherwise than tokenizer.json
        tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint, trust_remote_code=False)
        own = own_text(config.calibration)
        ids = torch.tensor(calibration_ids(tokenizer, config.windows, config.window, config.seed, own))
        return_free_memory()
        settings = read_json(checkpoint / "config.json")
        identity = digest_of([config.model_dump(mode="json"), settings, ids.tolist(), skeleton.weights.fingerprint()])
        work = WorkFolder(folder, identity)
        sampled = ids[: config.sensitivity_windows]
        precise = choose_int8(skeleton, sampled, config, work)
        blocks = choose_blocks(skeleton, sampled, config, work)
        quantize_layers(skeleton, ids, precise, blocks, config, work)
        quantize_head(skeleton, config, blocks.get(HEAD_MATRIX, config.group_size), work)
        _assemble(skeleton, work, checkpoint, output, config)


@torch.no_grad()
def quantize_layers(
    skeleton: Skeleton,
    ids: torch.Tensor,
    precise: set[str],
    blocks: Mapping[str, int],
    config: CalibratedGptqOptions,
    work: WorkFolder,
) -> None:
    """GPTQ layer by layer; each layer sees the inputs that the quantised layers before it produce.

    Leaves ``layer-<index>.safetensors`` in the work folder, and the hidden states behind the last layer.

    Args:
        ids: [windows, tokens].
        precise: names of the matrices with 8 bits.
        blocks: of matrices that have another than ``config.group_size``.
    """
    # whole batches only: all share the masks and positions of one
    batch = min(BATCH, len(ids))
    batches = max(len(ids) // BATCH, 1)
    shape = (batches, batch, ids.shape[1], skeleton.config.hidden_size)
    ready = sum(work.finished(_step(index)) is not None for index in range(skeleton.count))
    if ready == skeleton.count:
        return
    if not ready and work.finished("embedded") is None:
        first = mapped(work.temporary(_states(0)), shape)
        for number in range(batches):
            first[number] = skeleton.embed(ids[number * batch : (number + 1) * batch])
        work.commit("embedded", [_states(0)])
    arguments = skeleton.arguments(skeleton.embed(ids[:batch]))
    steps = Steps("quantised layer", skeleton.count)
    for index in range(skeleton.count):
        if work.finished(_step(index)) is not None:
            continue
        before = "embedded" if index == 0 else _step(index - 1)
        states = reopened(work.required(before, _states(index)), shape)
        _Layer(skeleton, index, arguments[index], config, work).quantize(states, precise, blocks)
        work.release(before, _states(index))
        steps.step(index + 1)


def _step(index: int) -> str:
    return f"layer-{index:04d}"


def _states(index: int) -> str:
    return f"states-{index:04d}"


@dataclass(frozen=True)
class _Layer:
    skeleton: Skeleton
    index: int
    arguments: dict[str, Any]
    config: CalibratedGptqOptions
    work: WorkFolder

    def quantize(self, states: torch.Tensor, precise: set[str], blocks: Mapping[str, int]) -> None:
        """Quantise the layer on ``states`` [batches, windows, tokens, hidden] and commit it with its outputs."""
        name, after = f"{_step(self.index)}.safetensors", _states(self.index + 1)
        prefix = f"model.layers.{self.index}"
        with self.skeleton.layer(self.index) as layer:
            hessians = self._hessians(layer, states)
            tensors = {f"{prefix}.{key}": value for key, value in layer.state_dict().items()}
            forms: dict[str, dict[str, int]] = {}
            for matrix, module in self.skeleton.linears(self.index).items():
                full = f"{prefix}.{matrix}"
                bits, block = 8 if full in precise else self.config.bits, blocks.get(full, self.config.group_size)
                forms[full] = {"bits": bits, "group_size": block}
                hessian = hessians[named_as(matrix, LEADER)]
                found = gptq(module.weight, hessian, bits, block, self.config.damp, self.config.symmetric)
                del tensors[f"{full}.weight"]
                tensors |= {f"{full}.{part}": value for part, value in _parts(found, self.config).items()}
                module.weight.copy_(found.dequantize())
            write_safetensors(self.work.temporary(name), tensors)
            outputs = mapped(self.work.temporary(after), tuple(states.shape))
            for number, state in enumerate(states):
                outputs[number] = call(layer, state, self.arguments)
        self.work.commit(_step(self.index), [name, after], {"forms": forms})

    def _hessians(self, layer: torch.nn.Module, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sum of x·xᵀ over all tokens, by the matrix that leads those with the same input x."""
        sums: dict[str, torch.Tensor] = {}

        def accumulate(name: str) -> Any:
            def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                x = inputs[0].reshape(-1, inputs[0].shape[-1])
                sums[name] += x.T @ x

            return hook

        modules = self.skeleton.linears(self.index)
        leaders = {name: module for name, module in modules.items() if named_as(name, LEADER) == name}
        hooks = []
        for name, module in leaders.items():
            sums[name] = self.skeleton.scratch.zeros(f"hessian.{name}", (module.in_features,) * 2)
            hooks.append(module.register_forward_pre_hook(accumulate(name)))
        for state in states:
            call(layer, state, self.arguments)
        for hook in hooks:
            hook.remove()
        return sums


@torch.no_grad()
def quantize_head(skeleton: Skeleton, config: CalibratedGptqOptions, block: int, work: WorkFolder) -> None:
    """Round the head to its grid by rows, unless it stays float, and copy what is outside of the layers."""
    if work.finished("outer") is not None:
        return
    weights, name = skeleton.weights, "outer.safetensors"
    head = weights.tensor(skeleton.head_name)
    copied = [EMBEDDING, *weights.names(f"{NORM}.")]
    quantized = config.head_bits < FLOAT_BITS
    if not quantized and skeleton.head_name == HEAD:
        copied.append(HEAD)
    layout = {key: (torch.float32, tuple(weights.tensor(key).shape)) for key in copied}
    for part, row in _head_rows(head[:1], block, config).items() if quantized else ():
        layout[f"lm_head.{part}"] = (row.dtype, (head.shape[0], row.shape[1]))
    file = create_safetensors(work.temporary(name), layout)
    for key in copied:
        file[key].copy_(weights.tensor(key))
    for piece in row_pieces(*head.shape) if quantized else ():
        for part, rows in _head_rows(head[piece], block, config).items():
            file[f"lm_head.{part}"][piece] = rows
    form = {HEAD_MATRIX: {"bits": config.head_bits, "group_size": block}} if quantized else {}
    work.commit("outer", [name], {"forms": form})


def _head_rows(rows: torch.Tensor, block: int, config: CalibratedGptqOptions) -> dict[str, torch.Tensor]:
    return _parts(round_to_nearest(rows.float(), config.head_bits, block, config.symmetric), config)


def _parts(matrix: Quantized, config: CalibratedGptqOptions) -> dict[str, torch.Tensor]:
    """The tensors of a matrix in Olive's format: without zero points every one is the middle of the grid."""
    return {part: value for part, value in matrix.packed().items() if part != "qzeros" or not config.symmetric}


def _assemble(
    skeleton: Skeleton, work: WorkFolder, checkpoint: Path, output: Path, config: CalibratedGptqOptions
) -> None:
    steps = ["outer", *(_step(index) for index in range(skeleton.count))]
    usual = {"bits": config.bits, "group_size": config.group_size}
    forms = {name: form for step in steps for name, form in (work.finished(step) or {})["forms"].items()}
    overrides = {
        name: {key: value for key, value in form.items() if value != usual[key]}
        for name, form in forms.items()
        if form != usual
    }
    assemble(
        [work.required(step, f"{step}.safetensors") for step in steps],
        checkpoint,
        output,
        {
            **usual,
            "symmetric": config.symmetric,
            "lm_head": HEAD_MATRIX in forms,
            "overrides": overrides,
        },
    )
