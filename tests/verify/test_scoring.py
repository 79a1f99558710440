"""Statistics of drift: known answers, and every way in which they must not be fooled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qwen_onnx.catalog.schema import Limits
from qwen_onnx.errors import VerificationError
from qwen_onnx.verify.drift import judge
from qwen_onnx.verify.records import Estimate, Verdict, worst
from qwen_onnx.verify.scoring import OnnxScorer, Positions, compare
from qwen_onnx.verify.statistics import at_least, at_most, bootstrap, median_ratio

LIMITS = Limits(kld_mean=0.18, kld_p99=1.5, top1=0.82, ppl_ratio=1.18)


def random_logits(seed: int, tokens: int = 40, vocabulary: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tokens, vocabulary)).astype(np.float32)


def test_equal_logits_have_no_drift() -> None:
    logits = random_logits(0)
    found = compare(logits, logits + 3.0, range(40))
    assert np.abs(found.kld).max() < 1e-12 + 1e-6
    assert found.agree.all()
    assert np.allclose(found.nll_baseline, found.nll_candidate, atol=1e-6)
    assert len(found.kld) == 39


def test_the_divergence_of_two_known_distributions() -> None:
    p, q = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    found = compare(p.astype(np.float32), q.astype(np.float32), [0, 1])
    assert found.kld[0] == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75), abs=1e-6)
    assert found.nll_candidate[0] == pytest.approx(-np.log(0.75), abs=1e-6)


def test_columns_of_padding_do_not_count() -> None:
    logits = random_logits(1)
    padded = np.concatenate([logits, np.full((40, 14), 50.0, np.float32)], axis=1)
    assert np.abs(compare(logits, padded, range(40)).kld).max() < 1e-6


def test_logits_of_another_length_are_refused() -> None:
    with pytest.raises(VerificationError):
        compare(random_logits(0), random_logits(0, tokens=39), range(40))


def session_of_one_state(folder: Path, name: str, size: str) -> Path:
    """A model whose logits are its ids, with a state of shape [batch_size, 3, ``size``]."""
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]),
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch_size", 3, size]),
    ]
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", [name], ["state"], keepdims=0),
        helper.make_node("Add", ["ids", "state"], ["sum"]),
        helper.make_node("Unsqueeze", ["sum", "last"], ["logits"]),
    ]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", 1])
    last = helper.make_tensor("last", TensorProto.INT64, [1], [-1])
    graph = helper.make_graph(nodes, "states", inputs, [logits], [last])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), str(folder / "model.onnx"))
    decoder = {"filename": "model.onnx", "head_size": 8, "session_options": {"provider_options": []}}
    sizes = {"context_length": 1024, "vocab_size": 300, "eos_token_id": 1}
    (folder / "genai_config.json").write_text(json.dumps({"model": {**sizes, "decoder": decoder}}))
    return folder


@pytest.mark.parametrize("size", ["past_sequence_length", "kv_cache_dim", "batch_size"])
def test_states_of_any_kind_start_empty(tmp_path: Path, size: str) -> None:
    found = OnnxScorer(session_of_one_state(tmp_path, "past.0.conv", size), threads=1).logits([4, 7])
    assert found.tolist() == [[4.0], [7.0]]


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("past.0.conv", "window", "past.0.conv has an unknown dimension: window"),
        ("pixels", "batch_size", "an input that no Qwen has: pixels"),
    ],
)
def test_an_input_that_cannot_be_filled_is_named(tmp_path: Path, name: str, size: str, message: str) -> None:
    scorer = OnnxScorer(session_of_one_state(tmp_path, name, size), threads=1)
    with pytest.raises(VerificationError, match=message):
        scorer.logits([4, 7])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_no_number_is_seen(bad: float) -> None:
    candidate = random_logits(2)
    candidate[7, 3] = bad
    # a probability of zero where the baseline has some is an infinite divergence
    assert not compare(random_logits(2), candidate, range(40)).finite


def domains_of(kld: float, agree: float) -> dict[str, list[Positions]]:
    random = np.random.default_rng(3)
    values = random.exponential(kld, 600)
    agrees = (random.random(600) < agree).astype(float)
    nll = np.full(600, 2.0)
    return {"code": [Positions(values, agrees, nll, nll + 0.01, values)]}


def test_bounds_hold_the_value_and_decide() -> None:
    good = bootstrap(domains_of(0.05, 0.95), block=20, resamples=300, seed=0)
    assert good.kld_mean.lower < good.kld_mean.value < good.kld_mean.upper
    assert set(judge(good, LIMITS).values()) == {Verdict.PASS}
    bad = bootstrap(domains_of(0.5, 0.6), block=20, resamples=300, seed=0)
    verdicts = judge(bad, LIMITS)
    assert verdicts["kld_mean"] is verdicts["top1"] is verdicts["worst_domain"] is Verdict.FAIL


def test_the_same_seed_gives_the_same_bounds() -> None:
    domains = domains_of(0.1, 0.9)
    assert bootstrap(domains, block=20, resamples=200, seed=5) == bootstrap(domains, block=20, resamples=200, seed=5)


@pytest.mark.parametrize(
    ("lower", "upper", "verdict"),
    [(0.1, 0.17, Verdict.PASS), (0.17, 0.19, Verdict.INCONCLUSIVE), (0.181, 0.3, Verdict.FAIL)],
)
def test_a_limit_between_the_bounds_decides_nothing(lower: float, upper: float, verdict: Verdict) -> None:
    assert at_most(Estimate(value=(lower + upper) / 2, lower=lower, upper=upper), 0.18) is verdict


def test_nothing_is_rounded_before_it_is_compared() -> None:
    just = Estimate(value=0.8199999, lower=0.8199999, upper=0.8199999)
    assert at_least(just, 0.82) is Verdict.FAIL


def test_the_worst_verdict_wins_and_nothing_measured_is_no_pass() -> None:
    assert worst([Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.FAIL]) is Verdict.FAIL
    assert worst([Verdict.PASS, Verdict.INCONCLUSIVE]) is Verdict.INCONCLUSIVE
    assert worst([]) is not Verdict.PASS


def test_speed_ratios_are_medians_of_pairs() -> None:
    ours, theirs = [1.0, 2.0, 4.0, 1.0, 2.0], [8.0, 16.0, 32.0, 8.0, 160.0]
    assert median_ratio(theirs, ours, seed=0).value == pytest.approx(8.0)
