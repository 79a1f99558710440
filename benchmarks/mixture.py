"""What calibration gives a mixture of experts: ``python -m benchmarks.mixture CHECKPOINT FOLDER``.

Makes a Qwen2-MoE of a dense checkpoint in Qwen2's form: some channels of each MLP become the shared expert, the
others experts that are copies dithered apart, behind a small random router. Builds it twice for the CPU, rounded by
genai's builder and quantised by ``FisherGptq`` into no more bytes, and measures how far each drifts from PyTorch.
Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.bnb4 import LIMITS, files_bytes
from qwen_onnx.export.passes.fisher_gptq.options import FisherGptqOptions
from qwen_onnx.export.passes.fisher_gptq.quantize import quantize
from qwen_onnx.export.passes.genai_builder.build import build
from qwen_onnx.export.passes.genai_builder.options import GenAIModelBuilderOptions
from qwen_onnx.export.passes.pack_weights.pack import pack
from qwen_onnx.export.weights import CheckpointWeights, write_safetensors
from qwen_onnx.sources.checkpoint import read_json
from qwen_onnx.verify import VerifyOptions, verify_artifact

# of an expert's weights, how far its copies are apart; of the router's
DITHER, ROUTER = 0.05, 0.05
# what the catalog built mixtures with before the quantiser saw them
ROUNDED = GenAIModelBuilderOptions(
    precision="int4", block_size=32, is_symmetric=False, accuracy_level=4, algo_config="k_quant_last"
)
CODED = GenAIModelBuilderOptions(precision="int4", is_symmetric=False, accuracy_level=4, algo_config="k_quant")


def upcycled(source: Path, target: Path, *, experts: int, inner: int, seed: int) -> None:
    """Write the mixture of ``source``, two experts to a token, each of ``inner`` channels."""
    random = torch.Generator().manual_seed(seed)
    weights, config = CheckpointWeights(source), read_json(source / "config.json")
    found: dict[str, torch.Tensor] = {}
    for name in weights.names():
        if ".mlp." not in name:
            found[name] = weights.tensor(name).float()
    for layer in range(config["num_hidden_layers"]):
        place = f"model.layers.{layer}.mlp"
        gate, up, down = (weights.tensor(f"{place}.{part}_proj.weight").float() for part in ("gate", "up", "down"))
        order = torch.randperm(len(gate), generator=random)
        routed, shared = order[:inner], order[inner:]
        # the gate of the shared expert halves what it gives
        found |= _parts(f"{place}.shared_expert", gate[shared], up[shared], 2 * down[:, shared])
        found[f"{place}.shared_expert_gate.weight"] = torch.zeros(1, gate.shape[1])
        found[f"{place}.gate.weight"] = ROUTER * torch.randn(experts, gate.shape[1], generator=random)
        for expert in range(experts):
            copies = [_dithered(part, random) for part in (gate[routed], up[routed], down[:, routed])]
            found |= _parts(f"{place}.experts.{expert}", *copies)
    target.mkdir(parents=True)
    write_safetensors(target / "model.safetensors", found)
    config |= {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": config["intermediate_size"] - inner,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            shutil.copyfile(path, target / path.name)


def _parts(place: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{place}.{name}_proj.weight": part for name, part in (("gate", gate), ("up", up), ("down", down))}


def _dithered(weight: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    return weight + DITHER * weight.std() * torch.randn(weight.shape, generator=random)


def measured(artifact: Path, checkpoint: Path, windows: int) -> dict[str, Any]:
    """Size and drift."""
    options = VerifyOptions(checks=("drift",), windows_per_domain=windows)
    drift = verify_artifact(artifact, checkpoint, None, LIMITS, options=options).drift
    if drift is None:
        raise SystemExit(f"{artifact}: the drift could not be measured")
    return {"bytes": files_bytes(artifact), "kld": drift.kld_mean.value, "top1": drift.top1.value}


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, help="new, for the mixture and both graphs")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--inner", type=int, default=384, help="channels of an expert, a multiple of 64")
    parser.add_argument("--windows", type=int, default=128, help="of calibration")
    parser.add_argument("--window", type=int, default=192, help="tokens of each")
    parser.add_argument("--refinements", type=int, default=3)
    parser.add_argument("--domain-windows", type=int, default=2, help="of evaluation, for each domain")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    mixture, rounded, coded = (asked.folder / name for name in ("mixture", "rounded", "coded"))
    upcycled(asked.checkpoint, mixture, experts=asked.experts, inner=asked.inner, seed=asked.seed)
    build(mixture, asked.folder / "float-scales", ROUNDED)
    # in the form in which it would be stored
    pack(asked.folder / "float-scales" / "model.onnx", rounded)
    options = FisherGptqOptions(
        max_bytes=files_bytes(rounded),
        windows=asked.windows,
        window=asked.window,
        refinements=asked.refinements,
        seed=asked.seed,
    )
    predicted = quantize(mixture, asked.folder / "quantised", options)
    build(asked.folder / "quantised", asked.folder / "unpacked", CODED)
    pack(asked.folder / "unpacked" / "model.onnx", coded)
    graphs = {"rounded": rounded, "coded": coded}
    found = {name: measured(path, mixture, asked.domain_windows) for name, path in graphs.items()}
    for name, figures in found.items():
        print(f"{name:8} {figures['bytes'] / 1e6:7.1f} MB  KLD {figures['kld']:.4f}  top-1 {figures['top1']:.3f}")
    print(json.dumps(found | {"predicted": predicted}))


if __name__ == "__main__":
    main()
