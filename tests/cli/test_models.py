"""A model by its id, its address or its folder, wherever the command line takes one; and its artifact by the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qwen_onnx.artifact.manifest import Manifest, read_manifest
from qwen_onnx.artifact.origin import origin_of, record_origin, require_replaceable
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import UNCATALOGUED, Adapted, Plan, adapted, make_plan
from qwen_onnx.catalog.sources import FolderSource, HubSource
from qwen_onnx.cli.app import app
from qwen_onnx.cli.options import artifact_at, wanted
from qwen_onnx.errors import ArtifactError, ConfigError, QwenOnnxError
from qwen_onnx.records import digest_of
from qwen_onnx.sources.fetch import folder_checksums
from tests.conftest import make_tiny_checkpoint
from tests.fixtures.recipes import write_recipe


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a checkpoint in it."""
    make_tiny_checkpoint(tmp_path / "My-Finetune", kind="qwen3")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_where_an_artifact_is_kept(folder: Path) -> None:
    for model, name in (
        ("starter", "starter"),
        ("./My-Finetune", "my-finetune"),
        (folder / "My-Finetune", "my-finetune"),
        ("Org/Name@v1", "org--name--v1"),
        ("Qwen/Qwen3-0.6B", "qwen3-0.6b"),
    ):
        assert run("where", model, "--precision", "int8").stdout.endswith(f"/artifacts/{name}/cpu-int8\n")
    assert isinstance(run("where", "a/b/c").exception, ConfigError)


@pytest.mark.slow
def test_other_weights_than_the_recipes_have_their_own_name(folder: Path) -> None:
    (folder / "qwen3-0.6b").symlink_to(folder / "My-Finetune")
    (folder / "My.Weights.gguf").write_bytes(b"GGUF")
    recipe = write_recipe(folder / "mine.yaml", sources=[{"kind": "folder", "name": "My-Finetune"}])
    for model, source, name in (
        ("starter", "My-Finetune", "my-finetune"),
        ("qwen3-0.6b", "./qwen3-0.6b/", "my-finetune"),
        ("starter", "My.Weights.gguf", "my.weights"),
        ("mine-1b", "My-Finetune", "mine-1b"),
        ("starter", "nowhere", "starter"),
    ):
        place = run("where", model, "--source", source, "--recipe", recipe).stdout
        assert place.endswith(f"/artifacts/{name}/cpu-int4\n")
    assert isinstance(run("where", "./My-Finetune", "--source", "My-Finetune").exception, ConfigError)
    (folder / "copy").mkdir()
    (folder / "My-Finetune").rename(folder / "copy/qwen3-0.6b")
    place = run("where", "starter", "--source", "copy/qwen3-0.6b").stdout
    assert place.endswith("/artifacts/local--qwen3-0.6b/cpu-int4\n"), "the name of a recipe that is not asked for"


def test_records_say_that_other_weights_are_not_the_catalogues(folder: Path) -> None:
    recipe = wanted("starter", "cpu").plan
    plan = wanted("starter", "cpu", source=Path("My-Finetune")).plan
    assert (plan.model, plan.title) == ("my-finetune", "My-Finetune by the recipe starter")
    assert plan.sources == (FolderSource(kind="folder", name="My-Finetune"),)
    assert UNCATALOGUED in plan.claim("PASS")
    assert (recipe.license, plan.license) == ("Apache-2.0", "Apache-2.0"), "each says it itself"
    assert plan.olive == recipe.olive
    assert plan.limits == recipe.limits
    (folder / "My-Finetune/README.md").unlink()
    assert wanted("starter", "cpu", source=Path("My-Finetune")).plan.license is None
    assert origin_of(plan, folder / "My-Finetune", None) == str(folder / "My-Finetune")


def test_a_folder_is_planned_estimated_and_examined(folder: Path) -> None:
    plan = json.loads(run("plan", "./My-Finetune", "--full").stdout)
    assert plan["catalogued"] is False
    estimate = json.loads(run("plan", "./My-Finetune", "--estimate").stdout.splitlines()[-1])
    assert estimate["download"] == 0
    assert estimate["exact"] is True
    found = json.loads(run("doctor", "./My-Finetune", "--json").stdout)["findings"]
    assert any(finding["name"] == "memory for my-finetune" for finding in found)
    assert run("fetch", "./My-Finetune").stdout == f"{folder / 'My-Finetune'}\n"


def test_a_plan_has_the_name_of_its_weights(folder: Path) -> None:
    plan = json.loads(run("plan", "starter", "--source", "My-Finetune", "--full").stdout)
    assert (plan["model"], plan["catalogued"]) == ("my-finetune", False)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["plan", "./nowhere"], 4, "there is no such folder"),
        (["plan", "My-Finetune"], 2, "no model 'My-Finetune'"),
        (["optimize", "./My-Finetune", "--source", "./My-Finetune"], 2, "the model is a folder already"),
        (["plan", "./My-Finetune", "--recipe", "none.yaml"], 2, "none.yaml: there is no such file"),
        (["chat", "./My-Finetune"], 6, "no artifact is built"),
    ],
)
def test_bad_input_is_one_clear_message(folder: Path, arguments: list[str], code: int, words: str) -> None:
    error = run(*arguments).exception
    assert isinstance(error, QwenOnnxError)
    assert error.exit_code == code
    assert words in str(error)


def made(
    artifact: Path, source: Path, target: str = "cpu", origin: Path | None = None, precision: str = "int4"
) -> Path:
    """The manifest of an artifact of ``source``, and where that was when ``origin`` says so; nothing is built."""
    plan = json.loads(run("plan", source, "--target", target, "--precision", precision, "--full").stdout)
    files = folder_checksums(source)
    manifest = Manifest.model_validate(
        {
            "key": digest_of(str(artifact)),
            "plan": plan,
            "plan_digest": digest_of(plan),
            "source": {"origin": f"folder {source.name}", "revision": digest_of(files), "files": files},
            "packages": {},
            "python": "3.11",
            "files": {},
            "size_bytes": 0,
            "readback": {},
            "verdict": "PASS",
            "claim": "made up for a test",
            "built_seconds": 0.0,
        }
    )
    artifact.mkdir(parents=True)
    (artifact / "manifest.json").write_text(manifest.model_dump_json())
    if origin:
        record_origin(artifact, manifest.key, str(origin))
    return artifact


@pytest.mark.slow
def test_an_artifact_by_its_model(folder: Path, repository: Path) -> None:
    for name in ("recipes", "pipelines"):
        (folder / name).symlink_to(repository / name)
    place = folder / "artifacts/my-finetune"

    def built(name: str) -> Path:
        return made(place / name, folder / "My-Finetune", origin=folder / "My-Finetune")

    with pytest.raises(ArtifactError, match="a checkpoint, of which no artifact is built") as unbuilt:
        artifact_at("./My-Finetune")
    assert "qwen-onnx optimize ./My-Finetune" in (unbuilt.value.hint or "")
    rejected = built("cpu-int4.rejected")
    with pytest.raises(ConfigError, match=r"no artifact of \./My-Finetune passed") as caught:
        artifact_at("./My-Finetune")
    assert "artifacts/my-finetune/cpu-int4.rejected" in (caught.value.hint or "")
    assert artifact_at(str(rejected)) == rejected, "by its path it is taken"
    good = built("cpu-int4")
    assert artifact_at("./My-Finetune") == good
    built("cpu-int8")
    with pytest.raises(ConfigError, match="several artifacts") as caught:
        artifact_at("./My-Finetune")
    assert "cpu-int4, artifacts/my-finetune/cpu-int8" in (caught.value.hint or "")
    shutil.rmtree(place)
    for text in ("starter", "artifacts/none", "a/b/c"):
        assert artifact_at(text) == Path(text)


def test_a_broken_recipe_is_told_where_a_model_is_looked_up(folder: Path) -> None:
    artifact = made(folder / "artifacts/mine/cpu-int4", folder / "My-Finetune")
    (folder / "recipes").mkdir()
    (folder / "recipes/mine.yaml").write_text("family: mine\nsizes: [{id: mine}]\n")
    for arguments in (["chat", "mine"], ["serve", "./My-Finetune"], ["verify", "Org/Name"], ["package", "starter"]):
        error = run(*arguments).exception
        assert isinstance(error, ConfigError)
        assert "recipes/mine.yaml: architecture: Field required" in error.faults
    assert artifact_at(str(artifact)) == artifact, "by its path it is taken"


@pytest.fixture
def two(folder: Path, repository: Path) -> Path:
    """The working directory with ``a/ft`` and ``b/ft``, which hold other weights, and recipes."""
    for name in ("recipes", "pipelines"):
        (folder / name).symlink_to(repository / name)
    (folder / "a").mkdir()
    (folder / "My-Finetune").rename(folder / "a/ft")
    make_tiny_checkpoint(folder / "b/ft", seed=1, kind="qwen3")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False], ids=["the path is known", "the bytes decide"])
def test_another_folder_of_the_same_name_has_no_artifact(two: Path, known: bool) -> None:
    place = made(two / "artifacts/ft/cpu-int4", two / "a/ft", origin=two / "a/ft" if known else None)
    assert artifact_at("./a/ft") == place
    assert run("where", "./a/ft").stdout == f"{place}\n"
    for refused in (run("where", "./b/ft"), run("chat", "./b/ft"), run("serve", "b/../b/ft/.")):
        assert refused.exit_code != 0
    with pytest.raises(ArtifactError, match=r"no artifact of b/ft: .* made of another folder's weights") as caught:
        artifact_at("./b/ft")
    assert caught.value.where == "artifacts/ft/cpu-int4"
    assert "qwen-onnx optimize b/ft --output FOLDER" in (caught.value.hint or "")
    # another precision is free, and a copy of the same weights may go anywhere
    assert run("where", "./b/ft", "--precision", "int8").stdout == f"{place.with_name('cpu-int8')}\n"
    shutil.copytree(two / "a/ft", two / "c/ft")
    assert artifact_at("./c/ft") == place


def test_a_folder_that_changed_or_is_gone_keeps_its_artifact(two: Path) -> None:
    place = made(two / "artifacts/ft/cpu-int4", two / "a/ft", origin=two / "a/ft")
    make_tiny_checkpoint(two / "a/ft", seed=2, kind="qwen3")
    assert artifact_at("./a/ft") == place
    shutil.rmtree(two / "a/ft")
    assert artifact_at("./a/ft") == place
    with pytest.raises(ArtifactError, match="no artifact of c/ft"):
        artifact_at("./c/ft")


@pytest.mark.parametrize("rejected", [False, True], ids=["published", "rejected"])
def test_optimize_never_replaces_another_folders_artifact(two: Path, rejected: bool) -> None:
    place = two / f"artifacts/ft/cpu-int4{'.rejected' if rejected else ''}"
    made(place, two / "a/ft", origin=two / "a/ft")
    error = run("optimize", "./b/ft", "--no-verify").exception
    assert isinstance(error, ArtifactError)
    assert f"made of other weights: {two}/a/ft; now asked for: {two}/b/ft" in error.what
    assert error.where == str(place)
    assert "--output FOLDER keeps both; --force replaces it" in (error.hint or "")


def test_an_output_below_a_file_is_told(two: Path) -> None:
    (two / "notes").write_text("mine")
    error = run("optimize", "./a/ft", "--output", "notes/out", "--no-verify").exception
    assert isinstance(error, ArtifactError)
    assert error.where == str(two / "notes")


def test_who_may_build_at_a_place(two: Path) -> None:
    """The same folder with other weights, the same weights in another folder, whoever finds a damaged manifest."""
    place = made(two / "artifacts/ft/cpu-int4", two / "a/ft", origin=two / "a/ft")
    manifest = read_manifest(place)
    plan, weights = manifest.plan, manifest.source.revision

    def require(plan: Plan, folder: str, revision: str = "other", *, by_name: bool = True, force: bool = False) -> None:
        origin = origin_of(plan, two / folder, two / "x" if plan.adapter else None)
        require_replaceable(place, plan, origin, [revision], by_name=by_name, force=force)

    require(plan, "a/ft")
    require(plan, "b/ft", weights)
    require(plan, "b/ft", force=True)
    with pytest.raises(ArtifactError, match="made of other weights"):
        require(plan, "b/ft")
    merged = adapted(plan, Adapted(name="x", digest="0" * 64, rank=1))
    with pytest.raises(ArtifactError, match="with the adapter"):
        require(merged.model_copy(update={"model": plan.model}), "a/ft", weights)
    # what is written of another artifact says nothing
    record_origin(place, "another key", str(two / "a/ft"))
    with pytest.raises(ArtifactError, match="folder ft, wherever that was"):
        require(plan, "a/ft")
    (place / "manifest.json").write_text("{}")
    require(plan, "b/ft")
    with pytest.raises(ArtifactError, match="may not be an artifact"):
        require(plan, "b/ft", by_name=False, force=True)


def _of_another_precision(place: Path, folder: Path) -> str:
    made(place, folder, precision="int8")
    return "an artifact of another build is there: ft/cpu-int8; now asked for: ft/cpu-int4"


def _of_another_model(place: Path, folder: Path) -> str:
    made(place, Path(shutil.copytree(folder, folder.with_name("other"))))
    return "an artifact of another build is there: other/cpu-int4; now asked for: ft/cpu-int4"


def _a_folder_of_somebodys(place: Path, folder: Path) -> str:
    place.mkdir()
    (place / "thesis.md").write_text("years of work")
    return "the folder is not empty and holds no artifact"


def _a_file(place: Path, folder: Path) -> str:
    place.write_text("years of work")
    return "a file is there, not a folder"


def _notes_beside_the_artifact(place: Path, folder: Path) -> str:
    made(place, folder, origin=folder)
    (place / "thesis.md").write_text("years of work")
    return "an artifact is there with files that are not its own: thesis.md"


@pytest.mark.parametrize(("suffix", "force"), [("", False), (".rejected", True)], ids=["out", "rejected, --force"])
@pytest.mark.parametrize(
    "there",
    [_of_another_precision, _of_another_model, _a_folder_of_somebodys, _a_file, _notes_beside_the_artifact],
)
def test_an_output_that_holds_something_else_stays(
    two: Path, there: Callable[[Path, Path], str], suffix: str, force: bool
) -> None:
    place = two / f"out{suffix}"
    expected = there(place, two / "a/ft")
    before = {path: path.stat().st_mtime_ns for path in [place, *place.rglob("*")]}
    options = ["--precision", "int4", "--no-verify", *(["--force"] if force else [])]
    error = run("optimize", "./a/ft", "--output", "out", *options).exception
    assert isinstance(error, ArtifactError)
    assert expected in error.what
    assert error.where == str(place)
    assert "another --output" in (error.hint or "")
    assert {path: path.stat().st_mtime_ns for path in [place, *place.rglob("*")]} == before


def test_a_repository_and_a_recipe_are_known_by_the_manifest(two: Path, repository: Path) -> None:
    starter = make_plan(load_catalog(repository), "starter", "cpu")
    assert origin_of(starter, None, None) == "the recipe starter"
    assert origin_of(starter, two / "a/ft", None) == "the recipe starter"
    hub = HubSource(kind="modelscope", repo="Org/Name", revision="master")
    plan = starter.model_copy(update={"sources": (hub,), "catalogued": False})
    assert origin_of(plan, None, None) == "modelscope:org/name"
    place = made(two / "artifacts/org--name/cpu-int4", two / "a/ft")
    manifest = read_manifest(place).model_copy(update={"plan": plan})
    (place / "manifest.json").write_text(manifest.model_dump_json())
    require_replaceable(place, plan, "modelscope:org/name", [], by_name=True, force=False)
    with pytest.raises(ArtifactError, match="modelscope:org/name; now asked for: huggingface:org/name"):
        require_replaceable(place, plan, "huggingface:org/name", [], by_name=True, force=False)


@pytest.mark.slow
def test_make_takes_a_folder_too(folder: Path, repository: Path) -> None:
    """What make would run: the artifact has one safe name, whatever the model is called."""

    def planned(goal: str, model: str, *more: str) -> str:
        tools = Path(sys.executable).parent.parent
        command = ["make", "-n", goal, f"MODEL={model}", f"VENV={tools}", "-o", f"{tools}/.ready", *more]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
        return " ".join(done.stdout.split())

    model = str(folder / "My-Finetune")
    assert f"qwen-onnx optimize '{model}'" in planned("optimize", model)
    assert "/artifacts/my-finetune/cpu-int4' --source" in planned("verify", model)
    assert "/artifacts/my-finetune/cpu-int4'" in planned("chat", model)
    assert "qwen-onnx serve 'artifacts/starter/cpu-int4'" in planned("serve", "starter")
    assert "qwen-onnx package '" in planned("package", "Org/Name")
    assert "/artifacts/org--name/cpu-int4" in planned("package", "Org/Name")
    for goal in ("optimize", "finetune", "release"):
        assert "--recipe 'a b.yaml'" in planned(goal, "mine", "RECIPE=a b.yaml", "DATA=faq.jsonl")
