"""Verification of a tiny artifact: each check passes on it, and fails on what was broken for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qwen_onnx.catalog.schema import Limits, Verification
from qwen_onnx.errors import VerificationError
from qwen_onnx.verify import Report, Verdict, VerifyOptions, verify_artifact

# a random model's predictions are nearly uniform: its top-1 says little, and no damage makes a large divergence
LIMITS = Limits(kld_mean=0.005, kld_p99=0.05, top1=0.01, ppl_ratio=1.18)
FAST = {"window": 64, "windows_per_domain": 1, "decode_tokens": 16, "greedy_tokens": 8, "block": 16, "resamples": 100}


def verdicts(artifact: Path, checkpoint: Path, *checks: str) -> Report:
    return verify_artifact(artifact, checkpoint, None, LIMITS, options=VerifyOptions(checks=checks, **FAST))


def result(report: Report, name: str) -> Verdict:
    return next(item.verdict for item in report.checks if item.name == name)


@pytest.fixture
def broken(tiny_build: Path, tmp_path: Path) -> Path:
    """A copy of the artifact that a test may break."""
    return Path(shutil.copytree(tiny_build, tmp_path / "broken-artifact"))


@pytest.mark.slow
def test_a_sound_artifact_passes_and_what_was_not_run_is_inconclusive(tiny_build: Path, tiny_checkpoint: Path) -> None:
    report = verdicts(tiny_build, tiny_checkpoint, "tokenizer", "chat_template", "drift", "greedy")
    assert {result(report, name) for name in ("tokenizer", "chat_template", "drift", "greedy")} == {Verdict.PASS}
    assert result(report, "latency") is Verdict.INCONCLUSIVE
    assert report.verdict is Verdict.INCONCLUSIVE
    assert not report.passed


def _lower_case(folder: Path) -> None:
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(settings))


def _other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def _noisy_scales(folder: Path) -> None:
    # a random model hardly hears its MLP: what would ruin a trained one has to be loud here
    _edit(folder, "scales", lambda values: values * np.random.default_rng(0).uniform(-900, 900, values.shape))


def _not_a_number(folder: Path) -> None:
    _edit(folder, "scales", lambda values: values * np.nan)


def _edit(folder: Path, part: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change a tensor of one layer in ``model.onnx``."""
    path = folder / "model.onnx"
    model = onnx.load(str(path))
    tensor = next(
        t for t in model.graph.initializer if "layers.1" in t.name and "down_proj" in t.name and part in t.name
    )
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(change(values).astype(values.dtype), tensor.name))
    (folder / "model.onnx.data").unlink(missing_ok=True)
    onnx.save(model, str(path), save_as_external_data=True, location="model.onnx.data")


@pytest.mark.release
def test_a_base_model_without_a_chat_template_is_verified_all_the_same(
    tiny_build: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    artifact, checkpoint = (
        Path(shutil.copytree(folder, tmp_path / name))
        for folder, name in ((tiny_build, "artifact"), (tiny_checkpoint, "checkpoint"))
    )
    for folder in (artifact, checkpoint):
        (folder / "chat_template.jinja").unlink()
    names = ("tokenizer", "chat_template", "drift", "greedy")
    report = verdicts(artifact, checkpoint, *names)
    assert {result(report, name) for name in names} == {Verdict.PASS}
    assert result(verdicts(tiny_build, checkpoint, "chat_template"), "chat_template") is Verdict.FAIL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("breaks", "check"),
    [
        (_lower_case, "tokenizer"),
        (_other_template, "chat_template"),
        (_noisy_scales, "drift"),
        (_not_a_number, "drift"),
        (_not_a_number, "greedy"),
    ],
)
def test_what_is_broken_fails(broken: Path, tiny_checkpoint: Path, breaks: Callable[[Path], None], check: str) -> None:
    breaks(broken)
    report = verdicts(broken, tiny_checkpoint, check)
    assert result(report, check) is Verdict.FAIL
    assert report.verdict is Verdict.FAIL


@pytest.mark.slow
def test_an_artifact_that_does_not_load_fails(broken: Path, tiny_checkpoint: Path) -> None:
    (broken / "model.onnx").write_bytes(b"no graph")
    report = verdicts(broken, tiny_checkpoint, "drift", "greedy")
    assert result(report, "drift") is result(report, "greedy") is Verdict.FAIL


@pytest.mark.release
def test_an_fp32_export_is_held_against_pytorch(tiny_build: Path, exact_artifact: Path, tiny_checkpoint: Path) -> None:
    """What artifacts of other engines are judged by; the INT4 artifact in its place must be found out."""
    options = VerifyOptions(checks=("graph_parity",), **FAST)
    for reference, wanted in ((exact_artifact, Verdict.PASS), (tiny_build, Verdict.FAIL)):
        report = verify_artifact(tiny_build, tiny_checkpoint, reference, LIMITS, options=options)
        assert result(report, "graph_parity") is wanted


def test_unknown_checks_and_missing_folders_are_errors(tiny_build: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="No check is called driftt"):
        verdicts(tiny_build, tiny_checkpoint, "driftt")
    with pytest.raises(VerificationError, match="does not exist"):
        verdicts(tmp_path / "nothing", tiny_checkpoint)


@pytest.mark.slow
def test_the_report_is_one_file_that_loads_nothing(tiny_build: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = verdicts(tiny_build, tiny_checkpoint, "drift")
    record, page = report.save(tmp_path)
    assert Report.model_validate_json(record.read_bytes()) == report
    html = page.read_text()
    assert "<svg" in html
    for outside in ("http://", "https://", "<script", "src=", "@import"):
        assert outside not in html.replace("http://www.w3.org/2000/svg", "")
    line = json.loads(report.json_line())
    assert line["verdict"] == "INCONCLUSIVE"
    assert line["kld_mean"] == report.drift.kld_mean.value


@pytest.mark.slow
def test_a_level_leaves_out_what_it_does_not_promise(tiny_build: Path, tiny_checkpoint: Path) -> None:
    options = VerifyOptions(checks=("drift",), **FAST)
    level = Verification.NUMERICS_ON_CPU
    report = verify_artifact(tiny_build, tiny_checkpoint, None, LIMITS, level=level, options=options)
    assert set(report.not_checked) == {"batched", "kv_int8", "latency", "memory"}
    assert "latency" not in {item.name for item in report.checks}
    assert report.verdict is Verdict.INCONCLUSIVE, "what the level promises and was not run must not pass"
    assert report.claim == f"not proven (INCONCLUSIVE); judged by: {level.text}"
    assert level.text in report.html()
    assert json.loads(report.json_line())["claim"] == report.claim


@pytest.mark.slow
def test_structure_alone_is_never_computed(tiny_build: Path, tiny_checkpoint: Path) -> None:
    level = Verification.STRUCTURE
    report = verify_artifact(tiny_build, tiny_checkpoint, None, LIMITS, level=level, options=VerifyOptions(**FAST))
    assert {item.name for item in report.checks} == {"tokenizer", "chat_template", "size"}
    computed = {"graph_parity", "drift", "kv_decode", "batched", "greedy", "kv_int8", "latency", "memory"}
    assert set(report.not_checked) == computed
    assert report.verdict is Verdict.PASS
    assert report.claim == "proven: structure of the graph; never run"


def test_a_check_beyond_the_level_cannot_be_asked_for(tiny_build: Path, tiny_checkpoint: Path) -> None:
    options = VerifyOptions(checks=("latency",), **FAST)
    with pytest.raises(VerificationError, match="latency cannot be checked: numerics on the CPU"):
        verify_artifact(tiny_build, tiny_checkpoint, None, LIMITS, level=Verification.NUMERICS_ON_CPU, options=options)
