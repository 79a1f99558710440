"""The choice guide: what it offers fits, and what fits is offered."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_onnx.catalog.load import Catalog, load_catalog
from qwen_onnx.catalog.plan import make_all_plans, make_plan
from qwen_onnx.catalog.schema import Shape
from qwen_onnx.catalog.select import (
    BYTE_UNITS,
    TOKEN_UNITS,
    Wish,
    bytes_needed,
    count,
    matrix,
    parse_amount,
    select,
    target_lines,
    targets_on,
)
from qwen_onnx.errors import ConfigError
from tests.conftest import edit_yaml, run_cli

GB = 10**9


@pytest.fixture(scope="module")
def catalog(repository: Path) -> Catalog:
    return load_catalog(repository)


def test_the_formula_is_that_of_the_starter(catalog: Catalog) -> None:
    """The starter serves 640 tokens with a measured peak of 362 MB."""
    shape = Shape(layers=30, hidden_size=576, heads=9, kv_heads=3, vocab_size=49152, tied=True)
    needed = bytes_needed(make_plan(catalog, "starter", "cpu").model_copy(update={"shape": shape}), 640)
    assert needed == pytest.approx(362e6, rel=0.05)


def test_coders_come_first_and_all_fit(catalog: Catalog) -> None:
    wish = Wish(8 * GB, task="coding", context=32768)
    found = select(catalog, wish, "cpu")
    assert found[0].row.id == "qwen2.5-coder-3b-instruct"
    assert all(choice.bytes_needed <= wish.ram for choice in found)
    assert all((choice.row.context or 0) >= 32768 for choice in found)


@pytest.mark.parametrize(
    ("sense", "named"), [("vision", "qwen2-vl-2b-instruct"), ("audio", "qwen3-asr-0.6b")], ids=["vision", "audio"]
)
def test_a_sense_is_a_condition(catalog: Catalog, sense: str, named: str) -> None:
    found = select(catalog, Wish(8 * GB, task=sense), "cpu")
    assert named in {choice.row.id for choice in found}
    assert all(sense in choice.row.modality.split("+") for choice in found)
    assert {choice.row.id for choice in found} < {choice.row.id for choice in select(catalog, Wish(8 * GB), "cpu")}


def test_a_tower_is_counted_as_it_is_loaded(catalog: Catalog) -> None:
    sees, reads = (make_plan(catalog, name, "cpu") for name in ("qwen2-vl-2b-instruct", "qwen2-1.5b-instruct"))
    more = (bytes_needed(sees, 4096) or 0) - (bytes_needed(reads, 4096) or 0)
    # 665 million weights in float32, and the table of embeddings beside the head
    assert more == pytest.approx(4 * 0.665e9 + 2 * 151936 * 1536, rel=0.1)


def test_more_memory_offers_no_less(catalog: Catalog) -> None:
    small, large = (select(catalog, Wish(ram * GB), "cpu") for ram in (2, 16))
    assert {choice.row.id for choice in small} < {choice.row.id for choice in large}
    assert (large[0].row.parameters or 0) > (small[0].row.parameters or 0)


def test_a_longer_context_needs_more(catalog: Catalog) -> None:
    plan = make_plan(catalog, "qwen3-0.6b", "cpu")
    short, long = bytes_needed(plan, 1024), bytes_needed(plan, 2048)
    assert short
    assert long
    # 28 layers, 8 KV heads of 128, keys and values in fp32: 224 KiB a token
    assert long - short == 1024 * 224 * 1024


def test_commercial_use_leaves_research_licences_out(catalog: Catalog) -> None:
    found = {choice.row.id for choice in select(catalog, Wish(8 * GB, commercial=True), "cpu")}
    assert "qwen2.5-1.5b-instruct" in found
    assert "qwen2.5-3b-instruct" not in found, "its licence is for research"
    assert "qwen2.5-3b-instruct" in {choice.row.id for choice in select(catalog, Wish(8 * GB), "cpu")}


def test_a_language_nobody_lists_is_not_promised(catalog: Catalog) -> None:
    polish = {choice.row.id for choice in select(catalog, Wish(8 * GB, language="pl"), "cpu")}
    assert "qwen2.5-0.5b-instruct" in polish, "29 languages may hold Polish"
    assert "qwen2.5-coder-0.5b-instruct" not in polish, "nothing published"


@pytest.mark.parametrize(("text", "value"), [("8GB", 8 * GB), ("1.5 gib", 3 * 2**29), ("500MB", 5 * 10**8)])
def test_amounts_of_memory(text: str, value: int) -> None:
    assert parse_amount(text, BYTE_UNITS, "--ram") == value


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "nan", "inf", "8Gx", "eight"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--ram"):
        parse_amount(text, BYTE_UNITS, "--ram")


@pytest.mark.parametrize(("weights", "shown"), [(None, ""), (596049920, "596M"), (8e9, "8B"), (2.4e12, "2.4T")])
def test_weights_for_people(weights: int | None, shown: str) -> None:
    assert count(weights) == shown


def test_amounts_of_tokens() -> None:
    assert parse_amount("32k", TOKEN_UNITS, "--context") == 32768


def test_the_command_prints_reasons_and_the_next_command() -> None:
    done = run_cli("select", "--ram", "2GB", "--task", "coding", "--license", "commercial")
    assert done.returncode == 0, done.stderr
    assert "made for coding" in " ".join(done.stdout.split())
    assert "next: make optimize MODEL=qwen2.5-coder-" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--ram", "1MB"], "no model fits"),
        (["--ram", "8GB", "--task", "poetry"], "poetry"),
        (["--ram", "8GB", "--device", "abacus"], "abacus"),
        (["--ram", "much"], "much"),
        (["--ram", "8GB", "--license", "free"], "free"),
    ],
)
def test_bad_wishes_are_one_clear_message(arguments: list[str], word: str) -> None:
    done = run_cli("select", *arguments)
    assert done.returncode == 2
    assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_another_target_has_its_own_cache_and_says_how_it_is_known(repository: Path) -> None:
    catalog = load_catalog(repository)
    wish = Wish(16 * GB, context=32768)
    needed = {target: {c.row.id: c.bytes_needed for c in select(catalog, wish, target)} for target in ("cpu", "cuda")}
    common = set(needed["cpu"]) & set(needed["cuda"])
    assert common
    assert all(needed["cuda"][name] < needed["cpu"][name] for name in common), "an fp16 cache is half as large"
    reasons = select(catalog, wish, "cuda")[0].reasons
    assert "on cuda: numerics on the CPU execution provider; not run on the device" in reasons


@pytest.mark.parametrize("kind", ["cpu", "gpu", "npu"])
def test_a_kind_of_device_stands_for_its_targets(repository: Path, kind: str) -> None:
    catalog = load_catalog(repository)
    names = targets_on(catalog, kind)
    assert names
    assert {catalog.pipeline(name).device for name in names} == {kind}
    found = select(catalog, Wish(8 * GB, "coding"), kind)
    assert {choice.target for choice in found} <= set(names)
    rows = [choice.row.id for choice in found]
    assert len(rows) == len(set(rows)), "a row comes once"
    for choice in found:
        assert choice.target in catalog.targets_of(choice.row)


def test_the_command_of_the_choice_guide_for_an_npu() -> None:
    arguments = (
        "--task",
        "coding",
        "--device",
        "npu",
        "--context",
        "32k",
        "--language",
        "pl",
        "--license",
        "commercial",
    )
    done = run_cli("select", "--ram", "8GB", *arguments)
    assert done.returncode == 0, done.stderr
    assert "TARGET=npu-openvino" in done.stdout


def test_fixed_shapes_hold_the_whole_context(repository: Path) -> None:
    catalog = load_catalog(repository)
    short, long = (select(catalog, Wish(8 * GB, context=tokens), "npu-openvino") for tokens in (1024, 32768))
    assert {c.row.id: c.bytes_needed for c in short}.items() >= {c.row.id: c.bytes_needed for c in long}.items()
    assert not select(catalog, Wish(64 * GB, context=65536), "npu-openvino"), "no artifact there holds so many tokens"


def test_excluded_rows_are_not_chosen(checkout: Path) -> None:
    excluded = {"cuda": {"excluded": "a reason that is long enough"}}
    edit_yaml(checkout / "recipes/qwen3.yaml", lambda d: d["sizes"][0].update(targets=excluded))
    catalog = load_catalog(checkout)
    chosen = {target: {c.row.id for c in select(catalog, Wish(8 * GB), target)} for target in ("cpu", "cuda")}
    assert "qwen3-0.6b" in chosen["cpu"] - chosen["cuda"]


def test_models_that_a_target_lacks_for_one_reason_are_told_in_one_line(catalog: Catalog) -> None:
    lines = target_lines(catalog)
    cuda = lines[next(i for i, line in enumerate(lines) if line.startswith("cuda")) :]
    reason = "the graph of Qwen3MoeForCausalLM was proven on the CPU only, not yet for this provider"
    told = next(line for line in cuda if line.endswith(reason))
    assert told.startswith("  not qwen3-")
    assert " more: " in told
    # two of the CPU, one of the HTP
    assert len([line for line in lines if " in int8" in line]) == 3


def test_the_matrix_names_the_targets_that_have_plans(repository: Path) -> None:
    catalog = load_catalog(repository)
    planned: dict[str, set[str]] = {}
    for plan in make_all_plans(catalog):
        planned.setdefault(plan.model, set()).add(plan.target)
    cells = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in matrix(catalog).splitlines()[2:]}
    for family in catalog.families.values():
        targets = [planned[row.id] for row in family.sizes if row.id in planned]
        named = {name.strip() for name in cells[family.family].split(";")[0].split(",")}
        assert named == (set.intersection(*targets) if targets else {"planned"}), family.family
    assert cells["qwen3-moe"] == "cpu", "experts are offered on the CPU only"
