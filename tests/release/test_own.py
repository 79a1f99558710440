"""Releases of models that recipes of the user's own describe: the jobs have the recipe, wherever they run."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import UNCATALOGUED, make_plan
from qwen_onnx.release.job import Task, run_job
from qwen_onnx.release.matrix import ReleaseJob, load_matrix
from qwen_onnx.release.store import code_key, job_key
from tests.conftest import edit_yaml, run_cli
from tests.release.conftest import last_line, own_recipe, release_command, write_matrix
from tests.release.test_release import read_release

MINE = {"models": ["mine"], "precisions": ["fp32"]}


def jobs_of(repository: Path, matrix: Path, recipe: Path) -> dict[str, tuple[ReleaseJob, str]]:
    """The jobs by their model, with their keys."""
    catalog = load_catalog(repository, [recipe])
    found = {}
    for job in load_matrix(catalog, matrix):
        plan = make_plan(catalog, job.model, job.target, job.precision)
        key = job_key(job, plan, matrix.parent, None, code_key(plan, None))
        found[job.model] = job, key
    return found


def test_an_edited_recipe_is_another_job_and_a_moved_one_is_not(repository: Path, tmp_path: Path) -> None:
    recipe, matrix = own_recipe(tmp_path / "a/mine.yaml"), write_matrix(tmp_path, {"models": ["starter", "mine"]})
    before = jobs_of(repository, matrix, recipe)
    assert before["mine"][0].recipe == recipe.read_text()
    assert before["starter"][0].recipe is None
    moved = recipe.rename(tmp_path / "other.yaml")
    assert jobs_of(repository, matrix, moved) == before
    # no step of a build reads it, so that the plan stays the same: the card does
    edit_yaml(moved, lambda family: family["sizes"][0].update(languages=["la"]))
    after = jobs_of(repository, matrix, moved)
    assert after["mine"][1] != before["mine"][1]
    assert after["starter"] == before["starter"]


def test_a_worker_needs_no_file_of_the_recipe(repository: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """As far as the first step, which its bound ends; the task comes as text, as it comes to a worker of Ray."""
    recipe, matrix = own_recipe(tmp_path / "mine.yaml"), write_matrix(tmp_path, MINE | {"memory": "0.001MB"})
    catalog = load_catalog(repository, [recipe])
    [job] = load_matrix(catalog, matrix)
    code = code_key(make_plan(catalog, "mine", "cpu", "fp32"), tiny_checkpoint)
    places = {"artifacts": tmp_path / "artifacts", "cache": tmp_path / "cache", "source": tiny_checkpoint}
    told = Task(job=job, root=repository, code=code, **places).model_dump_json()
    text = recipe.read_text()
    recipe.unlink()
    folder = tmp_path / "attempt"
    folder.mkdir()
    result = run_job(Task.model_validate_json(told), folder, lambda _: None)
    assert result.stage == "optimize", result.fault
    [given] = folder.glob("*.yaml")
    assert given.read_text() == text
    assert f"--recipe {given}" in (folder / "job.log").read_text()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for a release, with a cache of its own."""
    monkeypatch.setenv("QWEN_ONNX_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
def test_recipes_of_the_working_directory_and_those_given(place: Path, tiny_checkpoint: Path) -> None:
    """As far as the job's first step, which its bound ends."""
    recipe = own_recipe(place / "work/recipes/mine.yaml")
    matrix = write_matrix(place, MINE | {"memory": "0.001MB"})
    command = release_command(place, tiny_checkpoint, matrix, model="mine")
    unknown = run_cli(*command, cwd=place)
    assert unknown.returncode == 2
    assert "matrix.0: recipes/: no model 'mine'" in unknown.stderr
    for done in (run_cli(*command, cwd=place / "work"), run_cli(*command, "--recipe", recipe, cwd=place)):
        assert done.returncode == 12
        assert "mine/cpu-fp32: FAILED: optimize" in done.stderr
    edit_yaml(recipe, lambda family: family["sizes"][0].update(licence="MIT"))
    broken = run_cli(*command, cwd=place / "work")
    assert broken.returncode == 2
    assert "recipes/mine.yaml: sizes.mine.licence: unknown key" in broken.stderr


@pytest.mark.release
def test_a_release_of_ones_own_recipe(place: Path, tiny_checkpoint: Path) -> None:
    recipe = own_recipe(place / "recipes/mine.yaml")
    command = release_command(place, tiny_checkpoint, write_matrix(place, MINE), model="mine")
    done = run_cli(*command, cwd=place)
    assert done.returncode == 0, done.stderr
    [job] = read_release(place / "release").jobs
    assert (job.name, job.passed) == ("mine/cpu-fp32", True)
    assert UNCATALOGUED in (job.claim or "")
    moved = recipe.rename(place / "moved.yaml")
    assert last_line(run_cli(*command, "--recipe", moved, cwd=place))["cached"] == 1
    edit_yaml(moved, lambda family: family["sizes"][0].update(languages=["la"]))
    done = run_cli(*command, "--recipe", moved, cwd=place)
    assert done.returncode == 0, done.stderr
    assert last_line(done)["cached"] == 0
