"""Checks of artifacts that see: a good one, and one with each part broken."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qwen_onnx.artifact.processor_config import PROCESSOR_CONFIG
from qwen_onnx.artifact.video_config import VIDEO_CONFIG
from qwen_onnx.catalog.schema import Limits
from qwen_onnx.records import Verdict
from qwen_onnx.runtime.engines.media import Picture
from qwen_onnx.verify import VerifyOptions, verify_artifact
from qwen_onnx.verify.sight import VISUAL, sees
from qwen_onnx.verify.tower import VisionTower
from tests.conftest import rewrite_json
from tests.fixtures.vision import seeing_artifact, seeing_checkpoint, stacked_artifact, stacked_checkpoint

__all__ = ["seeing_artifact", "seeing_checkpoint", "stacked_artifact", "stacked_checkpoint"]

LIMITS = Limits(kld_mean=1e-6, kld_p99=1e-5, top1=0.999, ppl_ratio=1.0005)
# beyond what any target allows
LOOSE = Limits(kld_mean=9, kld_p99=90, top1=0.01, ppl_ratio=90)


def verdicts(artifact: Path, checkpoint: Path, *checks: str, limits: Limits = LIMITS) -> dict[str, Verdict]:
    """Of the checks that were made."""
    options = VerifyOptions(checks=checks, threads=1)
    report = verify_artifact(artifact, checkpoint, None, limits, options=options)
    found = {item.name: item for item in report.checks}
    assert not any("could not be carried out" in found[name].detail for name in checks)
    return {name: found[name].verdict for name in checks}


def scale_encoder(folder: Path) -> None:
    """Weights of the encoder a little larger."""
    path = folder / "vision.onnx.data"
    np.multiply(np.fromfile(path, np.float32), np.float32(1.1)).tofile(path)


def other_mean(folder: Path) -> None:
    """Pictures that are normalised by another mean."""
    path = folder / PROCESSOR_CONFIG
    path.write_text(path.read_text().replace("0.48145466", "0.5"))


def other_mean_of_videos(folder: Path) -> None:
    """The same of videos."""
    rewrite_json(folder / VIDEO_CONFIG, mean=[0.5, 0.4578275, 0.40821073])


def turn_time(folder: Path) -> None:
    """The encoder takes the later frame of a pair for the earlier: of a picture, both are the same."""
    path = folder / "vision.onnx"
    model = onnx.load(str(path))
    [weights] = [entry for entry in model.graph.initializer if "patch_embed" in entry.name and len(entry.dims) == 2]
    values = numpy_helper.to_array(weights)
    axis = values.shape.index(3 * 2 * 14 * 14)
    parts = np.moveaxis(values, axis, 0).reshape(3, 2, 14 * 14, -1)[:, ::-1].reshape(3 * 2 * 14 * 14, -1)
    weights.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(np.moveaxis(parts, 0, axis)), weights.name))
    onnx.save(model, str(path))


@pytest.mark.slow
def test_the_tower_looks_at_a_picture_once(seeing_checkpoint: Path) -> None:
    pixels = np.random.default_rng(3).standard_normal((16, 3 * 2 * 14 * 14)).astype(np.float32)
    pictures = [Picture(scale * pixels, (1, 4, 4), 2, str(scale)) for scale in (1, 2)]
    tower = VisionTower(seeing_checkpoint)
    first, second = map(tower.features, pictures)
    assert first.shape == (4, 64)
    assert not np.allclose(first, second)
    assert tower.features(pictures[0]) is first
    assert np.array_equal(VisionTower(seeing_checkpoint).features(pictures[1]), second)


@pytest.mark.slow
def test_a_good_artifact_passes(seeing_artifact: Path, seeing_checkpoint: Path) -> None:
    assert sees(seeing_artifact)
    found = verdicts(seeing_artifact, seeing_checkpoint, *sorted(VISUAL))
    assert found == dict.fromkeys(VISUAL, Verdict.PASS)


@pytest.mark.slow
def test_an_artifact_from_before_videos_is_asked_for_none(
    seeing_artifact: Path, seeing_checkpoint: Path, tmp_path: Path
) -> None:
    older = Path(shutil.copytree(seeing_artifact, tmp_path / "older"))
    (older / VIDEO_CONFIG).unlink()
    options = VerifyOptions(checks=("processing", "sight"), threads=1)
    report = verify_artifact(older, seeing_checkpoint, None, LIMITS, options=options)
    processing, sight = (next(item for item in report.checks if item.name == name) for name in options.checks)
    assert (processing.verdict, sight.verdict) == (Verdict.PASS, Verdict.PASS)
    assert processing.measured["videos"] == 0
    assert "kld_clip" not in sight.measured


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "failed"),
    [
        (scale_encoder, {"vision", "sight"}),
        (turn_time, {"vision", "sight"}),
        (other_mean, {"processing"}),
        (other_mean_of_videos, {"processing"}),
    ],
)
def test_a_broken_part_fails_its_check(
    seeing_artifact: Path, seeing_checkpoint: Path, tmp_path: Path, harm: Callable[[Path], None], failed: set[str]
) -> None:
    broken = Path(shutil.copytree(seeing_artifact, tmp_path / "broken"))
    harm(broken)
    found = verdicts(broken, seeing_checkpoint, *sorted(VISUAL))
    assert {name for name, verdict in found.items() if verdict is Verdict.FAIL} == failed


def lose_features(folder: Path) -> None:
    """What the second layer of DeepStack gets is zeros."""
    path = folder / "vision.onnx"
    model = onnx.load(str(path), load_external_data=False)
    stack = model.graph.node[-1]
    assert stack.op_type == "Concat"
    assert len(stack.input) == 3
    model.graph.node.insert(
        len(model.graph.node) - 1, onnx.helper.make_node("Sub", [stack.input[2], stack.input[2]], ["none"])
    )
    stack.input[2] = "none"
    onnx.save(model, str(path))


def lose_layer(folder: Path) -> None:
    """The decoder adds nothing behind its second layer."""
    path = folder / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    [added] = [node for node in model.graph.node if node.name == "/model/layers.1/deepstack/Add"]
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == added.output[0]:
                node.input[place] = added.input[0]
    model.graph.node.remove(added)
    onnx.save(model, str(path))


@pytest.mark.slow
def test_an_artifact_with_deepstack_passes(stacked_artifact: Path, stacked_checkpoint: Path) -> None:
    found = verdicts(stacked_artifact, stacked_checkpoint, *sorted(VISUAL))
    assert found == dict.fromkeys(VISUAL, Verdict.PASS)


@pytest.mark.slow
@pytest.mark.parametrize(("harm", "failed"), [(lose_features, {"vision"}), (lose_layer, {"sight_parity"})])
def test_a_lost_deepstack_fails_whatever_the_limits(
    stacked_artifact: Path, stacked_checkpoint: Path, tmp_path: Path, harm: Callable[[Path], None], failed: set[str]
) -> None:
    broken = Path(shutil.copytree(stacked_artifact, tmp_path / "broken"))
    harm(broken)
    loose = verdicts(broken, stacked_checkpoint, *sorted(VISUAL), limits=LOOSE)
    assert {name for name, verdict in loose.items() if verdict is Verdict.FAIL} == failed
    assert verdicts(broken, stacked_checkpoint, "sight") == {"sight": Verdict.FAIL}


def test_a_model_of_text_is_not_asked_what_it_sees(exact_artifact: Path, tiny_checkpoint: Path) -> None:
    assert not sees(exact_artifact)
    report = verify_artifact(exact_artifact, tiny_checkpoint, None, LIMITS, options=VerifyOptions(checks=("size",)))
    assert not VISUAL & {item.name for item in report.checks}
    assert not VISUAL & set(report.not_checked)
