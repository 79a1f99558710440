"""The starter's graph is proven with its own matrices, and what an exporter may get wrong shows on real weights too."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen_onnx.artifact.manifest import open_artifact
from qwen_onnx.errors import ArtifactError
from qwen_onnx.export.weights import CheckpointWeights
from qwen_onnx.sources.checkpoint import INDEX_FILE, SINGLE_FILE
from qwen_onnx.verify import Verdict, VerifyOptions, verify_artifact
from qwen_onnx.verify.records import CheckResult
from tests.fixtures.faults import flipped, other_base, with_constants

BIAS = "model.layers.20.self_attn.v_proj.bias"


def judged(artifact: Path, checkpoint: Path, published: Path) -> CheckResult:
    limits = open_artifact(published).manifest.plan.limits
    options = VerifyOptions(checks=("graph_parity",), window=128)
    report = verify_artifact(artifact, checkpoint, None, limits, options=options)
    return next(item for item in report.checks if item.name == "graph_parity")


@pytest.mark.release
def test_the_starter_passes(artifact_dir: Path, starter_checkpoint: Path) -> None:
    found = judged(artifact_dir, starter_checkpoint, artifact_dir)
    assert found.verdict is Verdict.PASS, found
    # embedding and head, and per layer q, k, v, o, gate, up, down
    assert found.measured["matrices"] == 2 + 30 * 7


@pytest.mark.release
def test_another_base_of_rope_fails(artifact_dir: Path, starter_checkpoint: Path, tmp_path: Path) -> None:
    settings = json.loads((starter_checkpoint / "config.json").read_text())
    theta = settings["rope_parameters"]["rope_theta"]
    broken = with_constants(artifact_dir, tmp_path / "broken", other_base(theta, 1.02 * theta))
    assert judged(broken, starter_checkpoint, artifact_dir).verdict is Verdict.FAIL


@pytest.mark.release
def test_one_flipped_weight_fails(artifact_dir: Path, starter_checkpoint: Path, tmp_path: Path) -> None:
    """In a norm by parity; in a matrix, whose codes PyTorch is given, by the seal."""
    broken = with_constants(artifact_dir, tmp_path / "norm", flipped(r"layers\.15\.post_attention_layernorm\.weight"))
    assert judged(broken, starter_checkpoint, artifact_dir).verdict is Verdict.FAIL
    sealed = Path(shutil.copytree(artifact_dir, tmp_path / "matrix"))
    with (sealed / "model.onnx.data").open("r+b") as file:
        file.seek(1_000_000)
        [byte] = file.read(1)
        file.seek(1_000_000)
        file.write(bytes([byte ^ 0x80]))
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data"):
        open_artifact(sealed)


@pytest.mark.release
def test_a_lost_bias_fails(artifact_dir: Path, starter_checkpoint: Path, tmp_path: Path) -> None:
    """The graph has no biases, since the starter's are zero: here one of the checkpoint's is not."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in starter_checkpoint.iterdir():
        if path.name == SINGLE_FILE:
            os.symlink(path, checkpoint / "whole.safetensors")
        else:
            shutil.copyfile(path, checkpoint / path.name)
    weights = CheckpointWeights(starter_checkpoint)
    places = dict.fromkeys(weights.names(), "whole.safetensors") | {BIAS: "bias.safetensors"}
    (checkpoint / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    bias = torch.zeros_like(weights.tensor(BIAS))
    bias[7] = 0.5
    save_file({BIAS: bias}, checkpoint / "bias.safetensors", metadata={"format": "pt"})
    assert judged(artifact_dir, checkpoint, artifact_dir).verdict is Verdict.FAIL
