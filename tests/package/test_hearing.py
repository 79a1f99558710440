"""A model that hears is no package: what Foundry Local runs models with does not load it."""

from __future__ import annotations

from pathlib import Path

import onnxruntime_genai as og
import pytest

from qwen_onnx.artifact.manifest import Artifact, open_artifact
from qwen_onnx.errors import PackageError
from qwen_onnx.package.build import PackageJob, build_package


def test_genai_alone_does_not_load_one(hearing_artifact: Path) -> None:
    """Once it does, packages can be made: see docs/audio.md."""
    with pytest.raises(RuntimeError, match="qwen2_audio"):
        og.Model(str(hearing_artifact))


@pytest.mark.parametrize("profile", ["sdk2", "cli1"])
def test_it_is_refused_before_anything_is_written(tiny_build: Path, tmp_path: Path, profile: str) -> None:
    artifact = open_artifact(tiny_build)
    plan = artifact.manifest.plan
    passes = plan.olive["passes"] | {"audio": {"type": "AudioEncoder"}}
    hearing = plan.model_copy(update={"olive": {**plan.olive, "passes": passes}})
    changed = Artifact(path=tiny_build, manifest=artifact.manifest.model_copy(update={"plan": hearing}))
    with pytest.raises(PackageError, match="hears and does not see") as found:
        build_package(PackageJob(changed, tmp_path / "packages", profile, allow_unverified=True))  # type: ignore[arg-type]
    assert found.value.hint == f"qwen-onnx serve {tiny_build}"
    assert not (tmp_path / "packages").exists()
