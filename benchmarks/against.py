"""Does an adapter repair rounding? ``python -m benchmarks.against ARTIFACT CHECKPOINT --plain DIR --against DIR``.

Both adapters were trained on the first lines of ``benchmarks.faq`` with the same options, one of them by ``finetune
--against ARTIFACT``. Prints the loss of the exam's right answers in PyTorch, with the checkpoint's weights and with
those of the artifact, and the share of the exam's facts in the answers of the artifact itself; then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faq import Question, exam, prompt, recalled
from qwen_onnx.finetune.against import Against, open_against
from qwen_onnx.runtime import GenerationConfig, QwenService
from qwen_onnx.sources.adapter import open_adapter
from qwen_onnx.sources.slotted import convert_adapter
from qwen_onnx.verify.baseline import CheckpointTokenizer

WORDINGS = 3  # of each fact in the exam


def answer_loss(model: Any, truth: CheckpointTokenizer, questions: Sequence[Question]) -> float:
    """Of the right answers and their end, in nats per token."""
    import torch

    total = count = 0.0
    for asked in questions:
        begin = truth.render(prompt(asked.text), prompt=True)
        whole = truth.render([*prompt(asked.text), {"role": "assistant", "content": asked.answer}])
        ids, known = torch.tensor([truth.encode(whole)]), len(truth.encode(begin))
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, known - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, known:], reduction="sum"))
        count += ids.shape[1] - known
    return total / count


def loss_of(checkpoint: Path, adapter: Path, against: Against | None, questions: Sequence[Question]) -> float:
    """Of a checkpoint with an adapter in PyTorch fp32; its weights are those of ``against`` where that is given."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    if against:
        against.put_weights(model, checkpoint)
    return answer_loss(
        PeftModel.from_pretrained(model, str(adapter)).eval(), CheckpointTokenizer(checkpoint), questions
    )


def facts(artifact: Path, adapters: dict[str, Path], questions: Sequence[Question]) -> dict[str, float]:
    """The share of facts in the greedy answers of the artifact with each of the adapters in its slots."""

    def answer(service: QwenService, name: str, text: str) -> str:
        greedy = GenerationConfig(max_new_tokens=24, temperature=0, adapter=name)
        return service.generate(prompt(text), greedy).text

    with tempfile.TemporaryDirectory() as scratch:
        files = {name: Path(scratch) / f"{name}.safetensors" for name in adapters}
        for name, folder in adapters.items():
            convert_adapter(open_adapter(folder), artifact, files[name])
        with QwenService(artifact, adapters=files, context=512) as service:
            return {name: recalled(questions, partial(answer, service, name)) for name in adapters}


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--plain", type=Path, required=True, help="adapter that was trained without --against")
    parser.add_argument("--against", type=Path, required=True, help="adapter that was trained with it")
    parser.add_argument("--facts", type=int, default=40, help="how many of the facts they were trained on, the first")
    given = parser.parse_args()
    questions = exam()[: given.facts * WORDINGS]
    made = open_adapter(given.against).manifest
    if made is None or made.against is None:
        parser.error(f"{given.against} was not trained with --against")
    against = open_against(given.artifact, made.training)
    cases = (
        ("plain", "the checkpoint's", given.plain, None),
        ("plain", "the artifact's", given.plain, against),
        ("against", "the artifact's", given.against, against),
    )
    told = []
    for name, weights, adapter, rounded in cases:
        loss = loss_of(given.checkpoint, adapter, rounded, questions)
        print(f"{name:8} adapter, {weights} weights: {loss:.5f} nats per token of {len(questions)} answers", flush=True)
        told.append({"adapter": name, "weights": weights, "loss": loss})
    shares = facts(given.artifact, {"plain": given.plain, "against": given.against}, questions)
    for name, share in shares.items():
        print(f"{name:8} adapter, in the slots of the artifact: {share:.1%} of the facts")
    print(json.dumps({"questions": len(questions), "losses": told, "facts": shares}))


if __name__ == "__main__":
    main()
