"""``qwen-onnx package``: what Foundry Local reads, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.artifact.manifest import read_manifest
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import Plan, make_plan
from qwen_onnx.errors import ConfigError, PackageError
from qwen_onnx.package.devices import DEVICES, UNSERVED, package_name
from qwen_onnx.package.foundry import write_foundry
from qwen_onnx.package.records import PackageRecord, read_package
from tests.conftest import run_cli
from tests.package.conftest import NAME, edit_json, packaged
from tests.package.test_rules import add_tokens

TOOL_TEMPLATE = "{% if tools %}<tool_call></tool_call>{% endif %}<think></think>{{ messages[0]['content'] }}"


def sidecar(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "foundry_local.json").read_text())
    return found


def record_of(artifact: Path, **changes: Any) -> PackageRecord:
    manifest = read_manifest(artifact)
    fields: dict[str, Any] = {
        "id": "checkpoint-int4-generic-cpu:1",
        "profile": "sdk2",
        "model": manifest.plan.model,
        "target": manifest.plan.target,
        "precision": manifest.plan.precision,
        "artifact_key": manifest.key,
        "plan_digest": manifest.plan_digest,
        "verdict": manifest.verdict,
        "claim": manifest.claim,
        "unverified": manifest.verdict != "PASS",
    }
    return PackageRecord.model_validate(fields | changes)


@pytest.fixture
def artifact(tiny_build: Path, tmp_path: Path) -> Path:
    """A copy of the tiny artifact that a test may change."""
    return Path(shutil.copytree(tiny_build, tmp_path / "artifact"))


def test_a_package_is_one_flat_folder_with_its_id(tiny_package: Path) -> None:
    assert tiny_package.name == NAME
    assert all(path.is_file() for path in tiny_package.iterdir())
    names = {path.name for path in tiny_package.iterdir()}
    assert {"model.onnx", "model.onnx.data", "package.json", "SHA256SUMS", "manifest.json"} <= names
    assert not names & {"build.log", "footprint.json", "run_history.txt"}
    assert read_package(tiny_package).record.tasks == ("general",)
    assert json.loads((tiny_package / "inference_model.json").read_text()) == {
        "Name": "checkpoint-int4-generic-cpu:1",
        "PromptTemplate": {
            "assistant": "{Content}",
            "prompt": "<|im_start|>user\n{Content}<|im_end|>\n<|im_start|>assistant\n",
        },
    }


def test_its_properties_say_what_it_is(tiny_package: Path) -> None:
    assert sidecar(tiny_package) == {
        "model_id": "checkpoint-int4-generic-cpu:1",
        "string_properties": {
            "task": "chat-completion",
            "display_name": "checkpoint by the recipe starter (int4, cpu), unverified",
            "publisher": "qwen-onnx",
            "min_fl_version": "2.1.0",
            "capabilities": "chat",
            "input_modalities": "text",
            "output_modalities": "text",
            "execution_provider": "CPUExecutionProvider",
            "device_type": "CPU",
            "license": "Apache-2.0",
        },
        "int_properties": {
            "supports_tool_calling": 0,
            "supports_reasoning": 0,
            "max_output_tokens": 2048,
            "filesize_mb": 2,
        },
    }


def test_without_a_verdict_nothing_is_packaged(tiny_build: Path, tmp_path: Path) -> None:
    done = run_cli("package", tiny_build, "--output", tmp_path / "packages")
    assert done.returncode == 10
    assert "UNVERIFIED" in done.stderr
    assert "--allow-unverified" in done.stderr
    assert not (tmp_path / "packages").exists()


@pytest.mark.slow
def test_name_version_and_profile_are_the_users(tiny_build: Path, tmp_path: Path) -> None:
    folder = packaged(tiny_build, tmp_path, "--name", "Mine.v2", "--version", "12", "--profile", "cli1")
    assert folder.name == "Mine.v2-generic-cpu-12"
    assert sidecar(folder)["model_id"] == "Mine.v2-generic-cpu:12"
    assert sidecar(folder)["string_properties"]["min_fl_version"] == "0.8.0"
    assert read_package(folder).record.profile == "cli1"


@pytest.mark.parametrize("name", ["../evil", "a b", "-x", "", "ünder"])
def test_a_name_that_foundry_would_refuse_is_refused_at_once(name: str, tiny_build: Path, tmp_path: Path) -> None:
    done = run_cli("package", tiny_build, "--output", tmp_path, "--allow-unverified", f"--name={name}")
    assert done.returncode == 2
    assert "--name" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_package_of_another_profile_or_a_foreign_folder_is_not_replaced(tiny_build: Path, tmp_path: Path) -> None:
    folder = packaged(tiny_build, tmp_path)
    packaged(tiny_build, tmp_path)
    other = run_cli("package", tiny_build, "--output", tmp_path, "--allow-unverified", "--profile", "cli1")
    assert other.returncode == 10
    assert "for sdk2 has the id" in other.stderr
    (folder / "package.json").unlink()
    foreign = run_cli("package", tiny_build, "--output", tmp_path, "--allow-unverified")
    assert foreign.returncode == 10
    assert "remove" in foreign.stderr
    assert (folder / "model.onnx").exists()


@pytest.mark.slow
def test_a_package_of_other_weights_is_not_replaced(tiny_build: Path, tmp_path: Path) -> None:
    folder = packaged(tiny_build, tmp_path / "packages")
    before = (folder / "package.json").read_bytes()
    other = tmp_path / "other"
    shutil.copytree(tiny_build, other)
    edit_json(other / "manifest.json", lambda manifest: manifest["source"].update(revision="0" * 64))
    done = run_cli("package", other, "--output", tmp_path / "packages", "--allow-unverified")
    assert done.returncode == 10
    assert "made of other weights" in done.stderr
    assert "--version" in done.stderr
    assert (folder / "package.json").read_bytes() == before
    assert packaged(other, tmp_path / "packages", "--version", "2") != folder


@pytest.mark.slow
def test_what_breaks_a_rule_is_not_published(artifact: Path, tmp_path: Path) -> None:
    """An artifact that is whole, of a model that ends with another token than its tokenizer."""

    def spoil(manifest: dict[str, Any]) -> None:
        from qwen_onnx.files import sha256_of

        manifest["files"]["genai_config.json"] = sha256_of(artifact / "genai_config.json")

    edit_json(artifact / "genai_config.json", lambda data: data["model"].update(eos_token_id=7))
    edit_json(artifact / "manifest.json", spoil)
    done = run_cli("package", artifact, "--output", tmp_path / "packages", "--allow-unverified")
    assert done.returncode == 10
    assert "token-ids" in done.stderr
    assert not [path for path in (tmp_path / "packages").iterdir() if path.is_dir()]


def test_every_target_has_a_suffix_or_a_reason(repository: Path) -> None:
    catalog = load_catalog(repository)
    suffixes = {}
    for target, pipeline in catalog.pipelines.items():
        if not pipeline.precisions:
            continue
        plan = make_plan(catalog, "starter", target)
        if target in UNSERVED:
            with pytest.raises(PackageError, match="onnxruntime-genai"):
                package_name(plan, None)
            continue
        suffixes[target] = package_name(plan, None).removeprefix(f"starter-{plan.precision}-")
        assert DEVICES[target].provider == pipeline.execution_provider
        assert DEVICES[target].kind.lower() == pipeline.device
        assert DEVICES[target].genai == plan.readback.provider
    assert suffixes == {
        "cpu": "generic-cpu",
        "cuda": "cuda-gpu",
        "dml": "dml-generic-gpu",
        "webgpu": "webgpu-generic-gpu",
        "trt-rtx": "trtrtx-gpu",
        "npu-openvino": "openvino-npu",
    }


def test_a_target_of_the_future_has_no_package(repository: Path) -> None:
    plan: Plan = make_plan(load_catalog(repository), "starter", "cpu").model_copy(update={"target": "abacus"})
    with pytest.raises(PackageError, match="no such device"):
        package_name(plan, None)
    with pytest.raises(ConfigError, match="--name"):
        package_name(plan.model_copy(update={"target": "cpu"}), "a/b")


def test_markers_are_declared_where_tokenizer_and_template_have_them(artifact: Path) -> None:
    add_tokens("<tool_call>", "</tool_call>", "<think>", "</think>")(artifact)
    (artifact / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    write_foundry(artifact, record_of(artifact, kind="hybrid"))
    found, model = sidecar(artifact), json.loads((artifact / "genai_config.json").read_text())["model"]
    assert found["string_properties"]["capabilities"] == "chat,tool-calling,reasoning"
    assert found["string_properties"]["tool_call_start"] == "<tool_call>"
    assert found["string_properties"]["reasoning_end"] == "</think>"
    assert found["int_properties"]["supports_tool_calling"] == found["int_properties"]["supports_reasoning"] == 1
    assert found["int_properties"]["max_output_tokens"] == 4096, "half of the context for a model that thinks"
    assert [model[f"{name}_token_id"] for name in ("bot", "eot", "bor", "eor")] == [258, 259, 260, 261]


def test_a_chat_model_has_no_reasoning_and_an_unused_marker_is_not_declared(artifact: Path) -> None:
    add_tokens("<tool_call>", "</tool_call>", "<think>", "</think>")(artifact)
    (artifact / "chat_template.jinja").write_text("<think></think>{{ messages[0]['content'] }}")
    edit_json(artifact / "genai_config.json", lambda data: data["model"].update(bot_token_id=258, bor_token_id=260))
    write_foundry(artifact, record_of(artifact, kind="chat"))
    assert sidecar(artifact)["string_properties"]["capabilities"] == "chat"
    model = json.loads((artifact / "genai_config.json").read_text())["model"]
    assert not [key for key in model if key in ("bot_token_id", "bor_token_id")]


def test_the_older_profile_has_no_marker_ids(artifact: Path) -> None:
    add_tokens("<tool_call>", "</tool_call>")(artifact)
    (artifact / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    edit_json(artifact / "genai_config.json", lambda data: data["model"].update(bot_token_id=258, eot_token_id=259))
    write_foundry(artifact, record_of(artifact, profile="cli1"))
    assert sidecar(artifact)["string_properties"]["tool_call_start"] == "<tool_call>"
    model = json.loads((artifact / "genai_config.json").read_text())["model"]
    assert not [key for key in model if key in ("bot_token_id", "eot_token_id", "bor_token_id", "eor_token_id")]


def test_coders_have_the_task_coding(artifact: Path) -> None:
    write_foundry(artifact, record_of(artifact, tasks=["coding"]))
    assert sidecar(artifact)["string_properties"]["task"] == "coding"
    write_foundry(artifact, record_of(artifact, tasks=["general", "coding", "math"]))
    assert sidecar(artifact)["string_properties"]["task"] == "chat-completion"


def test_lengths_are_cut_to_what_the_graph_holds(artifact: Path) -> None:
    edit_json(
        artifact / "genai_config.json",
        lambda data: (data["model"].update(context_length=32768), data["search"].update(max_length=32768)),
    )
    write_foundry(artifact, record_of(artifact))
    settings = json.loads((artifact / "genai_config.json").read_text())
    assert settings["model"]["context_length"] == settings["search"]["max_length"] == 8192


def test_of_two_templates_the_one_that_we_serve_with_stays(artifact: Path) -> None:
    edit_json(artifact / "tokenizer_config.json", lambda data: data.update(chat_template="other"))
    served = (artifact / "chat_template.jinja").read_text()
    write_foundry(artifact, record_of(artifact))
    assert "chat_template" not in json.loads((artifact / "tokenizer_config.json").read_text())
    assert (artifact / "chat_template.jinja").read_text() == served
