"""A model in OpenVINO: its CPU plugin for logits, OpenVINO GenAI's continuous batching for tokens, with their defaults.

``python -m benchmarks.peers.openvino CHECKPOINT TARGET`` converts one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino

from benchmarks.peers.worker import Clock, Logits, Run, Score, Settings
from qwen_onnx.processes.children import die_with_parent

MODEL_FILE = "openvino_model.xml"
# optimum-intel's own size of a block is the first; a model whose rows it does not divide gets the next
BLOCKS = (128, 64, 32)


def scorer(settings: Settings) -> Score:
    """Logits of all positions, see ``worker``: activations and cache as the plugin rounds them by default."""
    core = openvino.Core()
    model = core.read_model(Path(settings.model) / MODEL_FILE)
    options = {"INFERENCE_NUM_THREADS": settings.threads}
    request = core.compile_model(model, "CPU", options).create_infer_request()

    def score(ids: Sequence[int]) -> Logits:
        request.reset_state()
        found = request.infer(
            {
                "input_ids": np.asarray([ids], np.int64),
                "attention_mask": np.ones((1, len(ids)), np.int64),
                "position_ids": np.arange(len(ids), dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        logits: Logits = np.array(found["logits"][0], np.float32)
        return logits

    return score


def runner(settings: Settings) -> Run:
    """Greedy tokens, all prompts handed in at once; an end of text does not end them."""
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    # what LLMPipeline takes for one request: prompts are not cut; a kept prefix would be a measurement of nothing
    scheduler.max_num_batched_tokens = settings.capacity * settings.streams
    scheduler.max_num_seqs, scheduler.enable_prefix_caching = settings.streams, False
    pipe = genai.ContinuousBatchingPipeline(
        settings.model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": settings.threads}
    )
    runs = 0

    def run(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[float]]:
        nonlocal runs
        config = genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        clock, handles = Clock(len(prompts)), []
        for ids in prompts:
            handles.append(pipe.add_request(runs, openvino.Tensor(np.asarray([ids], np.int64)), config))
            runs += 1
        while pipe.has_non_finished_requests():
            pipe.step()
            for stream, handle in enumerate(handles):
                if handle.can_read():
                    clock.arrived(stream, sum(len(out.generated_ids) for out in handle.read().values()))
        return clock.arrivals

    return run


def convert(checkpoint: Path, target: Path) -> None:
    """Write ``checkpoint`` with int4 weights by optimum-intel, as its command line does.

    Raises:
        ValueError: no size of a block divides its rows.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    rows = (config["hidden_size"], config["intermediate_size"])
    block = next((size for size in BLOCKS if not any(row % size for row in rows)), None)
    if block is None:
        raise ValueError(f"rows of {rows[0]} and {rows[1]} weights: no block of {BLOCKS} divides them")
    from optimum.commands.optimum_cli import main

    options = ["--task", "text-generation-with-past", "--weight-format", "int4", "--group-size", str(block)]
    sys.argv = ["optimum-cli", "export", "openvino", "--model", str(checkpoint), *options, str(target)]
    main()


if __name__ == "__main__":
    die_with_parent()
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
