"""onnxruntime-genai of the drop-in era: load, count, generate. Runs inside its environment.

foundry-local-sdk 1.2.4 itself is not asked: it lists no model, not even a local one, without Microsoft's catalog.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from typing import Any

from qwen_onnx.package.sdk.job import Job, Phase, StepError, compared

PHASE_NAMES = ("use",)
ANSWER = 8
VERSIONS = ("onnxruntime", "onnxruntime-genai")


def use(job: Job, step: Callable[[str], Any]) -> None:
    """What the older Foundry Local does with a folder."""
    import onnxruntime_genai as og

    with step("start") as notes:
        notes += [f"{name} {metadata.version(name)}" for name in VERSIONS]
    with step("load"):
        model = og.Model(job.folder)
        tokenizer = og.Tokenizer(model)
    prompts = []
    with step("count tokens") as notes:
        for prompt in job.prompts:
            text = tokenizer.apply_chat_template(json.dumps(prompt["messages"]), add_generation_prompt=True)
            prompts.append(tokenizer.encode(text))
        notes.append(compared(job, list(map(len, prompts))))
    with step("generate") as notes:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompts[0]) + ANSWER, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(prompts[0])
        count = 0
        while not generator.is_done() and count < ANSWER:
            generator.generate_next_token()
            count += 1
        if count == 0:
            raise StepError("the answer has no tokens")
        notes.append(f"{len(prompts[0])} + {count} tokens")


PHASES: dict[str, Phase] = {"use": use}
