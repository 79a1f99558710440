"""Adapters in the slots of a graph: peft's logits, each answer that of a lone run, and no other's prefixes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qwen_onnx.artifact.adapter_file import names_in_file
from qwen_onnx.errors import ArtifactError, ConfigError, RequestError
from qwen_onnx.runtime import Engine, QwenService
from qwen_onnx.runtime.engines.adapters import AdapterSource, Swapping, parse_adapters
from qwen_onnx.runtime.engines.batch import BatchEngine, session
from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.runtime.engines.batch.rewritten import rewritten, without_slots
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.sampling import Sampling
from qwen_onnx.runtime.engines.serial import SerialEngine
from qwen_onnx.runtime.service.generation import GenerationConfig
from qwen_onnx.sources.adapter import open_adapter
from qwen_onnx.sources.slotted import convert_adapter
from tests.fixtures.adapters import make_adapter
from tests.runtime.engines.batch.test_engine import Heard

IDS = tuple(range(5, 45))


def sources(files: dict[str, Path]) -> tuple[AdapterSource, ...]:
    return tuple(AdapterSource.of(name, file) for name, file in files.items())


def asked(adapter: str | None, count: int = 24, ids: tuple[int, ...] = IDS, seed: int | None = None) -> TokenRequest:
    sampling = Sampling(temperature=0 if seed is None else 1, seed=seed)
    return TokenRequest(ids, count, stop_on_eos=False, adapter=adapter, sampling=sampling)


@pytest.fixture
def engine(slotted_artifact: Path, adapters: dict[str, Path]) -> Iterator[BatchEngine]:
    running = BatchEngine(slotted_artifact, streams=4, capacity=256, threads=1, adapters=sources(adapters))
    yield running
    running.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", "some"])
def test_logits_are_those_of_peft(
    name: str, slotted_artifact: Path, adapters: dict[str, Path], tiny_checkpoint: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    with torch.no_grad():
        plain = base(torch.tensor([IDS])).logits[0].numpy()
        peft = PeftModel.from_pretrained(base, str(adapters[name].with_suffix("")))
        expected = peft(torch.tensor([IDS])).logits[0].numpy()
    assert np.abs(expected - plain).max() > 0.1
    model = BatchModel(slotted_artifact, rows=2, capacity=64, threads=1, adapters=sources(adapters))
    ids = np.array(IDS, np.int64)
    np.testing.assert_allclose(model.every_position(0, ids, 0, adapter=name), expected, atol=1e-4)
    np.testing.assert_allclose(model.extend(1, ids[None], [0], adapter=name)[0], expected[-1], atol=1e-4)
    # a binding of the model alone is not one with what the adapter left in it
    np.testing.assert_allclose(model.every_position(0, ids, 0), plain, atol=1e-4)


@pytest.mark.parametrize("most", [session.MOST_TWICE, 0])
def test_without_an_adapter_nothing_changes(
    most: int, slotted_artifact: Path, exact_artifact: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a larger graph is not loaded a second time without its slots
    monkeypatch.setattr(session, "MOST_TWICE", most)
    ids = np.array(IDS, np.int64)
    plain, closed, empty = [
        BatchModel(folder, rows=1, capacity=64, threads=1, adapters=given).every_position(0, ids, 0).copy()
        for folder, given in (
            (exact_artifact, ()),
            (slotted_artifact, ()),
            (slotted_artifact, sources(adapters)),
        )
    ]
    np.testing.assert_array_equal(closed, plain)
    np.testing.assert_array_equal(empty, plain)
    both = [Engine(folder, threads=1) for folder in (slotted_artifact, exact_artifact)]
    told = [list(engine.generate(IDS, max_new_tokens=8, stop_on_eos=False)) for engine in both]
    assert told[0] == told[1]


def test_slots_that_nobody_fills_are_taken_out(slotted_artifact: Path, exact_artifact: Path) -> None:
    graph = onnx.load_from_string(rewritten(slotted_artifact / "model.onnx", [without_slots]) or b"").graph
    assert rewritten(exact_artifact / "model.onnx", [without_slots]) is None
    exact = onnx.load(str(exact_artifact / "model.onnx"), load_external_data=False).graph
    for field in ("node", "input", "initializer"):
        names = [sorted(item.name for item in getattr(each, field)) for each in (graph, exact)]
        assert names[0] == names[1], field


@pytest.mark.parametrize("swapping", [None, Swapping(budget=1 << 20)])
def test_a_small_model_pays_for_no_slots_where_no_adapter_answers(
    swapping: Swapping | None, slotted_artifact: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slots(**given: Any) -> list[int]:
        model = BatchModel(slotted_artifact, rows=1, capacity=64, threads=1, **given)
        return [len(each.get_overridable_initializers()) for each in model._sessions]

    given = {"swapping": swapping} if swapping else {"adapters": sources(adapters)}
    # A and B of five slots in two layers
    assert slots(**given) == [20, 0]
    assert slots() == [0, 0]
    monkeypatch.setattr(session, "MOST_TWICE", 0)
    assert slots(**given) == [20, 20]


def test_slots_stay_that_some_adapter_fills(slotted_artifact: Path, adapters: dict[str, Path]) -> None:
    def nodes(given: dict[str, Path]) -> int:
        filled = {name for file in given.values() for name in names_in_file(file)}
        changed = rewritten(slotted_artifact / "model.onnx", [lambda graph: without_slots(graph, filled)])
        return len(onnx.load_from_string(changed).graph.node) if changed else whole

    whole = len(onnx.load(str(slotted_artifact / "model.onnx"), load_external_data=False).graph.node)
    # three nodes for each slot of o, gate and up, in two layers
    assert nodes(adapters) == whole
    assert nodes({"some": adapters["some"]}) == whole - 3 * 3 * 2
    ids = np.array(IDS, np.int64)
    both, alone = (
        BatchModel(slotted_artifact, rows=1, capacity=64, threads=1, adapters=sources(given))
        .every_position(0, ids, 0, adapter="some")
        .copy()
        for given in (adapters, {"some": adapters["some"]})
    )
    np.testing.assert_array_equal(alone, both)


def test_an_adapter_of_later_matrices_alone_answers_beside_one_of_all(
    slotted_artifact: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "down.safetensors"
    peft = open_adapter(make_adapter(tmp_path / "down", modules=("mlp.down_proj",)))
    convert_adapter(peft, slotted_artifact, file)
    ids = np.array(IDS, np.int64)
    # the slots before are empty for the one, and memory of one size is shared within a step
    beside, alone = (
        BatchModel(slotted_artifact, rows=1, capacity=64, threads=1, adapters=sources(given))
        .every_position(0, ids, 0, adapter="down")
        .copy()
        for given in ({"all": adapters["all"], "down": file}, {"down": file})
    )
    np.testing.assert_array_equal(beside, alone)


def test_adapters_in_flight_together_answer_as_each_does_alone(engine: BatchEngine) -> None:
    requests = [
        asked("all"),
        asked(None, 40),
        asked("some", 30),
        asked("all", 35, IDS[10:]),
        asked("some", 20, IDS[3:], seed=7),
        asked(None, 25, IDS[5:]),
    ]
    alone = [Heard(engine, request).tokens() for request in requests]
    assert len({tuple(tokens[:20]) for tokens in alone[:3]}) == 3
    together = [Heard(engine, request) for request in requests]
    assert [heard.tokens() for heard in together] == alone


def test_a_prefix_is_found_by_the_same_adapter_alone(engine: BatchEngine) -> None:
    def cached(adapter: str | None) -> int:
        return Heard(engine, asked(adapter, 1)).end().cached_tokens

    assert [cached(name) for name in ("all", "some", None)] == [0, 0, 0]
    assert [cached(name) for name in ("all", "some", None)] == [len(IDS) - 1] * 3


def test_an_unknown_adapter_is_refused(engine: BatchEngine, tiny_artifact: Path) -> None:
    with pytest.raises(RequestError, match="there is no adapter 'nobody'"):
        engine.submit(asked("nobody"), lambda _: None)
    serial = SerialEngine(tiny_artifact, threads=1)
    with pytest.raises(RequestError, match="takes no adapters"):
        serial.submit(asked("all"), lambda _: None)
    serial.close()


def test_an_artifact_without_slots_takes_no_adapter(tiny_artifact: Path, adapters: dict[str, Path]) -> None:
    with pytest.raises(ArtifactError, match="no slots for adapters") as caught:
        BatchModel(tiny_artifact, rows=1, capacity=64, threads=1, adapters=sources(adapters))
    assert "--adapter-rank" in str(caught.value)


@pytest.mark.parametrize("wrong", ['"inputs":128', "mlp.other_proj"])
def test_slots_that_the_graph_has_not_are_refused(
    slotted_artifact: Path, adapters: dict[str, Path], tmp_path: Path, wrong: str
) -> None:
    broken = Path(shutil.copytree(slotted_artifact, tmp_path / "broken"))
    model = onnx.load(str(broken / "model.onnx"), load_external_data=False)
    told = model.metadata_props[-1]
    right = '"inputs":64' if "inputs" in wrong else "mlp.down_proj"
    assert right in told.value
    told.value = told.value.replace(right, wrong, 1)
    onnx.save(model, str(broken / "model.onnx"))
    with pytest.raises(ArtifactError, match=r"the graph has no input|is no slot of this artifact"):
        BatchModel(broken, rows=1, capacity=64, threads=1, adapters=sources(adapters))


def test_a_file_that_changed_since_is_refused(slotted_artifact: Path, adapters: dict[str, Path]) -> None:
    other = AdapterSource("all", adapters["some"], AdapterSource.of("all", adapters["all"]).digest)
    with pytest.raises(ArtifactError, match="the adapter all has changed"):
        BatchModel(slotted_artifact, rows=1, capacity=64, threads=1, adapters=[other])


@pytest.mark.parametrize("isolated", [False, True])
def test_a_service_answers_with_an_adapter(isolated: bool, slotted_artifact: Path, adapters: dict[str, Path]) -> None:
    config = GenerationConfig(max_new_tokens=12)
    options = {"threads": 1, "context": 256, "verify": True}
    with QwenService(slotted_artifact, adapters=adapters, isolated=isolated, **options) as service:  # type: ignore[arg-type]
        assert service.adapters == ("all", "some")
        plain = service.generate("hello", config).text
        learnt = service.generate("hello", GenerationConfig(max_new_tokens=12, adapter="all")).text
        assert plain != learnt
        assert service.generate("hello", config).text == plain
        with pytest.raises(RequestError, match="there is no adapter 'nobody'"):
            service.generate("hello", GenerationConfig(adapter="nobody"))


def test_options_are_names_and_files(tmp_path: Path) -> None:
    assert parse_adapters(["faq=a.safetensors", "b=c=d"]) == {"faq": Path("a.safetensors"), "b": Path("c=d")}
    with pytest.raises(ConfigError) as caught:
        parse_adapters(["faq", "=x", "a=", "b=1", "b=2"])
    assert len(caught.value.faults) == 4
    (tmp_path / "a").write_bytes(b"")
    for name in ("Faq", "", ".", "a:b", "a" * 61):
        with pytest.raises(ConfigError, match="a name has"):
            AdapterSource.of(name, tmp_path / "a")
    with pytest.raises(ArtifactError, match="is missing"):
        AdapterSource.of("faq", tmp_path / "gone")
