"""Each rule has a package that breaks it, and it alone; a whole package breaks none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from qwen_onnx.errors import PackageError
from qwen_onnx.package.registry import RULES
from qwen_onnx.package.rules import broken_rules, check_rules
from tests.package.conftest import edit_json

GENAI, SIDECAR, INFERENCE = "genai_config.json", "foundry_local.json", "inference_model.json"
TOKENIZER_CONFIG, RECORD = "tokenizer_config.json", "package.json"
Spoil = Callable[[Path], object]


def strings(**changes: Any) -> Spoil:
    """Change string properties; None takes one away."""
    return lambda folder: edit_json(folder / SIDECAR, lambda data: change(data["string_properties"], changes))


def ints(**changes: Any) -> Spoil:
    return lambda folder: edit_json(folder / SIDECAR, lambda data: change(data["int_properties"], changes))


def model(**changes: Any) -> Spoil:
    return lambda folder: edit_json(folder / GENAI, lambda data: change(data["model"], changes))


def record(**changes: Any) -> Spoil:
    return lambda folder: edit_json(folder / RECORD, lambda data: change(data, changes))


def change(data: dict[str, Any], changes: dict[str, Any]) -> None:
    data |= changes
    for key in [key for key, value in changes.items() if value is None]:
        del data[key]


def both(*spoils: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in spoils]


def renamed(new: str) -> Spoil:
    """The same id everywhere, and the folder called after it; a later rule may see that it is none."""

    def spoil(folder: Path) -> Path:
        both(
            record(id=new),
            lambda place: edit_json(place / SIDECAR, lambda data: data.update(model_id=new)),
            lambda place: edit_json(place / INFERENCE, lambda data: data.update(Name=new)),
        )(folder)
        return folder.rename(folder.with_name(new.replace(":", "-")))

    return spoil


def lengths(context: int, longest: int) -> Spoil:
    return both(
        model(context_length=context),
        lambda folder: edit_json(folder / GENAI, lambda data: data["search"].update(max_length=longest)),
    )


def template(text: str, prompt: str | None = None) -> Spoil:
    """Another chat template, with the prompt template that it gives."""

    def spoil(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(text)
        wanted = {"assistant": "{Content}", "prompt": prompt or text}
        edit_json(folder / INFERENCE, lambda data: data.update(PromptTemplate=wanted))

    return spoil


def add_tokens(*contents: str) -> Spoil:
    """Special tokens behind the 258 that the tiny tokenizer has."""

    def spoil(folder: Path) -> None:
        def add(data: dict[str, Any]) -> None:
            like = data["added_tokens"][0]
            data["added_tokens"] += [
                like | {"id": 258 + index, "content": content} for index, content in enumerate(contents)
            ]

        edit_json(folder / "tokenizer.json", add)

    return spoil


def external(location: str) -> Spoil:
    """The graph reads its weights from another place."""

    def spoil(folder: Path) -> None:
        graph = onnx.load(folder / "model.onnx", load_external_data=False)
        for tensor in graph.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        (folder / "model.onnx").write_bytes(graph.SerializeToString())

    return spoil


TOOLS = both(
    strings(tool_call_start="<tool_call>", tool_call_end="</tool_call>", capabilities="chat,tool-calling"),
    ints(supports_tool_calling=1),
)
WITH_TOOLS = "{# <tool_call> </tool_call> #}{{ messages[0]['content'] }}"
ADDED = add_tokens("<tool_call>", "</tool_call>")
IDS = model(bot_token_id=258, eot_token_id=259)

BROKEN: dict[str, list[Spoil]] = {
    "readable": [
        lambda folder: (folder / TOKENIZER_CONFIG).write_text("{"),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "model.onnx").write_bytes(b"no graph"),
        lambda folder: edit_json(folder / GENAI, lambda data: data["model"].pop("decoder")),
        lambda folder: (folder / SIDECAR).write_text("[]"),
        model(tokenizer_dir="sha256:00"),
        model(bos_token_id="0"),
    ],
    "id": [renamed("checkpoint-int4-generic-cpu:01"), renamed("checkpoint+int4-generic-cpu:1")],
    "suffix": [renamed("checkpoint-int4-cuda-gpu:1"), renamed("checkpoint-int4:1")],
    "one-name": [
        lambda folder: edit_json(folder / INFERENCE, lambda data: data.update(Name="starter")),
        lambda folder: edit_json(folder / SIDECAR, lambda data: data.update(model_id="other-generic-cpu:1")),
    ],
    "folder-name": [lambda folder: folder.rename(folder.with_name("checkpoint-int4-generic-cpu-2"))],
    "task": [strings(task="text-generation"), strings(task=None), strings(task="vision-language-chat")],
    "modalities": [strings(input_modalities="text,image"), strings(output_modalities="text,audio")],
    "properties": [strings(foreign="x"), ints(context=1), strings(parent_uri=3), strings(parent_uri="a\0b")],
    "needed-properties": [strings(display_name=None), strings(min_fl_version=None)],
    "licence": [strings(license=None)],
    "size": [ints(filesize_mb=900), ints(filesize_mb=None)],
    "unverified": [
        strings(display_name="SmolLM2-135M-Instruct as Qwen2 (int4, cpu)"),
        record(unverified=False),
        record(verdict="PASS", unverified=False),
    ],
    "flat": [lambda folder: (folder / "v2").mkdir()],
    "download-marker": [lambda folder: (folder / "download.tmp").touch()],
    "external-data": [
        lambda folder: (folder / "model.onnx.data").rename(folder / "elsewhere"),
        both(
            external("../model.onnx.data"),
            lambda folder: (folder / "model.onnx.data").rename(folder.parent / "model.onnx.data"),
        ),
        lambda folder: (folder / "model.onnx.data").write_bytes(b"0" * 1_000_001),
    ],
    "stray": [lambda folder: (folder / "old.onnx").touch(), lambda folder: (folder / "adapter.safetensors").touch()],
    "template": [
        lambda folder: (folder / "chat_template.jinja").unlink(),
        lambda folder: edit_json(folder / TOKENIZER_CONFIG, lambda data: data.update(chat_template="{{ 1 }}")),
    ],
    "prompt-template": [
        lambda folder: edit_json(folder / INFERENCE, lambda data: data.update(PromptTemplate=None)),
        template("{% if %}"),
        template("{{ raise_exception('no') }}"),
    ],
    "tokenizer-class": [
        lambda folder: edit_json(folder / TOKENIZER_CONFIG, lambda data: data.pop("tokenizer_class")),
        lambda folder: edit_json(folder / TOKENIZER_CONFIG, lambda data: data.update(tokenizer_class="SpmTokenizer")),
    ],
    "lengths": [lengths(8192, 8193), lengths(8193, 8192), lengths(8192, 0)],
    "output-length": [ints(max_output_tokens=8192), ints(max_output_tokens=0)],
    "reserve": [both(lengths(2048, 2048), ints(max_output_tokens=512))],
    "provider": [
        lambda folder: edit_json(
            folder / GENAI,
            lambda data: data["model"]["decoder"]["session_options"].update(provider_options=[{"cuda": {}}]),
        ),
        strings(execution_provider="CUDAExecutionProvider"),
        strings(device_type=None),
    ],
    "token-ids": [model(eos_token_id=0), model(pad_token_id=288), model(eos_token_id=[])],
    "marker-pairs": [
        both(ADDED, IDS, template(WITH_TOOLS, "{Content}"), TOOLS, ints(supports_tool_calling=0)),
        ints(supports_reasoning=1),
        strings(capabilities="chat,reasoning"),
    ],
    "marker-tokens": [both(template(WITH_TOOLS, "{Content}"), TOOLS)],
    "marker-use": [both(ADDED, IDS, TOOLS)],
    "marker-ids": [
        both(ADDED, template(WITH_TOOLS, "{Content}"), TOOLS),
        both(ADDED, template(WITH_TOOLS, "{Content}"), TOOLS, model(bot_token_id=259, eot_token_id=258)),
        model(bor_token_id=2),
    ],
    "cli1-keys": [both(record(profile="cli1"), model(eot_token_id=5))],
}
CASES = [(name, index) for name, spoils in BROKEN.items() for index in range(len(spoils))]


def spoiled(folder: Path, spoil: Spoil) -> Path:
    """The broken folder, wherever breaking it left it."""
    moved = spoil(folder)
    return moved if isinstance(moved, Path) and moved.is_dir() else folder


@pytest.mark.slow
def test_a_whole_package_breaks_no_rule(tiny_package: Path, broken: Path) -> None:
    assert broken_rules(tiny_package) == {}
    both(ADDED, IDS, template(WITH_TOOLS, "{Content}"), TOOLS)(broken)
    assert broken_rules(broken) == {}, "the fixtures of the markers break something else"


def test_every_rule_has_a_package_that_breaks_it() -> None:
    assert set(BROKEN) == set(RULES)
    assert all(BROKEN.values())
    assert all(rule.reason.endswith(".") and len(rule.reason) > 20 for rule in RULES.values())


@pytest.mark.parametrize(("name", "index"), CASES)
def test_only_that_rule_rejects(name: str, index: int, broken: Path) -> None:
    folder = spoiled(broken, BROKEN[name][index])
    assert list(broken_rules(folder)) == [name], broken_rules(folder)


def test_all_faults_are_told_together(broken: Path) -> None:
    both(strings(task="x", license=None), ints(max_output_tokens=99999))(broken)
    with pytest.raises(PackageError) as caught:
        check_rules(broken)
    said = str(caught.value)
    assert "breaks 3 rules" in said
    for name in ("task", "licence", "output-length"):
        assert f"- {name}: " in said
        assert RULES[name].reason in said


def test_the_sidecar_holds_what_the_sdk_takes(tiny_package: Path) -> None:
    data = json.loads((tiny_package / SIDECAR).read_text())
    assert set(data) == {"model_id", "string_properties", "int_properties"}
