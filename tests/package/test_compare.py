"""``qwen-onnx diff``: what was measured may differ, nothing else may."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qwen_onnx.errors import PackageError
from qwen_onnx.package.compare import Relation, compare
from tests.conftest import rewrite_json, run_cli


def flip(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


@pytest.mark.slow
def test_one_bit_makes_another_build(tiny_package: Path, broken: Path) -> None:
    done = run_cli("diff", tiny_package, broken)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["identical"] is True
    flip(broken / "model.onnx.data")
    done = run_cli("diff", tiny_package, broken)
    assert done.returncode == 10
    assert "not the same build: model.onnx.data" in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["identical"], found["different"]) == (False, 1)


def test_what_was_measured_may_differ(tiny_package: Path, broken: Path) -> None:
    (broken / "README.md").write_text("other figures")
    rewrite_json(broken / "manifest.json", built_seconds=1e6)
    found = compare(tiny_package, broken)
    assert {found["README.md"], found["manifest.json"]} == {Relation.MEASURED}
    assert not any(relation.proves_a_difference for relation in found.values())


def test_the_rest_of_the_manifest_may_not(tiny_package: Path, broken: Path) -> None:
    rewrite_json(broken / "manifest.json", key="0" * 64)
    assert compare(tiny_package, broken)["manifest.json"] is Relation.DIFFERENT


def test_a_package_does_not_say_itself_what_was_measured(tiny_package: Path, broken: Path) -> None:
    flip(broken / "model.onnx")
    for folder in (broken,):
        rewrite_json(folder / "package.json", measured=["model.onnx"])
    assert compare(tiny_package, broken)["model.onnx"] is Relation.DIFFERENT


def test_files_of_one_only_are_a_difference(tiny_build: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_build, tmp_path / "other"))
    (other / "build.log").unlink()
    assert not any(relation.proves_a_difference for relation in compare(tiny_build, other).values())
    (other / "extra").touch()
    assert compare(tiny_build, other)["extra"] is Relation.MISSING


def test_only_like_is_compared(tiny_build: Path, tiny_package: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="one is an artifact, the other a package"):
        compare(tiny_build, tiny_package)
    done = run_cli("diff", tiny_build, tmp_path)
    assert done.returncode == 6
    assert "not an artifact" in done.stderr
