"""What ``foundry-check`` asks a model that sees, and how it judges the answers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from qwen_onnx.artifact.checksums import write_sums
from qwen_onnx.artifact.processor_config import PROCESSOR_CONFIG
from qwen_onnx.package.contents import Contents
from qwen_onnx.package.foundry_check import Step, expected_counts, run_steps
from qwen_onnx.package.pictures import BLIND, CONVERSATION, asked_about
from qwen_onnx.package.sdk.job import Job, StepError
from qwen_onnx.package.sdk.seeing import judge
from tests.conftest import run_cli
from tests.package.conftest import edit_json, packaged
from tests.package.test_foundry_check import environment, summary

SESSION, RESPONSES, COMPLETIONS = "pictures, session", "pictures, Responses API", "pictures, chat completions"
SEEING = {
    "question": "What color is it?",
    "pictures": [{"name": "red", "words": ["red", "红"]}, {"name": "green", "words": ["green", "绿"]}],
    "tokens": 47,
}


@pytest.mark.parametrize("answer", ["Red.", " It is red. ", "红色"])
def test_an_answer_that_names_the_colour_is_right(answer: str) -> None:
    assert judge(SEEING, "red", 47, answer) == answer.strip()


@pytest.mark.parametrize(
    ("tokens", "answer", "words"),
    [
        (36, "It is red.", "red: the prompt has 36 tokens, expected 47"),
        (47, "It is green.", "about red: the answer is 'It is green.'"),
        (47, "Red or green.", "about red: the answer is 'Red or green.'"),
        (47, "", "about red: the answer is ''"),
    ],
)
def test_what_did_not_see_is_told(tokens: int, answer: str, words: str) -> None:
    with pytest.raises(StepError, match=words):
        judge(SEEING, "red", tokens, answer)


def job_for(package: Path, **changes: Any) -> Job:
    """A check of pictures alone."""
    contents = Contents(package)
    seeing = asked_about(contents, *expected_counts(package, (CONVERSATION, BLIND))) | changes
    user = {"name": "user", "messages": [{"role": "user", "content": "hi"}]}
    (user["tokens"],) = expected_counts(package, [user["messages"]])
    return Job("sdk2", str(package), contents.sidecar["model_id"], contents.strings, contents.ints, [user], seeing)


def steps_of(job: Job) -> dict[str, Step]:
    return {step.step: step for step in run_steps(job, environment("foundry"), 300)}


@pytest.mark.slow
def test_foundry_local_takes_pictures_and_says_where_it_stops(seeing_package: Path) -> None:
    # its answers say nothing: any is right
    pictures = [{**asked_about(Contents(seeing_package), 1, 1)["pictures"][0], "words": [""]}]
    steps = steps_of(job_for(seeing_package, pictures=pictures, most=4))
    assert all(step.ok for step in steps.values()), steps
    limits = {name: step.found for name, step in steps.items() if step.limit}
    assert set(limits) == {COMPLETIONS}
    assert "foundry-local-sdk 2.2.1 drops image_url" in limits[COMPLETIONS]
    assert RESPONSES in steps


@pytest.mark.slow
def test_a_model_that_does_not_know_the_colours_fails(seeing_package: Path) -> None:
    *_, last = steps_of(job_for(seeing_package, most=4)).values()
    assert (last.step, last.ok) == (SESSION, False)
    assert last.found.startswith("'What color is the shape?' about a red square: the answer is ")


@pytest.mark.release
def test_the_starter_that_sees_is_right_in_foundry(tmp_path: Path) -> None:
    built = run_cli("optimize", "starter-vl", "--output", tmp_path / "artifact", "--no-verify")
    assert built.returncode == 0, built.stderr
    package = packaged(tmp_path / "artifact", tmp_path / "packages")
    done = run_cli("foundry-check", package)
    assert done.returncode == 0, done.stderr
    said = summary(done)
    assert said["passed"]
    assert said["steps"][SESSION]
    assert said["steps"][RESPONSES]
    assert list(said["limits"]) == [COMPLETIONS]
    # the same package in the dark
    dark = Path(shutil.copytree(package, tmp_path / package.name))
    edit_json(dark / PROCESSOR_CONFIG, darken)
    write_sums(dark)
    *_, last = steps_of(job_for(dark)).values()
    assert (last.step, last.ok) == (SESSION, False)


def darken(config: dict[str, Any]) -> None:
    (rescale,) = [one for one in config["processor"]["transforms"] if "rescale_factor" in one["operation"]["attrs"]]
    rescale["operation"]["attrs"]["rescale_factor"] = 1e-6
