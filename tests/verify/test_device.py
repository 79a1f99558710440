"""Proof on a device: against kept answers, without torch, checkpoint and network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_onnx.artifact.manifest import read_manifest, staged_manifest
from qwen_onnx.artifact.seal import runnable_digest
from qwen_onnx.catalog.schema import Limits
from qwen_onnx.errors import ArtifactError, EnvironmentFault
from qwen_onnx.runtime.processing.tokenizer import TextTokenizer
from qwen_onnx.sources.fetch import weights_digest
from qwen_onnx.verify import VerifyOptions
from qwen_onnx.verify.device import DeviceReport, verify_on
from qwen_onnx.verify.golden import GOLDEN, About, Encoded, Golden, Kept, Rendered, Stretch, kept
from qwen_onnx.verify.keeping import CONTINUATION
from qwen_onnx.verify.scoring import OnnxScorer
from tests.conftest import run_cli
from tests.fixtures.faults import other_base, with_constants

FAST = VerifyOptions(
    decode_tokens=24, prompt_tokens=16, new_tokens=9, segment=4, rounds=1, threads=1, resamples=100, block=16
)
TEXTS = {"prose": "The river was wide and slow. " * 4, "code": "for item in items:\n    print(item)\n" * 4}
# of a model that hardly tells tokens apart: what differs at all is far beyond them
LIMITS = {"kld_mean": 1e-6, "kld_p99": 1e-4, "top1": 0.9, "ppl_ratio": 1.001}
# what a device has not, and what nobody may ask
ALONE = """
import socket, sys
for name in ("torch", "transformers", "olive"):
    sys.modules[name] = None
def refuse(*_):
    raise OSError("no network here")
socket.socket.connect = refuse
from qwen_onnx.cli.app import main
sys.argv = ["qwen-onnx", *sys.argv[1:]]
main()
"""


def resealed(folder: Path) -> Path:
    """An artifact with the manifest of the files that it has now."""
    manifest = read_manifest(folder)
    limits = Limits(**LIMITS)
    plan = manifest.plan.model_copy(update={"limits": limits})
    fields = {
        name: getattr(manifest, name)
        for name in ("key", "plan_digest", "about", "source", "packages", "checkout", "readback", "built_seconds")
    }
    made = staged_manifest(folder, plan=plan, verdict=manifest.verdict, **fields)
    (folder / "manifest.json").write_text(made.model_dump_json(indent=1))
    return folder


def answers_of(folder: Path, **changes: object) -> Golden:
    """The golden file that the artifact itself would be the teacher of: no drift at all."""
    tokenizer, scorer = TextTokenizer(folder), OnnxScorer(folder, 1)
    texts = {domain: list(tokenizer.encode(text)) for domain, text in TEXTS.items()}
    texts[CONTINUATION] = [*tokenizer.encode("Hello"), 30, 31, 32]
    parts: list[Kept] = [kept(scorer.logits(ids), ids) for ids in texts.values()]
    stretches = tuple(
        Stretch(domain=domain, source=domain, tokens=len(ids), prompt=5 if domain == CONTINUATION else 0)
        for domain, ids in texts.items()
    )
    messages = ({"role": "user", "content": "Hi"},)
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    fields = {
        "model": "tiny",
        "weights": weights_digest(read_manifest(folder).source.files),
        "vocabulary": parts[0].top_ids.shape[1] + 1,
        "stretches": stretches,
        "texts": (Encoded(text="Hello 你好", ids=tuple(tokenizer.encode("Hello 你好"))),),
        "conversations": (Rendered(messages=messages, text=rendered),),
        "coarse": 0.09,
        "full": 0.1,
    }
    return Golden(About(**{**fields, **changes}), tuple(parts))


@pytest.fixture(scope="module")
def artifact(tiny_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(tiny_build, tmp_path_factory.mktemp("device") / "cpu-int4"))
    answers_of(folder, vocabulary=OnnxScorer(folder, 1).logits([1, 2]).shape[1]).save(folder)
    return resealed(folder)


@pytest.fixture(scope="module")
def report(artifact: Path) -> DeviceReport:
    return verify_on(artifact, "cpu", FAST)


def test_what_computes_what_was_kept_passes(report: DeviceReport, artifact: Path) -> None:
    assert report.verdict == "PASS", report.checks
    assert report.digest == runnable_digest(artifact)
    assert report.claim.startswith("proven: run on this device: ")
    assert "CPUExecutionProvider" in report.claim
    found = {item.name: item for item in report.checks}
    assert float(found["drift"].measured["kld_mean"]) < 1e-7
    assert "lower bound; at the build it was 90.0% of the full one" in found["drift"].detail
    assert found["placement"].measured["elsewhere"] == 0
    assert float(found["placement"].measured["heavy_operators"]) > 0
    assert found["greedy"].measured["tokens"] == 3
    assert report.speed is not None
    assert report.speed.decode_tok_s.median > 0


def test_the_record_comes_back(report: DeviceReport, tmp_path: Path) -> None:
    path = report.save(tmp_path / "new" / "record.json")
    assert DeviceReport.model_validate_json(path.read_text()) == report
    assert [item.name for item in path.parent.iterdir()] == ["record.json"]


def verdicts(folder: Path) -> dict[str, str]:
    return {item.name: item.verdict for item in verify_on(folder, "cpu", FAST).checks}


def test_a_wrong_rope_base_fails(artifact: Path, tmp_path: Path) -> None:
    broken = resealed(with_constants(artifact, tmp_path / "broken", other_base(10_000.0, 100.0)))
    assert verdicts(broken)["drift"] == "FAIL"


def _other_tokens(golden: Golden) -> Golden:
    parts = tuple(Kept(**{**vars(part), "top_ids": part.top_ids[::-1].copy()}) for part in golden.parts)
    return Golden(golden.about, parts)


def _other_ids(golden: Golden) -> Golden:
    text = golden.about.texts[0]
    wrong = text.model_copy(update={"ids": (*text.ids[:-1], text.ids[-1] + 1)})
    return Golden(golden.about.model_copy(update={"texts": (wrong,)}), golden.parts)


def _other_template(golden: Golden) -> Golden:
    wrong = golden.about.conversations[0].model_copy(update={"text": "Hi"})
    return Golden(golden.about.model_copy(update={"conversations": (wrong,)}), golden.parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "check"), [(_other_tokens, "drift"), (_other_ids, "tokenizer"), (_other_template, "chat_template")]
)
def test_other_answers_fail(artifact: Path, tmp_path: Path, change: Callable[[Golden], Golden], check: str) -> None:
    path = change(Golden.read(artifact / GOLDEN)).save(tmp_path)
    found = {item.name: item.verdict for item in verify_on(artifact, "cpu", FAST, path).checks}
    assert found[check] == "FAIL"


def test_the_answers_of_another_model_are_refused(artifact: Path, tmp_path: Path) -> None:
    golden = Golden.read(artifact / GOLDEN)
    path = Golden(golden.about.model_copy(update={"model": "other", "weights": "1" * 64}), golden.parts).save(tmp_path)
    with pytest.raises(ArtifactError, match="is of other, with other weights"):
        verify_on(artifact, "cpu", FAST, path)


def test_one_flipped_weight_is_refused(artifact: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(artifact, tmp_path / "broken"))
    content = np.fromfile(broken / "model.onnx.data", np.uint8)
    content[len(content) // 2] ^= 1
    content.tofile(broken / "model.onnx.data")
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data was altered"):
        verify_on(broken, "cpu", FAST)


def test_an_artifact_without_answers_says_how_to_get_them(tiny_build: Path) -> None:
    done = run_cli("verify", tiny_build, "--device", "cpu")
    assert done.returncode != 0
    assert "golden.npz is missing" in done.stderr


def test_a_device_that_is_not_here(artifact: Path) -> None:
    with pytest.raises(EnvironmentFault, match="no npu"):
        verify_on(artifact, "npu", FAST)


def test_an_artifact_for_another_device(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["DmlExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(EnvironmentFault, match="built for cpu, not for dml"):
        verify_on(artifact, "dml", FAST)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--golden", "golden.npz"], "only with --device"),
        (["--sign", "key"], "only with --device"),
        (["--device", "cpu", "--sign", "no-key"], "--sign no-key: no such file"),
        (["--device", "cpu", "--source", "x"], "reads no checkpoint"),
        (["--device", "tpu"], "is not a device"),
    ],
)
def test_options_that_do_not_go_together(artifact: Path, arguments: list[str], words: str) -> None:
    done = run_cli("verify", artifact, *arguments)
    assert done.returncode != 0
    assert words in " ".join(done.stderr.split())


@pytest.mark.release
def test_the_starter_is_proven_here_with_its_runtime_alone(artifact_dir: Path, tmp_path: Path) -> None:
    record, key = tmp_path / "record.json", tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    told = ["verify", str(artifact_dir), "--device", "cpu", "--record", str(record), "--sign", str(key)]
    command = [sys.executable, "-c", ALONE, *told]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["verdict"] == "PASS"
    found = DeviceReport.model_validate_json(record.read_text())
    assert found.digest == runnable_digest(artifact_dir)
    assert "SSH SIGNATURE" in (tmp_path / "record.json.sig").read_text()
    golden = artifact_dir / GOLDEN
    assert golden.stat().st_size < 8_000_000
    about = Golden.read(golden).about
    assert about.coarse is not None
    assert about.full is not None
    assert 0.8 < about.coarse / about.full <= 1
