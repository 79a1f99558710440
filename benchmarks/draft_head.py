"""What a head for multi-token prediction brings and costs: ``python -m benchmarks.draft_head FOLDER``.

No trained checkpoint is needed: FOLDER gets one with the sizes of a Qwen3.5 (0.8B unless told otherwise) and random
weights, of which no layer adds anything. So the next token follows from the last alone, a head that is told this token
is right, and noise in its first matrix makes it right less often; its kernels take as long as those of a trained one.
The decoder is rounded to nearest in int4. Two engines, one that guesses and one that does not, answer in turns (ABBA).

* ``ratio_N``: tokens per second with the head over without, for the N-th ``--noise``; ``tok_s_N``, ``plain_tok_s_N``.
* ``accepted_N``: of its guesses; ``guesses_N``: of each token of an answer.
* ``equal_N``: 1 when every answer was the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.figures import Figure, conclude
from benchmarks.speculation import Answered, answer, speed
from benchmarks.synthetic import write_tokenizer
from qwen_onnx.errors import run
from qwen_onnx.export.weights import create_safetensors
from qwen_onnx.runtime.engines.batch import BatchEngine
from qwen_onnx.runtime.engines.batch.ends import COMMON
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.sources.checkpoint import INDEX_FILE

SCALE = 0.02
CAPACITY = 1024
# what of a layer's weights says what it adds to the hidden states
ADDS = ("o_proj.weight", "out_proj.weight", "down_proj.weight")
HEAD = "mtp."


@dataclass(frozen=True)
class Size:
    """A Qwen3.5 by its dimensions; the defaults are those of 0.8B."""

    hidden: int = 1024
    intermediate: int = 3584
    layers: int = 24
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 256
    vocabulary: int = 248_320
    linear_heads: int = 16

    def config(self) -> Any:
        """transformers' configuration of it, its head apart from the embedding: else every token followed itself."""
        import transformers

        # a quarter of a head is turned, two by two, by three axes that are one for text
        pairs = self.head_dim // 8
        text = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "linear_num_key_heads": self.linear_heads,
            "linear_num_value_heads": self.linear_heads,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "mtp_num_hidden_layers": 1,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.25,
                "mrope_section": [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3],
                "mrope_interleaved": True,
            },
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        vision = {"depth": 1, "hidden_size": 64, "num_heads": 4, "intermediate_size": 64, "out_hidden_size": 64}
        return transformers.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=False)


def write_checkpoint(folder: Path, size: Size) -> None:
    """Write the decoder's weights, and a configuration that announces a head."""
    import transformers

    config = size.config()
    with torch.device("meta"):
        model = transformers.Qwen3_5ForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if ".visual." not in name}
    # of the tokens that can be guessed, which are most of a text
    _write(folder, "model.safetensors", shapes)["lm_head.weight"][COMMON:] = 0
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    write_tokenizer(folder)


def write_head(folder: Path, size: Size, noise: float) -> None:
    """Write the head's weights beside those of the decoder."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer

    text = size.config().get_text_config()
    text.layer_types = ["full_attention"]
    with torch.device("meta"):
        layer = Qwen3_5DecoderLayer(text, 0)
    shapes = {f"{HEAD}layers.0.{name}": tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    shapes |= {f"{HEAD}{name}.weight": (size.hidden,) for name in norms}
    shapes[f"{HEAD}fc.weight"] = (size.hidden, 2 * size.hidden)
    weights = _write(folder, "mtp.safetensors", shapes)
    drawn = torch.randn(size.hidden, size.hidden, generator=torch.Generator().manual_seed(1))
    weights[f"{HEAD}fc.weight"][:, : size.hidden] = torch.eye(size.hidden) + noise * drawn * size.hidden**-0.5
    weights[f"{HEAD}fc.weight"][:, size.hidden :] = 0


def _write(folder: Path, file: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random matrices, norms that scale nothing, listed in the checkpoint's index; see the module."""
    index = folder / INDEX_FILE
    listed = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed | dict.fromkeys(shapes, file)}))
    generator = torch.Generator().manual_seed(0)
    weights = create_safetensors(folder / file, {name: (torch.bfloat16, shape) for name, shape in shapes.items()})
    for name, weight in weights.items():
        if name.endswith(ADDS) or weight.dim() == 1:
            weight.zero_()
        else:
            weight.copy_(torch.randn(weight.shape, generator=generator) * SCALE)
    return weights


def build(folder: Path, size: Size, noises: Sequence[float], say: Callable[[str], None]) -> list[Path]:
    """An artifact for each noise, below ``folder``; one that is there is taken as it is."""
    from qwen_onnx.export.passes.draft_head.head import write_head as export_head
    from qwen_onnx.export.passes.genai_builder.build import build as export
    from qwen_onnx.export.passes.genai_builder.options import GenAIModelBuilderOptions

    checkpoint, decoder = folder / "checkpoint", folder / "decoder"
    if not decoder.exists():
        say("writing a random checkpoint and building its decoder")
        checkpoint.mkdir(parents=True, exist_ok=True)
        write_checkpoint(checkpoint, size)
        options = GenAIModelBuilderOptions(
            precision="int4", block_size=32, is_symmetric=False, accuracy_level=4, algo_config="rtn_last"
        )
        export(checkpoint, folder / ".decoder", options)
        (folder / ".decoder").rename(decoder)
    found = []
    for noise in noises:
        place = folder / f"noise-{noise:g}"
        found.append(place)
        if not place.exists():
            shutil.copytree(decoder, folder / ".head", dirs_exist_ok=True)
            write_head(checkpoint, size, noise)
            export_head(checkpoint, folder / ".head", 8)
            (folder / ".head").rename(place)
    return found


class Bench:
    """Two engines of one artifact."""

    def __init__(self, folder: Path, threads: int | None, new_tokens: int) -> None:
        self._new_tokens = new_tokens
        self._engines = {
            name: BatchEngine(folder, streams=1, capacity=CAPACITY, threads=threads, speculate=name)
            for name in ("auto", "off")
        }
        self.values: dict[str, list[float]] = defaultdict(list)

    def round(self, number: int) -> None:
        """One prompt by both."""
        told: dict[str, Answered] = {}
        ids = tuple(range(2 + number, 66 + number))
        before = self._engines["auto"].stats()
        for name in ("auto", "off") if number % 2 == 0 else ("off", "auto"):
            request = TokenRequest(ids, self._new_tokens, stop_on_eos=False, cache_scope=str(number))
            told[name] = answer(self._engines[name], request)
        after = self._engines["auto"].stats()
        drafted, right = after.drafted_tokens - before.drafted_tokens, after.accepted_tokens - before.accepted_tokens
        if number < 0:
            return
        fast, plain = speed([told["auto"]]), speed([told["off"]])
        found = {"ratio": fast / plain, "tok_s": fast, "plain_tok_s": plain, "guesses": drafted / self._new_tokens}
        found |= {"accepted": right / drafted} if drafted else {}
        found["equal"] = float(told["auto"].tokens == told["off"].tokens)
        for name, value in found.items():
            self.values[name].append(value)

    def close(self) -> None:
        """Free both."""
        for engine in self._engines.values():
            engine.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.draft_head", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="for what is built; found again by the next run")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.2, 9.0])
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=6, help="an even number takes each order as often")
    parser.add_argument("--threads", type=int, help="of onnxruntime")
    for name, value in vars(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    given = parser.parse_args(arguments)
    say = Console(stderr=True).print
    size = Size(**{name: getattr(given, name) for name in vars(Size())})
    figures: dict[str, Figure | None] = {}
    for place, artifact in enumerate(build(given.folder.resolve(), size, given.noise, say)):
        bench = Bench(artifact, given.threads, given.new_tokens)
        try:
            # the first teaches the engine what steps cost, and how often the head is right
            for number in range(-2, given.rounds):
                say(f"noise {given.noise[place]:g}, round {number + 1} of {given.rounds}")
                bench.round(number)
        finally:
            bench.close()
        figures |= {f"{name}_{place}": Figure.of(values) for name, values in sorted(bench.values.items())}
    head = {
        "size": vars(size),
        "noise": given.noise,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "threads": given.threads,
        "new_tokens": given.new_tokens,
        "rounds": given.rounds,
    }
    return conclude({"head": head, "figures": figures}, f"{given.folder.name}, {given.new_tokens} new tokens", [])


if __name__ == "__main__":
    run(main)
