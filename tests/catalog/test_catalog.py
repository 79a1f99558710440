"""Recipes and pipelines: what is wrong is named, all of it, and nothing runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from qwen_onnx.catalog.generated import committed_files
from qwen_onnx.catalog.load import RELEASE_FILE, load_catalog
from qwen_onnx.catalog.plan import make_all_plans, make_plan
from qwen_onnx.errors import ConfigError
from qwen_onnx.release import matrix
from tests.conftest import edit_int4, edit_yaml


def test_every_recipe_has_a_plan_on_every_target(repository: Path) -> None:
    catalog = load_catalog(repository)
    buildable = [name for name, (_, row) in catalog.rows.items() if not row.planned]
    assert {"starter", "qwen2.5-0.5b-instruct", "qwen3-0.6b"} <= set(buildable)
    found = {(plan.model, plan.target, plan.precision) for plan in make_all_plans(catalog)}
    for name in buildable:
        for target, pipeline in catalog.pipelines.items():
            override = catalog.rows[name][1].targets.get(target)
            for precision in pipeline.precisions:
                without = override and (override.excluded or override.without.get(precision))
                assert ((name, target, precision) in found) != bool(without), "a plan, or a reason why not"
    assert len(catalog.rows) == 198, "a row was added or lost: correct this number"


def test_the_lock_names_every_row(repository: Path) -> None:
    catalog = load_catalog(repository)
    lines = (repository / "recipes/plans.lock").read_text().splitlines()
    assert {line.split()[0] for line in lines} == {"*", *catalog.rows}
    for line in lines:
        place, _, reason = line.partition(" - ")
        model, *rest = place.split()
        if not reason:
            target, precision, digest = rest
            assert precision in catalog.pipelines[target].precisions
            assert len(digest) == 64
        elif model == "*":
            assert reason == catalog.pipelines[rest[0]].unavailable[rest[1]]  # type: ignore[index]
        elif not rest:
            assert reason == catalog.rows[model][1].planned
        else:
            override = catalog.rows[model][1].targets[rest[0]]
            assert reason == (override.without[rest[1]] if rest[1:] else override.excluded)  # type: ignore[index]


def test_a_planned_row_is_refused_with_its_reason(repository: Path) -> None:
    with pytest.raises(ConfigError, match="audio encoder attends within chunks of two seconds"):
        make_plan(load_catalog(repository), "qwen2.5-omni-7b", "cpu")


def test_each_fact_has_a_source(repository: Path) -> None:
    for name, (_, row) in load_catalog(repository).rows.items():
        assert "default" in row.read_in, name


def test_large_models_have_tighter_limits(repository: Path) -> None:
    catalog = load_catalog(repository)
    found = [make_plan(catalog, name, "cpu").limits.kld_mean for name in ("qwen3-0.6b", "qwen3-4b", "qwen3-8b")]
    assert found == [0.18, 0.06, 0.05]


def test_targets_that_round_alike_have_one_limit(repository: Path) -> None:
    catalog = load_catalog(repository)
    found = {
        target: make_plan(catalog, "qwen3-1.7b", target, "int4").limits.kld_mean
        for target in catalog.pipelines
        if catalog.pipelines[target].precisions
    }
    coarser = {"npu-openvino": 0.12, "npu-qnn": 0.12, "trt-rtx": 0.12}
    assert found == {"cpu": 0.06, "cuda": 0.06, "dml": 0.06, "webgpu": 0.06, **coarser}


def test_a_limit_by_size_that_does_not_exist_is_a_fault(checkout: Path) -> None:
    edit_int4(checkout / "pipelines/cpu.yaml", lambda d: d["larger"][0]["limits"].update(kldd=1))
    with pytest.raises(ConfigError, match=r"int4\.larger\.limits\.kldd: unknown key"):
        make_plan(load_catalog(checkout), "starter", "cpu")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"revision": "main"}, "not a commit id"),
        ({"revision": "C1899DE289A04D12100DB370D81485CDF75E47CA"}, "not a commit id"),
        ({"repo": "no-slash"}, "repo"),
    ],
)
def test_sources_are_pinned(checkout: Path, change: dict[str, str], expected: str) -> None:
    edit_yaml(checkout / "recipes/qwen3.yaml", lambda d: d["sizes"][0]["sources"][0].update(change))
    with pytest.raises(ConfigError, match=expected):
        load_catalog(checkout)


def test_one_id_in_two_families_is_a_fault(checkout: Path) -> None:
    edit_yaml(checkout / "recipes/qwen3.yaml", lambda d: d["sizes"][0].update(id="starter"))
    with pytest.raises(ConfigError, match=r"sizes.starter: id already used in recipes/qwen3.yaml"):
        load_catalog(checkout)


def test_a_row_for_an_architecture_that_nobody_exports_is_a_fault(checkout: Path) -> None:
    edit_yaml(checkout / "recipes/qwen3.yaml", lambda d: d.update(architecture="Qwen9ForCausalLM"))
    with pytest.raises(ConfigError, match=r"'Qwen9ForCausalLM' cannot be exported; known: .*Qwen2ForCausalLM"):
        load_catalog(checkout)


def test_a_row_without_its_size_has_to_say_why(checkout: Path) -> None:
    edit_yaml(checkout / "recipes/qwen3.yaml", lambda d: d["sizes"][0].pop("parameters"))
    with pytest.raises(ConfigError, match=r"parameters missing: without them the row needs `planned`"):
        load_catalog(checkout)


def test_generated_files_are_not_stale(repository: Path) -> None:
    catalog = load_catalog(repository)
    for name, text in (committed_files(catalog) | matrix.committed_files(catalog)).items():
        assert (repository / name).read_text() == text, f"{name} is stale: make plans"


@pytest.mark.slow
def test_an_edit_of_a_pipeline_makes_the_lock_stale(checkout: Path) -> None:
    before = committed_files(load_catalog(checkout))["recipes/plans.lock"]
    edit_int4(checkout / "pipelines/cpu.yaml", lambda d: d["limits"].update(kld_mean=0.17))
    after = committed_files(load_catalog(checkout))["recipes/plans.lock"]
    moved = [old for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new]
    assert moved
    # larger models have limits of their own
    assert {tuple(line.split()[1:3]) for line in moved} == {("cpu", "int4")}


def test_all_faults_are_reported_together_with_file_and_key(checkout: Path) -> None:
    def break_row(data: dict) -> None:
        data["sizes"][0]["licence"] = "MIT"
        data["sizes"][0]["parameters"] = "many"

    edit_yaml(checkout / "recipes/qwen3.yaml", break_row)
    edit_yaml(checkout / "pipelines/cpu.yaml", lambda d: d.update(stepz=[]))
    with pytest.raises(ConfigError) as caught:
        load_catalog(checkout)
    text = "\n".join(caught.value.faults)
    assert "recipes/qwen3.yaml: sizes.qwen3-0.6b.licence: unknown key" in text
    assert "recipes/qwen3.yaml: sizes.qwen3-0.6b.parameters" in text
    assert "pipelines/cpu.yaml: stepz: unknown key" in text
    assert caught.value.exit_code == 2


def test_unknown_pass_option_and_pass_are_faults(checkout: Path) -> None:
    def break_steps(data: dict) -> None:
        data["steps"][1]["config"]["int4_block_size"] = 32
        data["steps"].append({"name": "magic", "type": "Magic"})

    edit_int4(checkout / "pipelines/cpu.yaml", break_steps)
    with pytest.raises(ConfigError) as caught:
        make_plan(load_catalog(checkout), "starter", "cpu")
    text = "\n".join(caught.value.faults)
    assert "int4_block_size: unknown key" in text
    assert "steps.magic.type: no pass 'Magic'" in text


@pytest.mark.parametrize(
    "address", ["steps.bild.block_size", "steps.build.blocksize", "steps.build", "limits.kld", "build", "a.b.c"]
)
def test_an_override_that_matches_nothing_is_a_fault(checkout: Path, address: str) -> None:
    override = {"cpu": {"why": "a reason that is long enough", "set": {address: 64}}}
    edit_yaml(checkout / "recipes/starter.yaml", lambda d: d["sizes"][0].update(targets=override))
    with pytest.raises(ConfigError, match="matches nothing"):
        make_plan(load_catalog(checkout), "starter", "cpu")


def test_an_override_is_applied_and_checked(checkout: Path) -> None:
    override = {"cpu": {"why": "a reason that is long enough", "set": {"limits.kld_mean": 0.1}}}
    edit_yaml(checkout / "recipes/starter.yaml", lambda d: d["sizes"][0].update(targets=override))
    assert make_plan(load_catalog(checkout), "starter", "cpu").limits.kld_mean == 0.1
    override["cpu"]["set"] = {"limits.kld_mean": -1}
    edit_yaml(checkout / "recipes/starter.yaml", lambda d: d["sizes"][0].update(targets=override))
    with pytest.raises(ConfigError, match="kld_mean"):
        make_plan(load_catalog(checkout), "starter", "cpu")


def override_starter(checkout: Path, changes: dict, **family: str) -> None:
    """Give the starter's row an override for cpu, and its family other facts."""
    override = {"cpu": {"why": "a reason that is long enough", "set": changes}}

    def change(data: dict) -> None:
        data.update(family)
        data["sizes"][0].update(targets=override)

    edit_yaml(checkout / "recipes/starter.yaml", change)


def test_an_override_may_leave_a_step_out(checkout: Path) -> None:
    override_starter(checkout, {"steps.quantize": None, "steps.build.block_size": 64})
    passes = make_plan(load_catalog(checkout), "starter", "cpu").olive["passes"]
    assert list(passes) == ["build", "pack"]
    assert passes["build"]["block_size"] == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps.quantise": None}, "steps.quantise: matches nothing"),
        ({"limits": None}, "limits: matches nothing"),
        ({"steps.quantize": None, "steps.build": None, "steps.pack": None}, "no step is left"),
        ({"steps.quantize": None, "steps.quantize.refinements": 2}, "steps.quantize.refinements: matches nothing"),
    ],
)
def test_a_step_that_is_not_there_cannot_be_left_out(checkout: Path, changes: dict, message: str) -> None:
    override_starter(checkout, changes)
    with pytest.raises(ConfigError, match=message):
        make_plan(load_catalog(checkout), "starter", "cpu")


def test_a_quantiser_that_cannot_see_the_experts_is_a_fault(checkout: Path) -> None:
    override_starter(checkout, {"limits.kld_mean": 0.1}, architecture="Qwen3MoeForCausalLM")
    with pytest.raises(ConfigError, match=r"cannot quantise a Qwen3MoeForCausalLM; set: \{steps.quantize: null\}"):
        make_plan(load_catalog(checkout), "starter", "cpu", "int8")
    # what int4 takes sees them
    assert "quantize" in make_plan(load_catalog(checkout), "starter", "cpu").olive["passes"]
    override_starter(checkout, {"steps.quantize": None}, architecture="Qwen3MoeForCausalLM")
    assert list(make_plan(load_catalog(checkout), "starter", "cpu").olive["passes"]) == ["build", "pack"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("family: [", "not valid YAML"),
        ("family: a\nfamily: b\n", "appears twice"),
        ("", "valid dictionary"),
        ("- 1\n", "valid dictionary"),
        ("family: x\narchitecture: Qwen9\nsizes: []\n", "sizes: Tuple should have at least 1 item"),
    ],
)
def test_files_that_are_no_recipes(checkout: Path, text: str, expected: str) -> None:
    (checkout / "recipes/new.yaml").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_catalog(checkout)


def test_unknown_names_suggest_the_nearest(repository: Path) -> None:
    catalog = load_catalog(repository)
    with pytest.raises(ConfigError, match=r"did you mean .*qwen3-0.6b"):
        make_plan(catalog, "qwen3-0.6", "cpu")
    with pytest.raises(ConfigError, match="no target 'cuda9'"):
        make_plan(catalog, "starter", "cuda9")


def test_an_unknown_model_names_five_at_most(repository: Path) -> None:
    catalog = load_catalog(repository)
    for unknown in ("gpt-oss", "Qwen3-Instruct", "!"):
        with pytest.raises(ConfigError) as raised:
            catalog.row(unknown)
        named = [model for model in catalog.rows if model in re.split(r"[ ,?\n]+", str(raised.value))]
        assert 1 <= len(named) <= 5, raised.value


@pytest.mark.slow
def test_json_schemas_accept_what_is_committed_and_reject_typos(repository: Path) -> None:
    import jsonschema  # it compiles a grammar of its formats for seconds, which each worker would wait for

    for folder, name in (("recipes", "recipe"), ("pipelines", "pipeline"), ("pipelines/variants", "variants")):
        schema = json.loads((repository / f"recipes/{name}.schema.json").read_text())
        for path in sorted((repository / folder).glob("*.yaml")):
            if path == repository / RELEASE_FILE:
                continue
            data = yaml.safe_load(path.read_text())
            jsonschema.validate(data, schema)
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(data | {"typo": 1}, schema)


def test_the_plan_holds_a_complete_olive_config(repository: Path) -> None:
    plan = make_plan(load_catalog(repository), "starter", "cpu")
    assert set(plan.olive) >= {"input_model", "systems", "passes", "output_dir", "cache_dir"}
    assert all("type" in step for step in plan.olive["passes"].values())
    assert str(repository) not in json.dumps(plan.model_dump(mode="json"))
