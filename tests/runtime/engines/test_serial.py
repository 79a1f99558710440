"""One request at a time by onnxruntime-genai, and which artifacts are served so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qwen_onnx.artifact.genai_config import GenaiConfig
from qwen_onnx.errors import OverloadedError, RequestError, ServiceError
from qwen_onnx.runtime import Engine
from qwen_onnx.runtime.engines.batch import BatchEngine
from qwen_onnx.runtime.engines.batch.layout import UnsupportedGraphError
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.loading import EngineOptions, load_engine
from qwen_onnx.runtime.engines.media import Picture
from qwen_onnx.runtime.engines.sampling import Sampling
from qwen_onnx.runtime.engines.serial import SerialEngine
from tests.runtime.engines.batch.test_engine import Heard, alone, endless


@pytest.fixture
def engine(tiny_artifact: Path) -> Iterator[SerialEngine]:
    running = SerialEngine(tiny_artifact, queue_size=2, threads=1)
    yield running
    running.close()


def test_answers_come_one_after_the_other(engine: SerialEngine, tiny_artifact: Path) -> None:
    reference = Engine(tiny_artifact, threads=1)
    requests = [endless((5 + index, 6, 7), 12) for index in range(3)]
    heard = [Heard(engine, request) for request in requests]
    for request, one in zip(requests, heard, strict=True):
        assert one.tokens() == alone(reference, request)
    assert engine.stats().generated_tokens == 36


def test_a_running_request_stops_and_a_full_queue_refuses(engine: SerialEngine) -> None:
    held = [Heard(engine, endless((3, 4), 4000)) for _ in range(3)]
    held[0].next()
    with pytest.raises(OverloadedError):
        engine.submit(endless((3,), 1), lambda _: None)
    for one in held:
        one.handle.cancel()
        assert one.end().finish == "cancelled"
    assert Heard(engine, endless((3,), 2)).end().finish == "length"


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (endless((5,), 1, sampling=Sampling(min_p=0.1)), "min_p"),
        (endless((5,), 1, sampling=Sampling(logit_bias={5: 1.0})), "logit_bias"),
        (endless((5,), 1, logprobs=0), "logprobs"),
        (endless((5,), 1, grammar="start: /a/"), "grammar"),
        (endless((5,), 1, sampling=Sampling(seed=2**31)), "seed"),
    ],
)
def test_what_genai_would_ignore_is_refused(engine: SerialEngine, request_: TokenRequest, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        engine.submit(request_, lambda _: None)


def test_a_graph_for_another_device_is_left_to_genai(tiny_artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_artifact, tmp_path / "gpu"))
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"]["provider_options"] = [{"cuda": {}}]
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedGraphError, match="cuda"):
        BatchEngine(folder)


def test_a_closed_engine_ends_what_runs(tiny_artifact: Path) -> None:
    engine = SerialEngine(tiny_artifact, threads=1)
    running, waiting = (Heard(engine, endless((5,), 4000)) for _ in range(2))
    running.next()
    engine.close()
    assert isinstance(running.end().error, ServiceError)
    assert isinstance(waiting.end().error, ServiceError)
    with pytest.raises(ServiceError, match="closed"):
        engine.submit(endless((5,), 1), lambda _: None)


def test_the_cpu_artifact_is_batched(tiny_artifact: Path) -> None:
    engine = load_engine(tiny_artifact, EngineOptions(streams=2, capacity=256, threads=1))
    assert engine.stats().kind == "batch"
    engine.close()


def test_pictures_are_refused_not_overlooked(engine: SerialEngine) -> None:
    picture = Picture(np.zeros((4, 8), np.float32), (1, 2, 2), 2, "a1")
    with pytest.raises(RequestError, match="takes no pictures"):
        engine.submit(TokenRequest((1, 2), 4, media=(picture,)), lambda event: None)


@pytest.mark.parametrize("artifact", ["seeing_artifact", "hearing_artifact"])
def test_a_token_that_stands_for_a_medium_is_not_drawn(artifact: str, request: pytest.FixtureRequest) -> None:
    """Behind a prompt after which it is the likeliest, where genai's embedding would fail."""
    folder: Path = request.getfixturevalue(artifact)
    model = GenaiConfig.read(folder).model
    token = model.image_token_id if model.speech is None else model.audio_token_id
    engine = Engine(folder, threads=1)
    # one of 288 tokens
    tries = np.random.default_rng(0).integers(2, 256, (3000, 3)).tolist()
    prompt, logits = next((ids, row) for ids in tries if (row := engine.forced_logits(ids, [])[-1]).argmax() == token)
    logits[[token, *engine.eos_token_ids]] = -np.inf
    drawn = list(engine.generate(prompt, max_new_tokens=3, stop_on_eos=False))
    assert drawn[0] == logits.argmax()
    assert len(drawn) == 3
    engine.close()
