"""The check of an int8 KV cache: who gets scales, who does not, and how far a key goes that a position turns."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from qwen_onnx.artifact.kv_scales import KV_SCALES
from qwen_onnx.catalog.schema import Limits
from qwen_onnx.records import Verdict
from qwen_onnx.runtime import GenerationConfig, QwenService
from qwen_onnx.verify import Keep, VerifyOptions, verify_artifact
from qwen_onnx.verify.kv_cache import reach
from qwen_onnx.verify.records import CheckResult

FAST = {"window": 64, "windows_per_domain": 1, "block": 16, "resamples": 100}


def judged(artifact: Path, checkpoint: Path, kept: Path, limit: float | None) -> CheckResult:
    kept.mkdir()
    limits = Limits(kld_mean=0.005, kld_p99=0.05, top1=0.01, ppl_ratio=1.18, kv_int8_kld=limit)
    options = VerifyOptions(checks=("kv_int8",), **FAST)
    keep = Keep(kept, "tiny", "0" * 64)
    report = verify_artifact(artifact, checkpoint, None, limits, options=options, keep=keep)
    return next(item for item in report.checks if item.name == "kv_int8")


@pytest.mark.slow
def test_an_artifact_that_keeps_the_limit_gets_scales_and_is_served_by_them(
    exact_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    found = judged(exact_artifact, tiny_checkpoint, tmp_path / "kept", 0.001)
    assert found.verdict is Verdict.PASS
    assert found.detail == "offered: serve --kv-cache int8"
    # the cache was int8, and nothing else changed
    assert 0 < abs(found.measured["added_kld"]) < 0.001
    assert found.measured["kld_mean"] == pytest.approx(found.measured["float_kld_mean"] + found.measured["added_kld"])
    folder = Path(shutil.copytree(exact_artifact, tmp_path / "served"))
    shutil.copy(tmp_path / "kept" / KV_SCALES, folder)
    with QwenService(folder, threads=1, kv_cache="int8") as service:
        assert service.generate("Hello", GenerationConfig(max_new_tokens=4)).finish_reason


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "reason"), [(1e-12, "not offered: the limit is not kept"), (None, "not offered: no limit set")]
)
def test_others_get_none(
    limit: float | None, reason: str, exact_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    found = judged(exact_artifact, tiny_checkpoint, tmp_path / "kept", limit)
    assert (found.verdict, found.detail) == (Verdict.PASS, reason)
    assert not (tmp_path / "kept" / KV_SCALES).exists()


def test_no_position_takes_a_key_further_than_its_scale() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(2, 3, 8)) * [[[9.0]], [[0.1]]]
    # both halves of a head, turned by angles that the texts do not have
    turned = np.array(
        [
            [np.cos(a) * pairs[0] - np.sin(a) * pairs[1], np.sin(a) * pairs[0] + np.cos(a) * pairs[1]]
            for a in np.linspace(0, 6, 50)
        ]
    )
    first, every = turned[:1], turned
    held = np.zeros((1, 2, 3, 1, 16), np.float32)
    held[0, 0, :, 0] = np.concatenate(first[0], axis=-1)
    held[0, 1, :, 0] = rng.normal(size=(3, 16))
    found = reach(held)
    assert found.shape == (1, 2, 3, 16)
    assert (np.abs(np.concatenate([every[:, 0], every[:, 1]], axis=-1)) <= found[0, 0] + 1e-5).all()
    # the other half of a pair that lay along one channel had shown nothing of it
    assert (np.abs(held[0, 0, :, 0]) < 0.5 * found[0, 0]).any()
    assert np.array_equal(found[0, 1], np.abs(held[0, 1, :, 0]))
