"""Checks of an artifact that sees: its encoder, its preparation of pictures, and what they do to its answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_onnx.artifact.genai_config import GENAI_CONFIG, GenaiConfig
from qwen_onnx.artifact.processor_config import ImageSettings
from qwen_onnx.catalog.schema import Verification
from qwen_onnx.errors import VerificationError
from qwen_onnx.records import Verdict
from qwen_onnx.runtime.engines.batch.model import EMBEDDED, BatchModel
from qwen_onnx.runtime.engines.batch.sight import Looked, Sight, Table
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.media import Picture, places_of, positions_of
from qwen_onnx.runtime.processing.template import ChatTemplate
from qwen_onnx.sources.checkpoint import read_json
from qwen_onnx.sources.vision_config import PREPROCESSOR, QWEN3_VL
from qwen_onnx.sources.vision_config import Tower as Form
from qwen_onnx.verify import drawn
from qwen_onnx.verify.checks import check
from qwen_onnx.verify.context import Context
from qwen_onnx.verify.records import CheckResult, worst
from qwen_onnx.verify.results import certain
from qwen_onnx.verify.scoring import OnnxScorer, Positions, compare
from qwen_onnx.verify.softmax import Logits
from qwen_onnx.verify.statistics import at_least, at_most

if TYPE_CHECKING:
    from qwen_onnx.verify.teacher import Teacher
    from qwen_onnx.verify.tower import Tower

# made of artifacts that see alone
VISUAL = frozenset({"processing", "vision", "sight_parity", "sight"})
RUN = frozenset({Verification.RUN})
# fp32 on both sides: the order of additions is all that differs
ENCODER_DIFF, ENCODER_COSINE = 2e-3, 0.99999
PATCH_DIFF = 1e-5
PIECE = 64
SEVERAL = "several"
WORDS = "The picture shows several things. From left to right they differ in colour, in size and in what they mean."


def sees(artifact: Path) -> bool:
    """Whether an artifact has an encoder; one whose configuration cannot be read has none that other checks miss."""
    if not (artifact / GENAI_CONFIG).exists():
        return False
    try:
        return GenaiConfig.read(artifact, VerificationError).model.vision is not None
    except VerificationError:
        return False


def _prepared(artifact: Path) -> dict[str, Picture]:
    from qwen_onnx.runtime.processing.images import prepare

    settings = ImageSettings.read(artifact)
    return {kind: prepare(image, settings, where=kind) for kind, image in drawn.pictures().items()}


@check("processing", RUN)
def processing_parity(context: Context) -> CheckResult:
    """Patches and grids are those of transformers' slow processor with the checkpoint's own settings."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    told = read_json(context.checkpoint / PREPROCESSOR)
    processor = Qwen2VLImageProcessorPil(**{name: told[name] for name in told if not name.endswith("_type")})
    worst_diff, grids = 0.0, 0
    images = drawn.pictures()
    for kind, picture in _prepared(context.artifact).items():
        wanted = processor(images=[images[kind]], return_tensors="np")
        if wanted["image_grid_thw"].tolist() != [list(picture.grid)]:
            grids += 1
            continue
        worst_diff = max(worst_diff, float(np.abs(wanted["pixel_values"] - picture.pixels).max()))
    verdict = Verdict.FAIL if grids else at_most(certain(worst_diff), PATCH_DIFF)
    return CheckResult(
        name="processing",
        verdict=verdict,
        measured={"pictures": len(images), "max_diff": worst_diff, "other_grids": grids},
        limit={"max_diff": PATCH_DIFF, "other_grids": 0},
    )


@check("vision", RUN)
def encoder_parity(context: Context) -> CheckResult:
    """The encoder gives the features that PyTorch's tower gives in fp32."""
    sight, tower = Sight(context.artifact, context.options.threads), context.tower
    diffs, cosines, pictures = [], [], _prepared(context.artifact)
    for picture in pictures.values():
        both = tower.features(picture), sight.encode(picture)
        if both[0].shape != both[1].shape:
            detail = f"the encoder gives {list(both[1].shape)}, PyTorch {list(both[0].shape)}"
            return CheckResult(name="vision", verdict=Verdict.FAIL, detail=detail)
        # what DeepStack adds has deviations of its own
        parts = (np.split(side, 1 + len(tower.form.deepstack), axis=-1) for side in both)
        for wanted, found in zip(*parts, strict=True):
            diffs.append(float(np.abs(found - wanted).max() / wanted.std()))
            norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(wanted, axis=-1)
            cosines.append(float(((found * wanted).sum(-1) / np.maximum(norms, 1e-30)).min()))
    verdicts = [at_most(certain(max(diffs)), ENCODER_DIFF), at_least(certain(min(cosines)), ENCODER_COSINE)]
    return CheckResult(
        name="vision",
        verdict=worst(verdicts),
        measured={"pictures": len(pictures), "max_diff": max(diffs), "cosine": min(cosines)},
        limit={"max_diff": ENCODER_DIFF, "cosine": ENCODER_COSINE},
        detail="differences in deviations of the features",
    )


@check("sight_parity", RUN)
def graph_parity_with_pictures(context: Context) -> CheckResult:
    """With a picture's features the graph computes what PyTorch computes with the same matrices, both in fp32.

    Where pictures stand and what each layer gets of them is then right whatever the quantisation costs.
    """
    limits, graph = context.limits, context.graph
    limit: dict[str, float | str] = {"max_diff": limits.fp32_max_diff, "kld_mean": limits.fp32_kld}
    if graph is None:
        detail = "another engine runs the artifact"
        return CheckResult(name="sight_parity", verdict=Verdict.INCONCLUSIVE, limit=limit, detail=detail)
    from qwen_onnx.verify.teacher import student_of

    token, threads = _token(context), context.options.threads
    ids, pictures = _prompts(context)[SEVERAL]
    # one copy of the weights at a time
    context.release()
    wanted = teacher_logits(student_of(context.checkpoint, graph, threads), context.tower, ids, pictures, token)
    features = np.concatenate([context.tower.features(picture) for picture in pictures])
    positions, _ = positions_of(len(ids), pictures, places_of(ids, pictures, token))
    given: dict[str, np.ndarray[Any, Any]] = {
        EMBEDDED: Table(context.artifact, threads).embed(np.array([ids]), features),
        "position_ids": positions[:, None],
    }
    exact = OnnxScorer(context.artifact, threads, in_float32=True)
    found = compare(wanted, exact.logits(ids, given), ids, threads)
    diff, kld = float(found.diff.max()), float(found.kld.mean())
    verdicts = [at_most(certain(diff), limits.fp32_max_diff), at_most(certain(kld), limits.fp32_kld)]
    measured: dict[str, float | str] = {"max_diff": diff, "kld_mean": kld, "positions": len(found.kld)}
    return CheckResult(name="sight_parity", verdict=worst(verdicts), measured=measured, limit=limit)


@check("sight", RUN)
def drift_with_pictures(context: Context) -> CheckResult:
    """Teacher-forced on conversations with pictures, the artifact predicts what PyTorch predicts."""
    limits = context.limits
    token, prompts, teacher = _token(context), _prompts(context), context.teacher.teacher
    wanted = [teacher_logits(teacher, context.tower, ids, pictures, token) for ids, pictures in prompts.values()]
    # one copy of the weights at a time
    context.release()
    model = BatchModel(
        context.artifact,
        rows=1,
        capacity=max(len(ids) for ids, _ in prompts.values()) + 1,
        threads=context.options.threads,
    )
    parts = []
    for (ids, pictures), expected in zip(prompts.values(), wanted, strict=True):
        found = compare(expected, student_logits(model, ids, pictures), ids, context.options.threads)
        # nobody predicts a part of a picture
        spoken = np.array(ids[1:]) != token
        parts.append(Positions(*(column[spoken] for column in vars(found).values())))
    every = Positions.join(parts)
    kinds = {f"kld_{kind}": float(part.kld.mean()) for kind, part in zip(prompts, parts, strict=True)}
    kld, top1 = float(every.kld.mean()), float(every.agree.mean())
    verdicts = [at_most(certain(kld), limits.kld_mean), at_least(certain(top1), limits.top1)]
    verdicts += [at_most(certain(value), limits.kld_mean * limits.domain_factor) for value in kinds.values()]
    return CheckResult(
        name="sight",
        verdict=worst(verdicts),
        measured={"kld_mean": kld, "top1": top1, "positions": len(every.kld), **kinds},
        limit={"kld_mean": limits.kld_mean, "top1": limits.top1},
    )


def _token(context: Context) -> int | None:
    """What stands for a part of a picture."""
    return GenaiConfig.read(context.artifact, VerificationError).model.image_token_id


def _prompts(context: Context) -> dict[str, tuple[list[int], tuple[Picture, ...]]]:
    """By kind of picture: a conversation about it, its last turn about all of them."""
    from qwen_onnx.runtime.service.generation import Attached
    from qwen_onnx.runtime.service.senses import sense_of

    eyes = sense_of(context.artifact)
    if eyes is None:
        raise VerificationError("the artifact reads no pictures", where=str(context.artifact))
    template, images = ChatTemplate(context.artifact), drawn.pictures()
    chosen = {**{kind: [kind] for kind in images}, SEVERAL: list(images)[:2]}
    context_length = GenaiConfig.read(context.artifact, VerificationError).model.context_length
    found = {}
    try:
        for name, kinds in chosen.items():
            content = [*({"type": "image"} for _ in kinds), {"type": "text", "text": "What does this show?"}]
            messages: list[dict[str, Any]] = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": WORDS},
            ]
            ids = template.encode(messages, context.tokenizer, context_length)
            attached = [Attached(_file(images[kind]), kind) for kind in kinds]
            found[name] = eyes.take(ids, attached, context_length)
    finally:
        template.close()
    return found


def _file(image: Any) -> bytes:
    import io

    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def student_logits(model: BatchModel, ids: Sequence[int], pictures: Sequence[Picture]) -> Logits:
    """Of the artifact as it is served, piece by piece, [tokens, vocabulary]."""
    looked = Looked(TokenRequest(tuple(ids), 1, media=tuple(pictures)), model.sense)
    found = []
    for begin in range(0, len(ids), PIECE):
        end = min(begin + PIECE, len(ids))
        positions, features = looked.positions(begin, end), looked.features(begin, end)
        piece = np.array(ids[begin:end], np.int64)
        found.append(model.every_position(0, piece, begin, positions=positions, features=features).copy())
    return np.concatenate(found)


def teacher_logits(
    teacher: Teacher, tower: Tower, ids: Sequence[int], pictures: Sequence[Picture], token: int | None
) -> Logits:
    """Of the checkpoint, layer by layer in fp32, [tokens, vocabulary], with positions on three axes and DeepStack."""
    import torch

    from qwen_onnx.export.skeleton import call
    from qwen_onnx.verify.matrices import linear

    form = tower.form
    positions, _ = positions_of(len(ids), pictures, places_of(ids, pictures, token))
    with torch.inference_mode():
        state = teacher.embed(torch.tensor([list(ids)])).clone()
        features = torch.tensor(np.concatenate([tower.features(picture) for picture in pictures]))
        shown, *stacked = features.chunk(1 + len(form.deepstack), dim=-1)
        places = torch.tensor(list(ids)) == token
        state[0, places] = shown
        arguments = teacher.arguments(state)
        angles = torch.tensor(positions)[:, :, None].float() * teacher.model.model.rotary_emb.inv_freq
        mixed = _mixed(angles, form)
        turned = torch.cat([mixed, mixed], dim=-1)[None]
        for index in range(teacher.count):
            with teacher.layer(index) as layer:
                given = {**arguments[index], "position_embeddings": (turned.cos(), turned.sin())}
                state = call(layer, state, given)
            if index < len(stacked):
                state[0, places] += stacked[index]
        with teacher.norm() as norm:
            state = norm(state)
        found: Logits = linear(state[0], teacher.head()).numpy()
    return found


def _mixed(angles: Any, form: Form) -> Any:
    """Angles [tokens, dimensions] of those on each axis, [3, tokens, dimensions]: in turns, or one behind another."""
    import torch

    if form.architecture != QWEN3_VL:
        return torch.cat([part[axis] for axis, part in enumerate(angles.split(form.sections, dim=-1))], dim=-1)
    mixed = angles[0].clone()
    for axis in (1, 2):
        turns = slice(axis, 3 * form.sections[axis], 3)
        mixed[:, turns] = angles[axis][:, turns]
    return mixed
