"""Recipes of the user's own: beside the catalogue's, never in place of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qwen_onnx.catalog.load import load_catalog, own_recipes
from qwen_onnx.catalog.plan import make_plan
from qwen_onnx.cli.app import app
from qwen_onnx.errors import ConfigError, SourceError
from tests.conftest import edit_yaml, run_cli
from tests.fixtures.recipes import write_recipe

SHAPE = {"layers": 24, "hidden_size": 1024, "intermediate_size": 3072, "heads": 16, "kv_heads": 8, "vocab_size": 1000}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipes/mine.yaml")


def test_a_recipe_of_ones_own_adds_a_model(repository: Path, recipe: Path) -> None:
    catalog = load_catalog(repository, [recipe])
    plan = make_plan(catalog, "mine-1b", "cpu")
    assert plan.catalogued is False
    assert plan.asked == "./mine"
    assert make_plan(catalog, "starter", "cpu") == make_plan(load_catalog(repository), "starter", "cpu")
    assert (catalog.is_catalogued("mine-1b"), catalog.is_catalogued("starter")) == (False, True)


def test_recipes_of_the_working_directory_are_found_and_those_of_the_checkout_are_not_ones_own(
    repository: Path, recipe: Path
) -> None:
    assert own_recipes(repository, recipe.parent.parent) == [recipe]
    assert own_recipes(repository, repository) == []
    assert own_recipes(repository, recipe.parent) == []


def test_two_models_of_one_name_are_a_fault_with_both_files(repository: Path, recipe: Path) -> None:
    edit_yaml(recipe, lambda family: family["sizes"][0].update(id="qwen3-0.6b"))
    with pytest.raises(ConfigError) as caught:
        load_catalog(repository, [recipe])
    [fault] = caught.value.faults
    assert str(recipe) in fault
    assert "id already used in recipes/qwen3.yaml" in fault


def test_faults_of_ones_own_recipe_name_its_file(repository: Path, recipe: Path, tmp_path: Path) -> None:
    edit_yaml(recipe, lambda family: family["sizes"][0].update(licence="MIT"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(ConfigError) as caught:
        load_catalog(repository, [recipe, broken, tmp_path / "nowhere.yaml"])
    assert f"{recipe}: sizes.mine-1b.licence: unknown key" in caught.value.faults
    assert any(fault.startswith(f"{broken}: not valid YAML") for fault in caught.value.faults)
    assert f"{tmp_path}/nowhere.yaml: there is no such file" in caught.value.faults


def test_a_file_of_the_same_path_as_one_of_the_catalogue_is_told_apart(
    repository: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe.rename(recipe.with_name("qwen3.yaml"))
    catalog = load_catalog(repository, own_recipes(repository, tmp_path))
    assert catalog.own == {"./recipes/qwen3.yaml"}
    assert {"mine-1b", "qwen3-0.6b"} <= catalog.rows.keys()


def said(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("given", [False, True], ids=["of the working directory", "given"])
def test_list_and_select_show_them_as_ones_own(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here if given else tmp_path)
    more, file = (["--recipe", recipe], str(recipe)) if given else ([], "recipes/mine.yaml")
    if given:
        assert isinstance(said("list", "mine").exception, ConfigError)
    shown = said("list", "mine", *more).stdout
    assert "mine-1b (own)" in shown
    assert f"own, not in the catalogue: mine-1b of {file}\n" in shown
    assert "(own)" not in said("list", "qwen3-0.6b", *more).stdout
    models = json.loads(said("list", "--json", *more).stdout)["models"]
    assert {(model["id"], model["recipe"]) for model in models if not model["catalogued"]} == {("mine-1b", file)}

    wish = "select", "--ram", "3GB", "--license", "commercial", "--most", "500"
    left_out = said(*wish, *more)
    assert "mine-1b" not in left_out.stdout
    edit_yaml(recipe, lambda family: family["sizes"][0].update(shape=SHAPE))
    shown = said(*wish, *more).stdout
    assert "mine-1b (own)" in shown
    assert "None" not in shown
    choices = json.loads(said(*wish, "--json", *more).stdout)["choices"]
    assert {(one["model"], one["recipe"]) for one in choices if not one["catalogued"]} == {("mine-1b", file)}


def test_select_says_how_ones_own_is_built_and_why_it_is_left_out(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent.parent)
    done = run_cli("select", "--ram", "40GB", cwd=recipe.parent.parent)
    assert "mine-1b of recipes/mine.yaml is left out: without the sizes in `shape`" in " ".join(done.stderr.split())
    edit_yaml(recipe, lambda family: family["sizes"][0].update(shape=SHAPE, kind="chat", tasks=["math"]))
    edit_yaml(recipe, lambda family: family["sizes"][0].update(parameters=10**12))
    following = json.loads(said("select", "--ram", "3GB", "--task", "math", "--json").stdout)["next"]
    assert following == "qwen-onnx optimize mine-1b --target cpu --recipe recipes/mine.yaml --source path/to/mine"


@pytest.mark.slow
def test_the_command_line_takes_them(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = json.loads(said("plan", "mine-1b", "--full").stdout)
    assert plan["catalogued"] is False
    twice = said("plan", "mine-1b", "--full", "--recipe", recipe)
    assert json.loads(twice.stdout) == plan, "one file, though it was named twice"
    refused = said("fetch", "mine-1b")
    assert isinstance(refused.exception, SourceError)
    assert "in a folder of that name" in refused.exception.what
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert isinstance(said("plan", "mine-1b").exception, ConfigError)
    assert json.loads(said("plan", "mine-1b", "--full", "--recipe", recipe).stdout) == plan
