"""Training against an artifact: the base has its rounded weights, so that what is learnt can repair the rounding.

As in QLoRA (Dettmers et al. 2023, arXiv:2305.14314), but the rounded weights are those that are served.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_onnx.artifact.adapter_file import Host
from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.artifact.manifest import Manifest, open_runnable
from qwen_onnx.catalog.training import Training
from qwen_onnx.errors import TrainingError
from qwen_onnx.export.skeleton import EMBEDDING, HEAD
from qwen_onnx.export.weights import row_pieces
from qwen_onnx.sources.adapter import TrainedAgainst
from qwen_onnx.sources.slotted import host_of
from qwen_onnx.verify.graph import QUANTIZED, Graph
from qwen_onnx.verify.matrices import Matrix
from qwen_onnx.verify.teacher import student_of

WITHOUT = "leave --against out"


@dataclass(frozen=True)
class Against:
    """An artifact that adapters are trained against."""

    folder: Path
    manifest: Manifest
    host: Host

    @property
    def told(self) -> TrainedAgainst:
        """What the adapter's manifest says of it."""
        return TrainedAgainst(artifact=self.manifest.plan.name, graph=self.host.graph)

    def require_base(self, weights: str) -> None:
        """TrainingError unless it was built from the checkpoint whose weights have this digest."""
        if self.host.weights != weights:
            raise TrainingError(
                f"the artifact was built from other weights, with the digest {self.host.weights[:12]}; those that are "
                f"trained have {weights[:12]}",
                where=str(self.folder),
                hint=f"give --against an artifact of this model, or: qwen-onnx finetune {self.manifest.plan.asked}",
            )

    @property
    def parts_tables(self) -> bool:
        """Whether a head that shares the embedding's weights gets its own: only one of the two is rounded."""
        return not any(node.op_type == "GatherBlockQuantized" for node in self.graph().nodes)

    def graph(self) -> Graph:
        """Of the artifact, its weights mapped."""
        return Graph(self.folder / GenaiConfig.read(self.folder).graph_file)

    @torch.no_grad()
    def put_weights(self, model: Any, checkpoint: Path) -> None:
        """Give a transformers model of ``checkpoint`` the matrices of the artifact; what is not rounded stays.

        Raises:
            VerificationError: the graph is not that of the checkpoint's architecture.
            TrainingError: transformers gives its matrices other names than those of a model that reads text alone.
        """
        rounded = student_of(checkpoint, self.graph(), torch.get_num_threads()).replaced
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        if head.weight is table.weight and not _same(rounded.get(HEAD), rounded.get(EMBEDDING)):
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if strange := sorted(rounded.keys() - parameters.keys()):
            raise TrainingError(f"the model that is trained has no {strange[0]}", where=str(self.folder), hint=WITHOUT)
        for name, matrix in rounded.items():
            for piece in row_pieces(*matrix.shape):
                parameters[name][piece] = matrix.rows(piece)


def open_against(folder: Path, training: Training) -> Against:
    """The artifact in ``folder``, which an adapter of this training will fit.

    Raises:
        ArtifactError: it is missing or altered, or has no slots for adapters.
        TrainingError: its weights cannot be read back or are not rounded, or its slots take a lower rank.
    """
    manifest = open_runnable(folder).manifest
    plan = manifest.plan
    if GenaiConfig.read(folder).provider != "cpu":
        what = f"an artifact for {plan.target} takes no adapters, and its weights are in that device's form"
        raise TrainingError(
            what, where=str(folder), hint=f"qwen-onnx optimize {plan.asked} --adapter-rank {training.rank}"
        )
    against = Against(folder, manifest, host_of(folder, manifest))
    if not any(node.op_type in QUANTIZED for node in against.graph().nodes):
        what = f"{plan.name} holds no rounded weights that an adapter could repair"
        raise TrainingError(what, where=str(folder), hint=WITHOUT)
    if training.rank > against.host.slots.rank:
        raise TrainingError(
            f"the adapter's rank is {training.rank}, the artifact's slots take {against.host.slots.rank}",
            where=str(folder),
            hint=f"--set rank={against.host.slots.rank}",
        )
    return against


def _same(one: Matrix | None, other: Matrix | None) -> bool:
    """Whether a head and an embedding are the same numbers."""
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and all(
        torch.equal(one.rows(piece), other.rows(piece)) for piece in row_pieces(*one.shape)
    )
