"""What a training takes: memory from the model's sizes, time from how fast this machine multiplies."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qwen_onnx.catalog.costs import Dimensions
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.catalog.sizes import dimensions, shape_of
from qwen_onnx.catalog.training import Training
from qwen_onnx.errors import EnvironmentFault
from qwen_onnx.finetune.encode import IGNORED, Encoded, Rows
from qwen_onnx.processes import memory
from qwen_onnx.sources.checkpoint import read_json

LESS = "close programs, or --set gradient_checkpointing=true, --set window=…, --set batch=1"
# Python with torch, transformers, peft and trl
PROCESS_BYTES = 750_000_000
# floats of a token that a layer keeps for the way back: of its hidden state, and of its inner one
KEPT_HIDDEN, KEPT_INNER = 20, 4
# of a number that is trained: itself, its gradient, two moments of Adam
TRAINED_BYTES = 16
# logits of the answers' tokens: made in pieces of so many, each kept three times; of retained rows' five times, since
# the base's are there, too
LOGITS_PIECE, LOGITS_COPIES, RETAINED_COPIES = 256, 3, 5
# what a training reaches of the speed of one large product
EFFICIENCY = 0.55
# seconds of measuring; rows of the product
MEASURED, ROWS = 0.4, 512


@dataclass(frozen=True)
class Cost:
    """What a training takes.

    Attributes:
        examples: rows to learn from; ``held_out``, those that it is judged by.
        tokens: of one epoch's examples; ``answers``, those that count in the loss; ``retained``, of rows read beside.
        steps: at most, when no early stop comes.
        trained: numbers in A and B.
        memory: bytes at the peak, on ``device``.
        seconds: at most, as this machine multiplies now.
    """

    examples: int
    held_out: int
    tokens: int
    answers: int
    retained: int
    steps: int
    trained: int
    memory: int
    device: str
    seconds: float

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))


def duration(seconds: float) -> str:
    """For people: in seconds, or in minutes where it is some of them."""
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def cost(
    plan: Plan,
    checkpoint: Path,
    rows: Rows,
    training: Training,
    device: str,
    in_bf16: bool,
    *,
    tables_apart: bool = False,
) -> Cost:
    """The cost of a training on the machine that this runs on.

    Args:
        tables_apart: a head that shares the embedding's weights gets its own.
    """
    sizes = dimensions(plan, checkpoint)
    if tables_apart:
        sizes = replace(sizes, tied=False)
    tokens, answers = _tokens(rows.learnt), sum(map(_answers, rows.learnt))
    packed = -(-tokens // training.window) if training.packing else len(rows.learnt)
    a_step = training.batch * training.accumulate
    trained = trained_numbers(read_json(checkpoint / "config.json"), training)
    longest = training.window if training.packing else max(len(row.ids) for row in rows.learnt)
    read = training.epochs * (tokens + _tokens(rows.held_out) / 2)
    # forwards and back through every matrix whose weights stay; once more where activations are made again
    passes = 3 if training.gradient_checkpointing else 2
    work = 2 * passes * read * (sizes.body + sizes.tables * answers / tokens) + 6 * read * trained
    # with each batch one of retained rows, which the base reads, too, and whose every token counts
    retained = min(_tokens(rows.retained), training.batch * training.window) if rows.retained else 0
    held = training.epochs * (-(-packed // training.batch) * retained + _tokens(rows.retained_out) / 2)
    work += 2 * (passes + 1) * held * (sizes.body + sizes.tables) + 6 * held * trained
    return Cost(
        examples=len(rows.learnt),
        held_out=len(rows.held_out),
        tokens=tokens,
        answers=answers,
        retained=-(-packed // training.batch) * retained,
        steps=training.epochs * -(-packed // a_step),
        trained=trained,
        memory=_memory(sizes, training, longest * training.batch, retained, trained, 2 if in_bf16 else 4),
        device=device,
        seconds=work / (_speed(device, in_bf16) * EFFICIENCY),
    )


def require_fit(cost: Cost, model: str) -> None:
    """EnvironmentFault when the memory that is free does not hold the training."""
    free = free_memory(cost.device)
    if cost.memory > free:
        raise EnvironmentFault(
            f"training {model} needs about {cost.memory / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free "
            f"({cost.device})",
            where=f"qwen-onnx finetune {model} --dry-run",
            hint=LESS,
        )


def free_memory(device: str) -> int:
    """Bytes that a training may take."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    return memory.free_memory()


def trained_numbers(config: dict[str, Any], training: Training) -> int:
    """Numbers in A and B of every layer."""
    shape = shape_of(config)
    hidden, inner, heads = shape.hidden_size or 0, shape.intermediate_size or 0, shape.heads or 1
    head = shape.head_dim or hidden // heads
    wide, narrow = heads * head, (shape.kv_heads or heads) * head
    sides = {
        "q_proj": hidden + wide,
        "k_proj": hidden + narrow,
        "v_proj": hidden + narrow,
        "o_proj": wide + hidden,
        "gate_proj": hidden + inner,
        "up_proj": hidden + inner,
        "down_proj": inner + hidden,
    }
    return (shape.layers or 0) * training.rank * sum(sides[name] for name in training.targets)


def _tokens(rows: Sequence[Encoded]) -> int:
    return sum(len(row.ids) for row in rows)


def _answers(row: Encoded) -> int:
    return sum(label != IGNORED for label in row.labels)


def _memory(sizes: Dimensions, training: Training, learnt: int, retained: int, trained: int, number: int) -> int:
    """Bytes; ``learnt`` and ``retained`` are tokens of a batch, the one computed behind the other."""
    inner = sizes.layer // (3 * sizes.hidden)
    a_layer = KEPT_HIDDEN * sizes.hidden + KEPT_INNER * inner
    # made again on the way back: what goes into each layer, and one layer whole
    kept = sizes.layers * sizes.hidden + a_layer if training.gradient_checkpointing else sizes.layers * a_layer
    tokens = max(learnt, retained)
    copies = max(LOGITS_COPIES * min(learnt, LOGITS_PIECE), RETAINED_COPIES * min(retained, LOGITS_PIECE))
    logits = 4 * copies * sizes.vocabulary
    return PROCESS_BYTES + number * sizes.weights + TRAINED_BYTES * trained + 4 * tokens * kept + logits


def _speed(device: str, in_bf16: bool) -> float:
    """Operations per second in a product of ``ROWS`` rows."""
    import torch

    kind = torch.bfloat16 if in_bf16 else torch.float32
    a, b = torch.ones(ROWS, 1024, dtype=kind, device=device), torch.ones(1024, 1024, dtype=kind, device=device)

    def once() -> float:
        begin = time.perf_counter()
        # reading a number waits for the GPU
        float((a @ b)[0, 0])
        return time.perf_counter() - begin

    once()
    begin, times = time.perf_counter(), []
    while time.perf_counter() - begin < MEASURED:
        times.append(once())
    return 2 * ROWS * 1024 * 1024 / sorted(times)[len(times) // 2]
