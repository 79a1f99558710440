"""Checks of artifacts that hear: a good one, and one with each part broken."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from qwen_onnx.artifact.audio_config import AUDIO_CONFIG
from qwen_onnx.records import Verdict
from qwen_onnx.runtime.processing.template import has_template
from qwen_onnx.verify import VerifyOptions, verify_artifact
from qwen_onnx.verify.hearing import AUDIBLE, hears
from qwen_onnx.verify.sight import VISUAL
from tests.conftest import rewrite_json
from tests.fixtures.hearing import hearing_artifact, hearing_checkpoint
from tests.fixtures.speech import speech_artifact, speech_checkpoint
from tests.verify.test_sight import LIMITS, LOOSE, verdicts

__all__ = ["hearing_artifact", "hearing_checkpoint", "speech_artifact", "speech_checkpoint"]


@pytest.mark.slow
def test_a_good_artifact_passes(hearing_artifact: Path, hearing_checkpoint: Path) -> None:
    assert hears(hearing_artifact)
    found = verdicts(hearing_artifact, hearing_checkpoint, *sorted(AUDIBLE))
    assert found == dict.fromkeys(AUDIBLE, Verdict.PASS)


@pytest.mark.slow
def test_a_good_artifact_that_transcribes_passes(speech_artifact: Path, speech_checkpoint: Path) -> None:
    found = verdicts(speech_artifact, speech_checkpoint, *sorted(AUDIBLE))
    assert found == dict.fromkeys(AUDIBLE, Verdict.PASS)


@pytest.mark.slow
@pytest.mark.parametrize(("change", "failed"), [({"window": 100}, "audio"), ({"min_length": 16_000}, "spectrogram")])
def test_other_windows_or_lengths_fail_their_check(
    speech_artifact: Path, speech_checkpoint: Path, tmp_path: Path, change: dict[str, int], failed: str
) -> None:
    broken = Path(shutil.copytree(speech_artifact, tmp_path / "broken"))
    rewrite_json(broken / AUDIO_CONFIG, **change)
    assert verdicts(broken, speech_checkpoint, failed) == {failed: Verdict.FAIL}


@pytest.mark.slow
def test_a_base_model_is_proven_by_text(hearing_artifact: Path, hearing_checkpoint: Path, tmp_path: Path) -> None:
    """Without a template there is no conversation."""
    base = Path(shutil.copytree(hearing_artifact, tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    assert not has_template(base)
    found = verdicts(base, hearing_checkpoint, "hearing", "hearing_parity")
    assert found == dict.fromkeys(("hearing", "hearing_parity"), Verdict.PASS)


def scale_encoder(folder: Path) -> None:
    """Weights of the encoder a little larger."""
    path = folder / "audio.onnx.data"
    np.multiply(np.fromfile(path, np.float32), np.float32(1.1)).tofile(path)


def other_frames(folder: Path) -> None:
    """Frames that reach further."""
    rewrite_json(folder / AUDIO_CONFIG, n_fft=512)


def exchange_neighbours(folder: Path) -> None:
    """Two features change places between the embeddings."""
    path = folder / "embedding.onnx"
    model = onnx.load(str(path), load_external_data=False)
    [scatter] = [node for node in model.graph.node if node.op_type == "ScatterND"]
    one = onnx.helper.make_tensor("behind", 7, [1], [-1])
    begin, end = (onnx.helper.make_tensor(name, 7, [1], [value]) for name, value in (("last", -1), ("far", -(2**31))))
    axis = onnx.helper.make_tensor("axis", 7, [1], [0])
    model.graph.initializer.extend([one, begin, end, axis])
    turned = onnx.helper.make_node("Slice", [scatter.input[2], "last", "far", "axis", "behind"], ["turned"])
    model.graph.node.insert(len(model.graph.node) - 1, turned)
    scatter.input[2] = "turned"
    onnx.save(model, str(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "failed"),
    [
        (scale_encoder, {"audio", "hearing"}),
        (other_frames, {"spectrogram"}),
        (exchange_neighbours, {"hearing_parity", "hearing"}),
    ],
)
def test_a_broken_part_fails_its_check(
    hearing_artifact: Path, hearing_checkpoint: Path, tmp_path: Path, harm: Callable[[Path], None], failed: set[str]
) -> None:
    broken = Path(shutil.copytree(hearing_artifact, tmp_path / "broken"))
    harm(broken)
    found = verdicts(broken, hearing_checkpoint, *sorted(AUDIBLE))
    assert {name for name, verdict in found.items() if verdict is Verdict.FAIL} == failed
    if "hearing_parity" in failed:
        # whatever drift the limits allow
        loose = verdicts(broken, hearing_checkpoint, "hearing_parity", limits=LOOSE)
        assert loose == {"hearing_parity": Verdict.FAIL}


def test_a_model_of_text_is_not_asked_what_it_hears(exact_artifact: Path, tiny_checkpoint: Path) -> None:
    assert not hears(exact_artifact)
    report = verify_artifact(exact_artifact, tiny_checkpoint, None, LIMITS, options=VerifyOptions(checks=("size",)))
    told = {item.name for item in report.checks} | set(report.not_checked)
    assert not (AUDIBLE | VISUAL) & told
