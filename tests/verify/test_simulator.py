"""The check of what was compiled against the graph that it came from; both are real engines in child processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_onnx.artifact.htp.folder import HtpFolder
from qwen_onnx.catalog.schema import Limits, Verification
from qwen_onnx.export.passes.htp_qdq.export import export
from qwen_onnx.export.passes.htp_qdq.options import HtpQdqExportOptions
from qwen_onnx.processes.environments import own_interpreter
from qwen_onnx.runtime.engines.runners.client import Runner
from qwen_onnx.verify import Report, Verdict, VerifyOptions, verify_artifact
from tests.conftest import make_tiny_checkpoint
from tests.export.test_htp import quantized

LIMITS = Limits(kld_mean=0.18, kld_p99=1.5, top1=0.5, ppl_ratio=1.2)
OPTIONS = VerifyOptions(checks=("simulator",), window=64, simulator_tokens=40, simulator_steps=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("simulated") / "checkpoint")


@pytest.fixture(scope="module")
def artifact(checkpoint: Path) -> Path:
    """QDQ graphs, which ONNX Runtime's CPU runs in place of a simulator."""
    folder = checkpoint.parent / "out"
    config = HtpQdqExportOptions(prefill=16, context=128, windows=4, window=64)
    export(quantized(checkpoint, checkpoint.parent, 8), folder, config)
    return folder


def run_by(folder: Path) -> Callable[[Path], Runner]:
    return lambda _: Runner(folder, "qnn_cpu", own_interpreter(), threads=1)


def verdict(report: Report) -> Verdict:
    return next(item.verdict for item in report.checks if item.name == "simulator")


def judged(artifact: Path, checkpoint: Path, simulated: Path | None) -> Report:
    return verify_artifact(
        artifact,
        checkpoint,
        None,
        LIMITS,
        level=Verification.SIMULATOR,
        options=OPTIONS,
        runner=run_by(artifact),
        simulator=run_by(simulated) if simulated else None,
    )


@pytest.mark.slow
def test_what_computes_the_same_passes(artifact: Path, checkpoint: Path) -> None:
    report = judged(artifact, checkpoint, artifact)
    found = next(item for item in report.checks if item.name == "simulator")
    assert found.verdict is Verdict.PASS
    assert found.measured["positions"] == 2 * 39 + 4
    assert "on the vendor's simulator" in report.claim


@pytest.mark.slow
def test_other_tables_fail(artifact: Path, checkpoint: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(artifact, tmp_path / "broken"))
    cosines = np.load(broken / "cosines.npy")
    np.save(broken / "cosines.npy", np.full_like(cosines, HtpFolder.read(broken).grids["cos"].zero))
    embeddings = np.load(broken / "embeddings.npy")
    np.save(broken / "embeddings.npy", embeddings[::-1])
    assert verdict(judged(artifact, checkpoint, broken)) is Verdict.FAIL


@pytest.mark.slow
def test_no_simulator_proves_nothing(artifact: Path, checkpoint: Path) -> None:
    assert verdict(judged(artifact, checkpoint, None)) is Verdict.INCONCLUSIVE


@pytest.mark.slow
def test_other_levels_neither_make_it_nor_miss_it(artifact: Path, checkpoint: Path) -> None:
    report = verify_artifact(
        artifact, checkpoint, None, LIMITS, level=Verification.STRUCTURE, options=VerifyOptions(checks=("tokenizer",))
    )
    assert "simulator" not in {item.name for item in report.checks}
    assert "drift" in report.not_checked
    assert "simulator" not in report.not_checked
