"""What the checks of artifacts that see and of those that hear have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_onnx.artifact.genai_config import GENAI_CONFIG, GenaiConfig
from qwen_onnx.errors import TemplateError, VerificationError
from qwen_onnx.records import Verdict
from qwen_onnx.runtime.engines.batch.layout import UnsupportedGraphError
from qwen_onnx.runtime.engines.batch.model import EMBEDDED, BatchModel
from qwen_onnx.runtime.engines.batch.sight import Hearing, Looked, Sense, Sight, Table
from qwen_onnx.runtime.engines.batch.sight import sense_of as encoder_of
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.media import Medium, Picture, places_of, positions_of
from qwen_onnx.sources.vision_config import Tower as Form
from qwen_onnx.verify.context import Context
from qwen_onnx.verify.graph import Graph
from qwen_onnx.verify.records import CheckResult, worst
from qwen_onnx.verify.results import certain
from qwen_onnx.verify.scoring import OnnxScorer, Positions, compare
from qwen_onnx.verify.served import served_logits
from qwen_onnx.verify.softmax import Logits
from qwen_onnx.verify.statistics import at_least, at_most

if TYPE_CHECKING:
    from qwen_onnx.runtime.processing.template import ChatTemplate
    from qwen_onnx.runtime.service.senses import Sense as PreparedBy
    from qwen_onnx.verify.matrices import Matrix
    from qwen_onnx.verify.teacher import Teacher
    from qwen_onnx.verify.tower import Tower

# fp32 on both sides: the order of additions is all that differs
ENCODER_DIFF, ENCODER_COSINE = 2e-3, 0.99999
# ids with room for media, and these
Asked = tuple[list[int], tuple[Medium, ...]]


def model_of(artifact: Path) -> Any:
    """What ``genai_config.json`` says of the model; None: nothing that can be read, which other checks tell."""
    if not (artifact / GENAI_CONFIG).exists():
        return None
    try:
        return GenaiConfig.read(artifact, VerificationError).model
    except VerificationError:
        return None


def token_of(context: Context) -> int | None:
    """What stands for a part of a medium; None: the model reads text alone."""
    model = model_of(context.artifact)
    return model.medium_token if model else None


def asked_of(
    context: Context, turns: Mapping[str, Sequence[str]], files: Mapping[str, bytes | tuple[bytes, ...]], words: str
) -> dict[str, Asked]:
    """By name: a conversation about the media of these kinds, answered with ``words``; text where there is no template.

    Args:
        turns: kinds of media in each; files: by kind, of a video those of its frames.
    """
    from qwen_onnx.runtime.processing.template import ChatTemplate, has_template
    from qwen_onnx.runtime.service.senses import Eyes, sense_of

    sense = sense_of(context.artifact)
    if sense is None:
        raise VerificationError("the artifact reads text alone", where=str(context.artifact))
    question = "What does this show?" if isinstance(sense, Eyes) else "What do you hear?"
    template = ChatTemplate(context.artifact) if has_template(context.artifact) else None
    context_length = GenaiConfig.read(context.artifact, VerificationError).model.context_length
    found = {}
    try:
        for name, kinds in turns.items():
            media = [(kind, files[kind]) for kind in kinds]
            found[name] = _taken(context, sense, template, media, question, words, context_length)
    finally:
        if template is not None:
            template.close()
    return found


def _taken(
    context: Context,
    sense: PreparedBy,
    template: ChatTemplate | None,
    media: Sequence[tuple[str, bytes | tuple[bytes, ...]]],
    question: str,
    words: str,
    most: int,
) -> Asked:
    """See ``asked_of``: one of them, as the service prepares it."""
    from qwen_onnx.runtime.service.generation import Attached, AttachedVideo
    from qwen_onnx.runtime.service.senses import Eyes

    still = {"type": "image"} if isinstance(sense, Eyes) else {"type": "audio", "audio_url": ""}
    parts = [dict(still) if isinstance(content, bytes) else {"type": "video"} for _, content in media]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
        {"role": "assistant", "content": words},
    ]
    attached = [Attached(content, kind) for kind, content in media if isinstance(content, bytes)]
    videos = [AttachedVideo(content, kind) for kind, content in media if not isinstance(content, bytes)]
    clips = sense.open_videos(videos) if isinstance(sense, Eyes) else []
    special = context.tokenizer.special_tokens

    def change(rendered: str) -> str:
        return sense.announced(rendered, clips, special) if isinstance(sense, Eyes) else rendered

    if template is None:
        ids = [token_of(context) or 0] * len(media) + context.tokenizer.encode(f"{question} {words}")
    else:
        ids = template.encode(messages, context.tokenizer, most, change=change)
    if isinstance(sense, Eyes):
        return sense.take_all(ids, attached, clips, most)
    return sense.take(ids, attached, most)


def watches(context: Context) -> bool:
    """Whether an artifact takes videos: it says how, and its chat template has a place for one."""
    from qwen_onnx.runtime.processing.template import ChatTemplate, has_template
    from qwen_onnx.runtime.service.senses import Eyes, sense_of

    sense, model = sense_of(context.artifact), model_of(context.artifact)
    if not isinstance(sense, Eyes) or not sense.watches or not has_template(context.artifact):
        return False
    template = ChatTemplate(context.artifact)
    try:
        ids = template.encode([{"role": "user", "content": [{"type": "video"}]}], context.tokenizer, 1024)
        return ids.count(model.video_token_id) == 1
    except TemplateError:
        return False
    finally:
        template.close()


def encoder_parity(
    context: Context, name: str, kind: type[Sight | Hearing], media: Sequence[Medium], parts: int = 1
) -> CheckResult:
    """The encoder gives the features that PyTorch's tower gives in fp32; a row has ``parts`` of its own deviations.

    One whose matrices have fewer bits is compared to PyTorch with these, in fp32 arithmetic; ``cosine_to_own`` is what
    their rounding costs. What that and rounded activations do to answers is another check's.
    """
    from qwen_onnx.verify.tower import coded_matrices, tower_beside

    coded: dict[str, Matrix] = {}

    def exactly(file: Path) -> bytes | None:
        graph = Graph(file)
        coded.update(coded_matrices(graph))
        graph.at_level_one()
        return graph.serialized() if coded else None

    sense: Sense = kind(context.artifact, context.options.threads, rewritten=exactly)
    tower = tower_beside(context.checkpoint, coded) if coded else context.tower
    diffs, cosines, own, half = [], [], [], sense.kind is np.float16
    for medium in media:
        both = tower.features(medium), sense.encode(medium)
        if both[0].shape != both[1].shape:
            detail = f"the encoder gives {list(both[1].shape)}, PyTorch {list(both[0].shape)}"
            return CheckResult(name=name, verdict=Verdict.FAIL, detail=detail)
        for wanted, found in zip(*(np.split(side, parts, axis=-1) for side in both), strict=True):
            # of fp16 a place of its own is no difference
            apart = np.abs(found - wanted) - (np.spacing(np.abs(wanted).astype(sense.kind)) if half else 0)
            diffs.append(max(0.0, float(apart.max() / wanted.std())))
            cosines.append(_cosine(found, wanted))
        if coded:
            own.append(_cosine(both[0], context.tower.features(medium)))
    verdicts = [at_most(certain(max(diffs)), ENCODER_DIFF), at_least(certain(min(cosines)), ENCODER_COSINE)]
    measured: dict[str, float | str] = {"media": len(media), "max_diff": max(diffs), "cosine": min(cosines)}
    return CheckResult(
        name=name,
        verdict=worst(verdicts),
        measured=measured | ({"coded_matrices": len(coded), "cosine_to_own": min(own)} if coded else {}),
        limit={"max_diff": ENCODER_DIFF, "cosine": ENCODER_COSINE},
        detail="differences in deviations of the features",
    )


def _cosine(one: Logits, other: Logits) -> float:
    """Of the rows that are least alike."""
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return float(((one * other).sum(-1) / np.maximum(norms, 1e-30)).min())


def graph_parity(context: Context, name: str, asked: Asked) -> CheckResult:
    """With a medium's features the graph computes what PyTorch computes with the same matrices, both in fp32."""
    limits, graph = context.limits, context.graph
    limit: dict[str, float | str] = {"max_diff": limits.fp32_max_diff, "kld_mean": limits.fp32_kld}
    if graph is None:
        detail = "another engine runs the artifact"
        return CheckResult(name=name, verdict=Verdict.INCONCLUSIVE, limit=limit, detail=detail)
    from qwen_onnx.verify.teacher import student_of

    token, threads = token_of(context), context.options.threads
    ids, media = asked
    # one copy of the weights at a time
    context.release()
    table = Table(context.artifact, threads)
    student = student_of(context.checkpoint, graph, threads)
    wanted = teacher_logits(student, context.tower, ids, media, token, kind=table.kind)
    features = np.concatenate([context.tower.features(medium) for medium in media])
    given = given_of(table, ids, media, features, token)
    exact = OnnxScorer(context.artifact, threads, in_float32=True)
    found = compare(wanted, exact.logits(ids, given), ids, threads)
    diff, kld = float(found.diff.max()), float(found.kld.mean())
    verdicts = [at_most(certain(diff), limits.fp32_max_diff), at_most(certain(kld), limits.fp32_kld)]
    measured: dict[str, float | str] = {"max_diff": diff, "kld_mean": kld, "positions": len(found.kld)}
    return CheckResult(name=name, verdict=worst(verdicts), measured=measured, limit=limit)


def drift(context: Context, name: str, prompts: Mapping[str, Asked]) -> CheckResult:
    """Teacher-forced on conversations with media, the artifact predicts what PyTorch predicts."""
    limits = context.limits
    token, teacher = token_of(context), context.teacher.teacher
    wanted = [teacher_logits(teacher, context.tower, ids, media, token) for ids, media in prompts.values()]
    # one copy of the weights at a time
    context.release()
    student = _student(context, max(len(ids) for ids, _ in prompts.values()) + 1)
    parts = []
    for (ids, media), expected in zip(prompts.values(), wanted, strict=True):
        found = compare(expected, student(ids, media), ids, context.options.threads)
        # nobody predicts a part of a medium
        spoken = np.array(ids[1:]) != token
        parts.append(Positions(*(column[spoken] for column in vars(found).values())))
    every = Positions.join(parts)
    kinds = {f"kld_{kind}": float(part.kld.mean()) for kind, part in zip(prompts, parts, strict=True)}
    kld, top1 = float(every.kld.mean()), float(every.agree.mean())
    verdicts = [at_most(certain(kld), limits.kld_mean), at_least(certain(top1), limits.top1)]
    verdicts += [at_most(certain(value), limits.kld_mean * limits.domain_factor) for value in kinds.values()]
    return CheckResult(
        name=name,
        verdict=worst(verdicts),
        measured={"kld_mean": kld, "top1": top1, "positions": len(every.kld), **kinds},
        limit={"kld_mean": limits.kld_mean, "top1": limits.top1},
    )


def _student(context: Context, capacity: int) -> Callable[[Sequence[int], Sequence[Medium]], Logits]:
    """The artifact's logits about a prompt with media: as it is served, or in one run where states are no rows."""
    artifact, threads = context.artifact, context.options.threads
    try:
        return partial(student_logits, BatchModel(artifact, rows=1, capacity=capacity, threads=threads))
    except UnsupportedGraphError:
        scorer, sense = OnnxScorer(artifact, threads), encoder_of(artifact, threads)

    def whole(ids: Sequence[int], media: Sequence[Medium]) -> Logits:
        features = np.concatenate([sense.encode(medium) for medium in media])
        return scorer.logits(ids, given_of(sense, ids, media, features, sense.token))

    return whole


def given_of(
    table: Table, ids: Sequence[int], media: Sequence[Medium], features: Logits | None, token: int | None
) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs of the decoder for a whole prompt."""
    given: dict[str, np.ndarray[Any, Any]] = {EMBEDDED: table.embed(np.array([ids]), features)}
    if pictures := _pictures(media):
        given["position_ids"] = positions_of(len(ids), pictures, places_of(ids, media, token))[0][:, None]
    return given


def student_logits(model: BatchModel, ids: Sequence[int], media: Sequence[Medium]) -> Logits:
    """Of the artifact as it is served, piece by piece, [tokens, vocabulary]."""
    looked = Looked(TokenRequest(tuple(ids), 1, media=tuple(media)), model.sense)
    return served_logits(model, ids, looked=looked)


def teacher_logits(
    teacher: Teacher,
    tower: Tower,
    ids: Sequence[int],
    media: Sequence[Medium],
    token: int | None,
    kind: type[np.generic] = np.float32,
) -> Logits:
    """Of the checkpoint, layer by layer in fp32, [tokens, vocabulary]; pictures have three axes and DeepStack.

    Args:
        kind: that embeddings and features are rounded to before the first layer.
    """
    import torch

    from qwen_onnx.export.skeleton import call
    from qwen_onnx.verify.matrices import linear

    with torch.inference_mode():
        state = torch.tensor(teacher.embed(torch.tensor([list(ids)])).numpy().astype(kind)).float()
        encoded = np.concatenate([tower.features(medium) for medium in media])
        features = torch.tensor(encoded.astype(kind)).float()
        shown, *stacked = features.chunk(features.shape[-1] // state.shape[-1], dim=-1)
        places = torch.tensor(list(ids)) == token
        state[0, places] = shown
        arguments = teacher.arguments(state)
        turned: dict[str, Any] = {}
        if (pictures := _pictures(media)) and isinstance(tower.form, Form):
            positions, _ = positions_of(len(ids), pictures, places_of(ids, media, token))
            angles = torch.tensor(positions)[:, :, None].float() * teacher.model.model.rotary_emb.inv_freq
            mixed = _mixed(angles, tower.form)
            both = torch.cat([mixed, mixed], dim=-1)[None]
            turned = {"position_embeddings": (both.cos(), both.sin())}
        for index in range(teacher.count):
            with teacher.layer(index) as layer:
                state = call(layer, state, {**arguments[index], **turned})
            if index < len(stacked):
                state[0, places] += stacked[index]
        with teacher.norm() as norm:
            state = norm(state)
        found: Logits = linear(state[0], teacher.head()).numpy()
    return found


def _pictures(media: Sequence[Medium]) -> list[Picture]:
    return [medium for medium in media if isinstance(medium, Picture)]


def _mixed(angles: Any, form: Form) -> Any:
    """Angles [tokens, dimensions] of those on each axis, [3, tokens, dimensions]: in turns, or one behind another."""
    import torch

    if not form.style.interleaved:
        return torch.cat([part[axis] for axis, part in enumerate(angles.split(form.sections, dim=-1))], dim=-1)
    mixed = angles[0].clone()
    for axis in (1, 2):
        turns = slice(axis, 3 * form.sections[axis], 3)
        mixed[:, turns] = angles[axis][:, turns]
    return mixed
