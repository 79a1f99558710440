"""The command line as users meet it: what it prints, what it refuses, how it exits."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import get_args

import pytest
import typer
from openai import OpenAI
from typer.testing import CliRunner

from benchmarks.live import LiveServer
from qwen_onnx.cli.app import app
from qwen_onnx.cli.options import Depth
from qwen_onnx.verify.records import DEPTHS, VerifyOptions
from tests.conftest import edit_int4, edit_yaml, run_cli

HELP = {name: command for name, command in typer.main.get_group(app).commands.items() if not command.hidden}


def test_there_are_verbs() -> None:
    assert len(HELP) > 15
    assert {"optimize", "serve", "chat"} <= HELP.keys()


@pytest.mark.parametrize("verb", HELP)
def test_every_verb_has_help(verb: str) -> None:
    done = CliRunner().invoke(app, [verb, "--help"], prog_name="qwen-onnx")
    assert done.exit_code == 0
    assert f"qwen-onnx {verb}" in done.stdout
    assert (HELP[verb].help or "").split("\n")[0].split()[0] in done.stdout


@pytest.mark.parametrize("verb", ["optimize", "verify"])
def test_a_depth_is_one_of_those_that_verification_knows(verb: str) -> None:
    done = CliRunner().invoke(app, [verb, "starter", "--depth", "deep"], prog_name="qwen-onnx")
    assert done.exit_code == 2
    assert all(name in done.output for name in DEPTHS)
    [option] = [parameter for parameter in HELP[verb].params if parameter.name == "depth"]
    assert option.default == VerifyOptions().depth
    allowed, _ = get_args(Depth)
    assert get_args(allowed) == tuple(DEPTHS)


def test_list_shows_whole_names() -> None:
    said = run_cli("list").stdout
    assert all(name in said for name in ("starter", "qwen2.5-0.5b-instruct", "qwen3-0.6b"))


def test_list_for_programs_is_json_and_nothing_else() -> None:
    done = run_cli("list", "starter", "--json")
    found = json.loads(done.stdout)
    models = {model["id"]: model for model in found["models"]}
    assert sorted(models) == ["starter", "starter-vl"]
    assert models["starter"]["targets"]["cpu"] == ["int4", "int6", "int8", "fp32"]
    assert found["targets"]["cpu"]["default"] == "int4"
    assert found["targets"]["cpu"]["precisions"] == ["int4", "int6", "int8", "fp32"]
    assert "computes in fp32" in found["targets"]["cpu"]["unavailable"]["fp16"]
    planned = [model for model in json.loads(run_cli("list", "--json").stdout)["models"] if model["planned"]]
    assert planned
    assert not any(model["targets"] for model in planned)


@pytest.mark.slow
def test_select_for_programs_is_json_and_nothing_else() -> None:
    found = json.loads(run_cli("select", "--ram", "2GB", "--most", "3", "--json").stdout)
    assert len(found["choices"]) == 3
    assert all(choice["bytes_needed"] <= 2e9 for choice in found["choices"])
    assert found["next"] == f"make optimize MODEL={found['choices'][0]['model']} TARGET=cpu"
    refused = run_cli("select", "--ram", "1MB", "--json")
    assert (refused.returncode, refused.stdout) == (2, "")


def test_doctor_for_programs_says_what_fixes_a_fault(checkout: Path) -> None:
    def age(environment: dict) -> None:  # type: ignore[type-arg]
        environment["requirements"] = ["onnxruntime==1.20.0", "onnxruntime-genai-core==0.14.1"]

    edit_yaml(checkout / "pipelines/environments/foundry.yaml", age)
    done = run_cli("doctor", "starter", "--json", cwd=checkout)
    found = json.loads(done.stdout)
    assert done.returncode == 3
    assert found["ok"] is False
    faults = [finding for finding in found["findings"] if not finding["ok"]]
    assert all(finding["fix"] for finding in faults)
    assert any("theirs 0.14.1" in finding["found"] for finding in faults)


@pytest.mark.slow
def test_an_old_name_of_a_verb_works_and_is_not_listed(tmp_path: Path) -> None:
    done = run_cli("same", tmp_path, tmp_path)
    assert "not an artifact" in done.stderr
    listed = [line.split()[1] for line in run_cli("--help").stdout.splitlines() if line.startswith("│ ")]
    assert "diff" in listed
    assert "same" not in listed


def test_list_says_how_each_target_is_proven() -> None:
    said = " ".join(run_cli("list", "starter").stdout.split())
    assert "cuda: int4, int8, fp16; numerics on the CPU execution provider; not run on the device" in said
    assert "npu-vitisai: nothing yet" in said
    assert "Ryzen AI" in said


def test_plan_prints_the_complete_olive_config() -> None:
    config = json.loads(run_cli("plan", "starter", "--target", "cpu").stdout)
    assert [step["type"] for step in config["passes"].values()] == ["FisherGptq", "GenAIModelBuilder", "PackWeights"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["plan", "startr"], 2, ["startr", "starter"]),
        (["plan", "starter", "--target", "cpuu"], 2, ["cpuu"]),
        (["plan", "starter", "--precision", "int3"], 2, ["int3", "int4, int6, int8, fp32"]),
        (["plan", "starter", "--target", "cuda", "--precision", "int6"], 2, ["unavailable", "was never tried"]),
        (
            ["plan", "qwen3-1.7b", "--precision", "int6"],
            2,
            ["has no int6 for cpu", "9 bytes for each weight"],
        ),
        (["plan", "starter", "--precision", "fp16"], 2, ["unavailable", "computes in fp32 on a CPU"]),
        (["optimize", "starter", "--target", "npu-vitisai"], 2, ["unavailable", "Ryzen AI"]),
        (["select", "--ram", "8GB", "--device", "npu-vitisai"], 2, ["unavailable", "Ryzen AI"]),
        (["generate", "artifacts/none", "Hi"], 6, ["there is no artifact", "make optimize TARGET=cpu"]),
        (["optimize", "starter", "--source", "/nonexistent/weights"], 4, ["/nonexistent/weights"]),
        (["generate"], 2, ["Missing argument"]),
    ],
)
def test_bad_input_is_one_clear_message(arguments: list[str], code: int, words: list[str]) -> None:
    done = run_cli(*arguments)
    assert done.returncode == code, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


def test_a_recipe_with_typos_names_them_all_and_runs_nothing(checkout: Path) -> None:
    def spoil(pipeline: dict) -> None:  # type: ignore[type-arg]
        pipeline["steps"][0]["config"]["int4_block_size"] = 32
        pipeline["larger"][0]["limits"]["topp1"] = 0.5

    edit_int4(checkout / "pipelines/cpu.yaml", spoil)
    done = run_cli("optimize", "starter", cwd=checkout)
    assert done.returncode == 2
    assert "int4_block_size" in done.stderr
    assert "topp1" in done.stderr
    assert "cpu.yaml" in done.stderr
    assert not (checkout / "artifacts").exists()


def test_faults_of_every_kind_and_file_are_told_together(checkout: Path) -> None:
    """An unknown key, a wrong type, an option that no pass has, addresses that match nothing: one run, all of them."""

    def spoil(recipe: dict) -> None:  # type: ignore[type-arg]
        recipe["sizes"][0] |= {"licence": "MIT", "parameters": "many"}
        recipe["sizes"][0]["targets"] = {"cpu": {"why": "a reason that is long enough", "set": {"limits.kldd": 1}}}
        recipe["targets"] = {"cuda": {"why": "a reason that is long enough", "set": {"steps.bild.block_size": 64}}}

    edit_yaml(checkout / "recipes/qwen3.yaml", spoil)
    edit_int4(checkout / "pipelines/cpu.yaml", lambda build: build["steps"][0]["config"].update(int4_block_size=32))
    edit_yaml(checkout / "pipelines/cuda.yaml", lambda pipeline: pipeline.update(verification="none"))
    done = run_cli("plan", "starter", "--target", "cpu", cwd=checkout)
    assert done.returncode == 2
    for fault in (
        "recipes/qwen3.yaml: sizes.qwen3-0.6b.licence: unknown key",
        "recipes/qwen3.yaml: sizes.qwen3-0.6b.parameters",
        "recipes/qwen3.yaml: sizes.qwen3-0.6b.targets.cpu.set.limits.kldd: matches nothing",
        "recipes/qwen3.yaml: targets.cuda.set.steps.bild.block_size: matches nothing",
        "pipelines/cpu.yaml: precisions.int4: steps.quantize.config: int4_block_size: unknown key",
        "pipelines/cuda.yaml: verification",
    ):
        assert fault in done.stderr, done.stderr


def test_doctor_says_what_is_there() -> None:
    done = run_cli("doctor", "starter")
    assert "fix" in done.stdout.splitlines()[1].split()
    assert "extra serve" in done.stdout
    assert "memory for starter" in done.stdout


@pytest.mark.slow
def test_generate_reads_standard_input_and_bounds_the_prompt(tiny_build: Path) -> None:
    done = run_cli("generate", tiny_build, "-", "--max-tokens", "4", input="Hello")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Hello")
    long = run_cli("generate", tiny_build, "-", input="word " * 4000)
    assert long.returncode == 8
    assert "context" in long.stderr


def test_chat_answers_each_line_and_ends_with_the_input(tiny_build: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    done = run_cli("chat", tiny_build, "--max-tokens", "4", input=f"one\ntwo\n/save {saved}\n")
    assert done.returncode == 0, done.stderr
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [message["content"] for message in messages[::2]] == ["one", "two"]
    first, second = (message["content"] for message in messages[1::2])
    assert first
    assert second
    assert second in done.stdout.split(first, 1)[1]


@pytest.mark.slow
def test_serve_answers_the_openai_client_and_ends_on_sigterm(tiny_build: Path) -> None:
    with LiveServer("qwen_onnx.cli.app", ["serve", str(tiny_build)]) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model="checkpoint", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
        )
        assert answer.usage
        assert answer.usage.completion_tokens == 4
        begin = time.monotonic()
        assert server.stop() == 0
    assert time.monotonic() - begin < 20
