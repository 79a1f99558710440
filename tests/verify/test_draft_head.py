"""The check of a head for multi-token prediction: the checkpoint's own passes, another's does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qwen_onnx.artifact.draft_head import DRAFT_HEAD
from qwen_onnx.catalog.schema import Limits
from qwen_onnx.records import Verdict
from qwen_onnx.verify import CheckResult, VerifyOptions, verify_artifact
from qwen_onnx.verify.draft_head import CHECK
from tests.fixtures.models import drafting_checkpoint, hybrid_checkpoint

LIMITS = Limits(kld_mean=0.005, kld_p99=0.05, top1=0.01, ppl_ratio=1.18)


def judged(artifact: Path, checkpoint: Path) -> CheckResult:
    options = VerifyOptions(checks=(CHECK,), window=64, windows_per_domain=1, decode_tokens=24, threads=1)
    report = verify_artifact(artifact, checkpoint, None, LIMITS, options=options)
    return next(item for item in report.checks if item.name == CHECK)


def test_the_checkpoints_head_passes_and_its_guesses_are_counted(
    drafting_artifact: Path, hybrid_artifact: Path, tmp_path: Path
) -> None:
    right = judged(drafting_artifact, drafting_checkpoint(tmp_path / "right"))
    assert right.verdict is Verdict.PASS
    assert float(right.measured["cosine"]) > 0.99999
    assert float(right.measured["guesses_right"]) > 0.15
    random = judged(hybrid_artifact, hybrid_checkpoint(tmp_path / "random"))
    assert random.verdict is Verdict.PASS
    assert float(random.measured["guesses_right"]) < 0.1


def test_the_head_of_another_checkpoint_fails(drafting_artifact: Path, hybrid_artifact: Path, tmp_path: Path) -> None:
    mixed = Path(shutil.copytree(drafting_artifact, tmp_path / "mixed"))
    for file in (DRAFT_HEAD, f"{DRAFT_HEAD}.data"):
        shutil.copyfile(hybrid_artifact / file, mixed / file)
    assert judged(mixed, drafting_checkpoint(tmp_path / "checkpoint")).verdict is Verdict.FAIL


def test_an_artifact_without_one_is_not_checked_for_it(exact_artifact: Path, tiny_checkpoint: Path) -> None:
    options = VerifyOptions(checks=("tokenizer",), window=64, windows_per_domain=1, decode_tokens=24, threads=1)
    report = verify_artifact(exact_artifact, tiny_checkpoint, None, LIMITS, options=options)
    assert CHECK not in {item.name for item in report.checks}
    assert CHECK not in report.not_checked


@pytest.mark.slow
def test_the_command_line_builds_proves_and_serves_it(tmp_path: Path) -> None:
    """A folder with a head, to an artifact whose report has the check; one that was altered is not served."""
    from qwen_onnx.runtime import QwenService
    from tests.conftest import run_cli

    checkpoint = hybrid_checkpoint(tmp_path / "model")
    done = run_cli("optimize", checkpoint, "--output", tmp_path / "artifact", "--no-verify", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "artifact" / DRAFT_HEAD).exists()
    assert judged(tmp_path / "artifact", checkpoint).verdict is Verdict.PASS
    with QwenService(tmp_path / "artifact", threads=1, context=256) as service:
        assert service.stats().kind == "batch"
