"""The benchmark beside peers: its arithmetic, its messages, and a whole run on our own side. No peer is needed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks.peers import models as peers
from benchmarks.peers.__main__ import fitting, main, parsed
from benchmarks.peers.gguf_file import architecture_of, write_gguf
from benchmarks.peers.measure import CONTROL, Condition, Measured, Speeds, Worker, conditions_of, in_turns
from benchmarks.peers.models import OURS, Interpreters, Model, models
from benchmarks.peers.show import records, show, svgs
from benchmarks.peers.worker import Clock
from qwen_onnx.errors import ConfigError, EnvironmentFault, SourceError, UnsupportedModelError, VerificationError
from qwen_onnx.processes.environments import Interpreter
from qwen_onnx.verify.records import Estimate
from qwen_onnx.verify.scoring import OnnxScorer
from qwen_onnx.verify.statistics import DriftEstimates

HERE = Interpreter(Path(sys.executable), peers.ROOT)


def test_decoding_is_timed_while_all_streams_decode() -> None:
    """From 2 s, the last first token, to 5 s, the first end: one token a second, and two in 2.5 s."""
    speeds = Speeds.of([[1, 2, 3, 4, 5], [2, 3.5, 4.5, 6, 7]], prompt_tokens=20)
    assert speeds.prefill == pytest.approx(10)
    assert speeds.decode == pytest.approx(1 + 2 / 2.5)


def test_one_stream_has_its_own_speed() -> None:
    speeds = Speeds.of([[0.5, 1.0, 1.5]], prompt_tokens=100)
    assert (speeds.prefill, speeds.decode) == pytest.approx((200, 2))


def test_streams_that_do_not_overlap_have_no_speed() -> None:
    assert math.isnan(Speeds.of([[1, 2], [2, 3]], prompt_tokens=2).decode)


def test_tokens_that_come_together_count_each() -> None:
    clock = Clock(2)
    clock.arrived(1, 3)
    assert [len(times) for times in clock.arrivals] == [0, 3]


def test_no_prompt_begins_as_another() -> None:
    """What a prefix cache would know: of other streams, and of other rounds."""
    ids = list(range(5000))
    found = [prompt for number in range(5) for prompt in Condition(64, 8).prompts(ids, number)]
    assert {len(prompt) for prompt in found} == {64}
    assert len({prompt[0] for prompt in found}) == len(found)


def test_a_prompt_as_long_as_the_texts_is_all_of_them() -> None:
    assert Condition(5, 1).prompts([1, 2, 3, 4, 5], 7) == [[1, 2, 3, 4, 5]]


def test_turns_go_round() -> None:
    assert "".join(worker for _, worker in in_turns(["A", "B", "C"], 3)) == "ABCCBAABC"  # type: ignore[list-item,misc]


def test_several_streams_have_one_beside_them() -> None:
    assert [each.name for each in conditions_of([512, 512], [8, 1, 4])] == ["64x1", "512x1", "64x4", "64x8"]
    assert [each.name for each in conditions_of([512], [4])] == ["512x1", "64x4"]


def test_a_prompt_that_the_context_does_not_hold_is_told() -> None:
    fits, left = fitting(conditions_of([64, 512], []), new_tokens=64, context=575)
    assert ([each.depth for each in fits], [each.depth for each in left]) == ([64], [512])


def drift(kld: float) -> DriftEstimates:
    found = Estimate(value=kld, lower=kld / 2, upper=kld * 2)
    return DriftEstimates(found, found, Estimate(value=0.9, lower=0.8, upper=0.95), found, {})


def example() -> tuple[list[Model], dict[str, Measured], list[Condition]]:
    conditions = [Condition(64, 1), Condition(64, 4)]
    found = {}
    for factor, name in enumerate((OURS, "llama-q8_0", CONTROL), 1):
        measured = Measured(None if name == CONTROL else drift(0.05 / factor), [3.0, 1.0, 2.0], {64: factor * 10**8})
        measured.speeds["64x1"] = [Speeds(100 * factor, 10 * factor), Speeds(110 * factor, 12 * factor)]
        if name != CONTROL:
            measured.speeds["64x4"] = [Speeds(100, math.nan), Speeds(100, 40 * factor)]
        found[name] = measured
    chosen = [Model(OURS, OURS, Path("a"), 10**8, HERE), Model("llama-q8_0", "llama", Path("b"), 14 * 10**7, HERE)]
    return chosen, found, conditions


def test_figures_are_medians_and_ratios_of_a_round() -> None:
    told = records(*example())
    theirs = told["llama-q8_0"]
    assert (theirs["bytes"], theirs["load_s"], theirs["peak_rss"]) == (14 * 10**7, 2.0, {64: 2 * 10**8})
    assert theirs["speed"]["64x1"]["decode"]["median"] == pytest.approx(22)
    assert theirs["speed"]["64x1"]["decode_of_ours"]["value"] == pytest.approx(2)
    # a round whose streams did not overlap has no figure
    assert theirs["speed"]["64x4"]["decode"]["count"] == 1
    assert theirs["drift"]["kld_mean"] == {"value": 0.025, "lower": 0.0125, "upper": 0.05}
    assert told[CONTROL]["drift"] is None
    assert list(told[CONTROL]["speed"]) == ["64x1"]
    json.dumps(told, allow_nan=False)


def test_what_was_not_started_is_left_out() -> None:
    chosen, found, conditions = example()
    found["llama-q8_0"] = Measured()
    assert list(records(chosen, found, conditions)) == [OURS, CONTROL]


def test_tables_show_every_model_and_what_was_not_measured() -> None:
    chosen, found, conditions = example()
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(records(chosen, found, conditions), conditions, console)
    text = console.export_text()
    assert "0.0250 [0.0125, 0.0500]" in text
    assert "22 (20–24)" in text
    assert "× 2.00" in text
    assert "decode, 64 tokens, 4 streams" in text
    assert "–" in text.splitlines()[-3]


def test_plots_have_a_dot_for_each_model_with_both_figures() -> None:
    told = records(*example())
    drawn = svgs(told, "64x1")
    assert list(drawn) == ["kld-size.svg", "kld-speed.svg"]
    for svg in drawn.values():
        assert svg.count("<circle") == 2
        assert ">llama-q8_0</text>" in svg
        assert CONTROL not in svg
        assert svg.startswith("<svg")
    assert svgs(told, "64x99").keys() == {"kld-size.svg"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--checks", "kld,sped"], "no check 'sped'"),
        (["--rounds", "0", "--depths", "64", "-1"], "--depths: -1 is less than 1"),
        (["--new-tokens", "1"], "--new-tokens: 1 is less than 2"),
        (["--python", "llama"], "'llama' is not BACKEND=PYTHON"),
    ],
)
def test_wrong_options_are_told(options: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parsed(["artifact", "checkpoint", *options])


def test_unknown_peers_and_backends_are_told_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no backend 'lama'; there are llama, openvino"):
        Interpreters({"lama": Path(sys.executable)}, tmp_path)
    with pytest.raises(ConfigError, match=r"no peer 'llama-q3'; there are llama-q4_0, .*openvino-int4"):
        models(tmp_path, tmp_path, ["llama-q3"], Interpreters({}, tmp_path), tmp_path, 1)


def test_without_a_checkpoint_the_command_that_fetches_one_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="qwen-onnx fetch"):
        models(tmp_path, tmp_path, [], Interpreters({}, tmp_path), tmp_path, 1)


def test_a_peer_that_is_not_installed_is_told_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hint = peers.NEEDED["llama"][1]
    monkeypatch.setitem(peers.NEEDED, "llama", ("a_package_that_nobody_has", hint))
    with pytest.raises(EnvironmentFault, match=r"pip install 'qwen-onnx\[bench\]'"):
        Interpreters({}, tmp_path).of("llama")
    with pytest.raises(EnvironmentFault, match="No such file"):
        Interpreters({"llama": tmp_path / "python"}, tmp_path).of("llama")


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken(target: Path) -> None:
        target.write_text("half")
        raise EnvironmentFault("broken")

    target = tmp_path / "place" / "model.gguf"
    with pytest.raises(EnvironmentFault):
        peers._converted(target, broken)
    assert list(target.parent.iterdir()) == []
    assert peers._converted(target, lambda path: path.touch()) == target
    # it is there: nothing is converted
    assert peers._converted(target, broken) == target


def test_a_converter_that_fails_says_why() -> None:
    with pytest.raises(EnvironmentFault, match=r"nothing does not convert the checkpoint: .*No module named"):
        peers._module(HERE, "nothing", "checkpoint")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM is not converted"),
        ({}, "none is not converted"),
        ({"architectures": ["Qwen2ForCausalLM"], "rope_scaling": {"rope_type": "yarn"}}, "scaled rotary"),
    ],
)
def test_what_llama_cpp_needs_more_for_is_refused(config: dict[str, object], told: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=told):
        architecture_of(config, tmp_path)


@pytest.mark.slow
def test_a_gguf_file_has_the_weights_and_the_numbers_of_the_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import gguf

    from qwen_onnx.export.weights import CheckpointWeights

    write_gguf(tiny_checkpoint, tmp_path / "model.gguf")
    read = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor.data for tensor in read.tensors}
    weights = CheckpointWeights(tiny_checkpoint)
    named = {
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
        "token_embd.weight": "model.embed_tokens.weight",
    }
    for name, stored in named.items():
        np.testing.assert_array_equal(tensors[name], weights.tensor(stored).float().numpy())
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    assert read.get_field("qwen2.block_count").contents() == config["num_hidden_layers"]
    assert read.get_field("qwen2.vocab_size").contents() == config["vocab_size"]
    assert read.get_field("qwen2.rope.freq_base").contents() == config["rope_parameters"]["rope_theta"]


@pytest.mark.slow
def test_a_process_scores_and_answers(tiny_build: Path) -> None:
    model = Model(OURS, OURS, tiny_build, 1, HERE)
    ids = list(range(5, 25))
    worker = Worker(model, threads=1, streams=0, capacity=64)
    try:
        np.testing.assert_allclose(worker.logits(ids), OnnxScorer(tiny_build, 1).logits(ids), atol=1e-5)
        with pytest.raises(VerificationError, match="does not do 'run'"):
            worker.run([ids], 4)
    finally:
        worker.close()
    for streams in (1, 3):
        worker = Worker(model, threads=1, streams=streams, capacity=1024)
        try:
            # so many that the first stream does not end before the last begins, whatever else the machine does
            speeds = worker.run([ids[stream:] for stream in range(streams)], 900)
            assert speeds.prefill > 0
            assert speeds.decode > 0
            assert worker.peak_rss() > 10**7
        finally:
            worker.close()


@pytest.mark.slow
def test_a_run_gives_tables_plots_and_one_line_of_json(
    tiny_build: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--peers", "--rounds", "2", "--depths", "16", "99999", "--streams", "2", "--new-tokens", "8"]
    output = ["--output", str(tmp_path / "out")]
    assert main([str(tiny_build), str(tiny_checkpoint), *options, "--threads", "1", *output]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out.splitlines()[-1])
    assert "not measured: 99999 tokens" in err
    assert list(told["models"]) == [OURS, CONTROL]
    ours = told["models"][OURS]
    assert list(ours["speed"]) == ["16x1", "64x2"]
    assert 0 < ours["drift"]["kld_mean"]["lower"] <= ours["drift"]["kld_mean"]["value"]
    assert told["models"][CONTROL]["speed"]["16x1"]["decode_of_ours"]["value"] > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["kld-size.svg", "kld-speed.svg", "peers.json"]
