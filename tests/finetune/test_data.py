"""Examples as strangers write them: every wrong line is told, with its number, and all of them together."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from qwen_onnx.errors import TrainingError
from qwen_onnx.finetune import data as room
from qwen_onnx.finetune.data import read_data


def _file(folder: Path, *lines: object) -> Path:
    path = folder / "examples.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def _asked(*roles: str) -> dict[str, object]:
    return {"messages": [{"role": role, "content": f"{role} speaks"} for role in roles]}


def test_both_forms_are_read(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        _asked("system", "user", "assistant", "user", "assistant"),
        "",
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello."},
        {"retain": "Rain falls."},
        {"retain": _asked("user", "assistant")["messages"]},
    )
    found = read_data(path)
    assert [example.line for example in found.examples] == [1, 3, 4]
    assert [turn["role"] for turn in found.examples[0].messages] == ["system", *("user", "assistant") * 2]
    assert [turn["content"] for turn in found.examples[1].messages] == ["Add.\n\n1 and 2", "3"]
    assert found.examples[2].messages[0]["content"] == "Greet."
    assert [line.line for line in found.retained] == [5, 6]
    assert found.retained[0].said == "Rain falls."
    assert [turn["role"] for turn in found.retained[1].said] == ["user", "assistant"]
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


WRONG = {
    '{"messages": [': "is not JSON",
    "[1]": "is not an object",
    '{"instruction": "a", "instruction": "b", "output": "c"}': "same key twice",
    '{"instruction": "a", "output": "b", "text": "c"}': "unknown key 'text'",
    '{"instruction": "a"}': "output is missing",
    '{"instruction": " ", "output": "b"}': "instruction is not a text",
    '{"instruction": "a", "output": 7}': "output is not a text",
    '{"instruction": "a", "input": 7, "output": "b"}': "input is not a text",
    '{"retain": ""}': "retain is not a text",
    '{"retain": {"role": "user"}}': "retain is not a text",
    '{"retain": []}': "not a list of messages",
    '{"retain": [{"role": "user", "content": "a"}]}': "an answer last",
    '{"retain": "a", "output": "b"}': "unknown key 'output'",
    '{"messages": []}': "not a list of messages",
    '{"messages": [1]}': "message 1: it is not an object",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}': "message 2: content is",
    '{"messages": [{"role": "user", "text": "a"}]}': "message 1: content is missing; unknown key 'text'",
    json.dumps(_asked("user", "tool")): "message 2: the role is 'tool'",
    json.dumps(_asked("assistant", "user")): "roles out of order: assistant, user",
    json.dumps(_asked("user", "assistant", "system")): "roles out of order",
    json.dumps(_asked("user", "user", "assistant")): "roles out of order",
    json.dumps(_asked("user")): "an answer last",
    json.dumps(_asked("system")): "roles out of order",
}


def test_every_wrong_line_is_told_with_its_number(tmp_path: Path) -> None:
    path = _file(tmp_path, _asked("user", "assistant"), *WRONG, _asked("user", "assistant"))
    with pytest.raises(TrainingError) as caught:
        read_data(path)
    told = str(caught.value)
    assert f"{len(WRONG)} lines cannot be learnt from" in told
    for number, reason in enumerate(WRONG.values(), 2):
        [line] = [line for line in told.splitlines() if line.startswith(f"  - line {number}: ")]
        assert reason in line
    assert "line 1:" not in told


def test_a_flood_of_wrong_lines_is_cut(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="200 lines") as caught:
        read_data(_file(tmp_path, *["x"] * 200))
    assert "and 160 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 60


def test_a_byte_order_mark_and_line_ends_of_windows_are_passed_over(tmp_path: Path) -> None:
    path = _file(tmp_path, {"instruction": "Greet.", "output": "Hello."}, _asked("user", "assistant"))
    plain = read_data(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    found = read_data(path)
    assert found.examples == plain.examples
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_told_as_one_not_line_by_line(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "faq.json"
    path.write_text("\n" + json.dumps([{"instruction": "a", "output": "b"}] * 30, indent=indent))
    with pytest.raises(TrainingError, match="a JSON array, not JSONL") as caught:
        read_data(path)
    assert str(caught.value.hint).endswith("jq -c '.[]' faq.json > faq.jsonl")
    assert "line 1" not in str(caught.value)


def test_nothing_is_not_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no example"):
        read_data(_file(tmp_path, "", " "))
    with pytest.raises(TrainingError, match="no example"):
        read_data(_file(tmp_path, {"retain": "Rain falls."}))
    with pytest.raises(TrainingError, match="missing"):
        read_data(tmp_path / "none.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "examples.jsonl")
    with pytest.raises(TrainingError, match="not a plain file"):
        read_data(tmp_path / "link")


def test_a_line_without_an_end_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LONGEST_LINE", 1000)
    with pytest.raises(TrainingError, match="line 2 passes a limit"):
        read_data(_file(tmp_path, _asked("user", "assistant"), {"instruction": "a" * 2000, "output": "b"}))
