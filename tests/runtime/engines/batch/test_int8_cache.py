"""A KV cache of int8: what PyTorch computes with keys and values that were rounded alike, and who may not have one."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from qwen_onnx.artifact.kv_scales import KV_SCALES, Floats, scales_of, write_kv_scales
from qwen_onnx.errors import ArtifactError
from qwen_onnx.export.passes.genai_builder.build import build
from qwen_onnx.export.passes.genai_builder.options import GenAIModelBuilderOptions
from qwen_onnx.runtime.engines.batch import BatchEngine
from qwen_onnx.runtime.engines.batch.layout import UnsupportedGraphError
from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.runtime.engines.batch.speculation import Costs
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.loading import EngineOptions, load_engine
from tests.fixtures.architectures import make_checkpoint
from tests.runtime.engines.batch.test_engine import Heard, endless, prompt
from tests.runtime.engines.batch.test_speculation import REPEATED
from tests.runtime.engines.test_adapters import sources

IDS = tuple(random.Random(1).choices(range(2, 250), k=48))


def with_scales(folder: Path, copy: Path, cut: float = 1.0) -> Path:
    """A copy that has scales by which ``IDS`` reach ``1 / cut`` times as far as a code does."""
    shutil.copytree(folder, copy)
    model = BatchModel(copy, rows=1, capacity=len(IDS), threads=1)
    model.extend(0, np.array([IDS]), [0])
    write_kv_scales(copy, scales_of(cut * np.abs(model.held(0, len(IDS))).max(axis=3)))
    return copy


@pytest.fixture(scope="module")
def scaled(exact_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_scales(exact_artifact, tmp_path_factory.mktemp("scaled") / "fp32")


@pytest.fixture
def engine(scaled: Path) -> Iterator[BatchEngine]:
    running = BatchEngine(scaled, streams=3, queue_size=64, capacity=1024, threads=1, kv_cache="int8")
    yield running
    running.close()


class Rounded(DynamicCache):
    """Keeps keys and values as int8 does: [layers, 2, heads, head size] are its scales."""

    def __init__(self, scales: Floats) -> None:
        super().__init__()
        self.scales = torch.from_numpy(scales.copy())

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *rest: Any, **more: Any) -> Any:
        kept = []
        for states, scale in zip((key_states, value_states), self.scales[layer_idx][:, :, None], strict=True):
            kept.append((states / scale).round().clamp(-128, 127) * scale)
        return super().update(*kept, layer_idx, *rest, **more)


def by_pytorch(checkpoint: Path, scales: Floats | None) -> np.ndarray[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    cache = DynamicCache() if scales is None else Rounded(scales)
    with torch.inference_mode():
        found: np.ndarray[Any, Any] = model(torch.tensor([IDS]), past_key_values=cache).logits[0].numpy()
    return found


def pieces(model: BatchModel, row: int, sizes: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Logits after each of ``IDS``, which go in by pieces of so many tokens."""
    found, begin = [], 0
    for size in sizes:
        found.append(model.every_position(row, np.array(IDS[begin : begin + size]), begin).copy())
        begin += size
    return np.concatenate(found)


def assert_as_rounded(artifact: Path, checkpoint: Path) -> None:
    scales = np.load(artifact / KV_SCALES)
    expected, plain = by_pytorch(checkpoint, scales), by_pytorch(checkpoint, None)
    model = BatchModel(artifact, rows=2, capacity=64, threads=1, kv_scales=lambda _: scales)
    for row, each in enumerate([(48,), (20, 1, 1, 1, 25)]):
        found = pieces(model, row, each)
        # a code that a float's last bit decides on may be the next one
        apart = np.abs(found - expected).max(axis=1)
        assert np.median(apart) < 1e-4
        assert apart.max() < 0.2 * np.abs(plain - expected).max()


def test_the_cache_holds_codes_of_eight_bits_and_takes_a_quarter(scaled: Path, exact_artifact: Path) -> None:
    plain = BatchModel(exact_artifact, rows=1, capacity=64, threads=1)
    assert plain.held(0, 8).dtype == np.float32
    engine = BatchEngine(scaled, streams=1, capacity=64, threads=1, kv_cache="int8")
    assert engine._model.held(0, 8).dtype == np.int8
    assert engine.stats().kv_token_bytes * 4 == plain.kv_bytes_per_token
    engine.close()


def test_qwen2_computes_with_what_it_rounded(exact_artifact: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert_as_rounded(with_scales(exact_artifact, tmp_path / "coarse", cut=0.5), tiny_checkpoint)


def _large_biases(checkpoint: Path) -> None:
    """Some channels of the keys are as far from zero as those of Qwen2.5, where a bias puts them there."""
    from safetensors.torch import load_file, save_file

    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    for name, tensor in weights.items():
        if name.endswith("k_proj.bias"):
            tensor[::7] += 60
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("Qwen2ForCausalLM", _large_biases),
        ("Qwen3ForCausalLM", lambda _: None),
        ("Qwen3MoeForCausalLM", lambda _: None),
    ],
)
def test_so_do_large_biases_norms_and_experts(
    architecture: str, change: Callable[[Path], None], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(architecture, tmp_path / "checkpoint")
    change(checkpoint)
    build(checkpoint, tmp_path / "built", GenAIModelBuilderOptions(precision="fp32"))
    assert_as_rounded(with_scales(tmp_path / "built", tmp_path / "scaled"), checkpoint)


def test_whoever_joins_and_leaves_when_each_answer_is_that_of_a_lone_run(engine: BatchEngine, scaled: Path) -> None:
    rng = random.Random(5)
    shared, heard = prompt(rng), []
    for _ in range(10):
        ids = (shared if rng.random() < 0.5 else ()) + prompt(rng)
        request = endless(ids, rng.randrange(1, 50))
        heard.append((request, Heard(engine, request)))
    told = [(request, one.tokens()) for request, one in heard]
    assert engine.stats().cached_tokens > 0
    alone = BatchEngine(scaled, streams=1, capacity=1024, threads=1, speculate="off", kv_cache="int8")
    for request, tokens in told:
        assert Heard(alone, request).tokens() == tokens
    alone.close()


def test_guesses_leave_nothing_behind(scaled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Costs, "note", lambda *_: None)
    told = []
    for speculate in ("off", "ngram"):
        running = BatchEngine(scaled, streams=1, capacity=1024, threads=1, speculate=speculate, kv_cache="int8")
        told.append(
            [Heard(running, TokenRequest(REPEATED[begin:], 80, stop_on_eos=False)).tokens() for begin in (0, 7)]
        )
        running.close()
    assert told[0] == told[1]
    assert running.stats().drafted_tokens >= running.stats().accepted_tokens > 0


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda file: file.unlink(), "no scales for an int8 KV cache"),
        (lambda file: file.write_bytes(file.read_bytes()[:-4]), "not that of a KV cache"),
        (lambda file: file.write_bytes(bytes(1 << 20)), "more than 640 bytes"),
        (lambda file: file.write_bytes(bytes(len(file.read_bytes()))), "not that of a KV cache"),
        (lambda file: np.save(file, np.load(file)[:, ::-1, :, :16]), "not that of a KV cache"),
        (lambda file: np.save(file, 0 * np.load(file)), "not a positive number"),
        (lambda file: np.save(file, np.nan * np.load(file)), "not a positive number"),
    ],
)
def test_without_sound_scales_there_is_no_such_cache(
    breaks: Callable[[Path], object], message: str, scaled: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(scaled, tmp_path / "broken"))
    breaks(folder / KV_SCALES)
    with pytest.raises(ArtifactError, match=message) as raised:
        load_engine(folder, EngineOptions(threads=1, kv_cache="int8"))
    assert not isinstance(raised.value, UnsupportedGraphError)
    assert f"qwen-onnx verify {folder}" in str(raised.value.hint)


def test_pictures_adapters_and_other_devices_are_refused(
    seeing_artifact: Path, slotted_artifact: Path, adapters: dict[str, Path], scaled: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="this model takes more") as raised:
        load_engine(seeing_artifact, EngineOptions(threads=1, kv_cache="int8"))
    assert raised.value.hint == "leave --kv-cache out"
    with pytest.raises(ArtifactError, match="without adapters"):
        BatchModel(slotted_artifact, rows=1, threads=1, adapters=sources(adapters), kv_scales=lambda _: np.ones(1))
    folder = Path(shutil.copytree(scaled, tmp_path / "gpu"))
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = [{"cuda": {}}]
    (folder / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="built for cuda"):
        load_engine(folder, EngineOptions(threads=1, kv_cache="int8"))
