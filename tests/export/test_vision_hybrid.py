"""Qwen3.5 with its tower: linear attention, by genai and in batches, against PyTorch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_onnx.errors import RequestError
from qwen_onnx.export.passes.draft_head.head import FLOAT, write_head
from qwen_onnx.runtime import QwenService
from qwen_onnx.runtime.engines.batch import BatchEngine
from qwen_onnx.runtime.engines.genai import Engine
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.loading import EngineOptions, load_engine
from qwen_onnx.runtime.service.generation import Attached, ChatPrompt, GenerationConfig
from qwen_onnx.verify.tower import VisionTower
from tests.export.test_vision import built
from tests.fixtures.draft_heads import add_head
from tests.fixtures.media import Case, assert_served, dequantized
from tests.fixtures.pictures import as_file, chart
from tests.fixtures.sight import prompt_of, prompts, seen, torch_greedy, torch_logits, words
from tests.fixtures.tools import first
from tests.fixtures.vision import HYBRIDS
from tests.runtime.engines.batch.test_engine import Heard

# each builds and loads two exports
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=first(HYBRIDS, HYBRIDS[1]))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return built(tmp_path_factory.mktemp("hybrid"), request.param)


def assert_same(folder: Path, model: Any, limit: float) -> None:
    """By genai behind every prompt and, through the states, behind tokens that follow it; then as it is served."""
    alone, asked, behind = Engine(folder, threads=1), prompts(folder), words(5, 9)
    for name, (ids, pictures) in asked.items():
        wanted = torch_logits(model, [*ids, *behind], pictures)[len(ids) - 1 :]
        assert 0.5 < wanted.std() < 2, name
        assert np.abs(alone.forced_logits(ids, behind, pictures) - wanted).max() <= limit, name
    assert_served(folder, asked, torch_greedy, model)


def test_fp32_equals_pytorch(case: Case) -> None:
    assert_same(case.fp32, case.model(), 2e-4)


def test_int4_equals_pytorch_with_the_dequantized_weights(case: Case) -> None:
    model = case.model()
    assert dequantized(case.int4 / "model.onnx", prompts(case.int4), model, torch_logits) > 20
    assert_same(case.int4, model, 1e-4)


def test_an_answer_depends_on_the_picture(case: Case) -> None:
    model, engine = case.model(), Engine(case.fp32, threads=1)
    one, other = seen(case.fp32, (100, 90), (100, 90))
    ids = prompt_of(words(5, 0), one, words(5, 1))
    found = [engine.forced_logits(ids, [], [picture])[-1] for picture in (one, other)]
    assert np.abs(found[0] - found[1]).max() > 0.1
    assert np.abs(torch_logits(model, ids, [one]) - torch_logits(model, ids, [other]))[-1].max() > 0.1


def test_the_tower_is_that_of_the_checkpoint(case: Case) -> None:
    """What the check ``vision`` compares: of published names, without DeepStack."""
    (picture,) = seen(case.fp32, (120, 60))
    with torch.inference_mode():
        wanted = case.model().model.visual(torch.tensor(picture.pixels), torch.tensor([picture.grid])).pooler_output
    assert np.abs(VisionTower(case.text).features(picture) - wanted.numpy()).max() <= 1e-5


def test_a_service_answers_about_a_picture(case: Case) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    prompt = ChatPrompt([{"role": "user", "content": content}], pictures=[Attached(as_file(chart(90, 60)), "it")])
    with QwenService(case.fp32, threads=1) as service:
        assert service.sees
        assert service.generate(prompt, GenerationConfig(max_new_tokens=4)).completion_tokens > 0


def test_a_second_turn_goes_on_behind_the_picture(case: Case) -> None:
    (picture,) = seen(case.fp32, (112, 112))
    engine, ids = (
        load_engine(case.fp32, EngineOptions(streams=2, capacity=512, threads=1)),
        prompt_of(words(9, 0), picture),
    )
    model, count = case.model(), 6
    for turn in range(2):
        one = Heard(engine, TokenRequest(tuple(ids), count, stop_on_eos=False, media=(picture,)))
        answer = one.tokens()
        assert answer == torch_greedy(model, ids, [picture], count)
        # all but what came behind the answer, and its last token, which was never put in
        assert one.all[-1].cached_tokens == turn * (len(ids) - 6)
        ids = [*ids, *answer, *words(5, 1)]
    engine.close()


def test_pictures_and_their_places_must_agree(case: Case) -> None:
    one, other = seen(case.fp32, (112, 112), (112, 60))
    engine = load_engine(case.fp32, EngineOptions(streams=1, threads=1))
    for ids, pictures, message in (
        (prompt_of(one), [], "room for more than 0 pictures"),
        (words(9, 0), [one], "no room for picture 1 of 1"),
        (prompt_of(other), [one], "no room for picture 1 of 1"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.submit(TokenRequest(tuple(ids), 4, media=tuple(pictures)), lambda event: None)
    engine.close()


def test_guesses_of_a_head_behind_a_picture_change_no_answer(case: Case, tmp_path: Path) -> None:
    """It reads no further back than the last picture, whose embeddings are not the table's."""
    checkpoint = add_head(Path(shutil.copytree(case.original, tmp_path / "checkpoint")))
    folder = Path(shutil.copytree(case.fp32, tmp_path / "artifact"))
    assert write_head(checkpoint, folder, FLOAT)
    (picture,) = seen(case.fp32, (112, 112))
    found = {}
    for speculate in ("off", "auto"):
        engine = BatchEngine(folder, streams=1, capacity=512, threads=1, speculate=speculate)
        asked = [prompt_of(words(9, 0), picture), prompt_of(picture, words(40, 3))]
        found[speculate] = [
            Heard(engine, TokenRequest(tuple(ids), 40, stop_on_eos=False, media=(picture,))).tokens() for ids in asked
        ]
        engine.close()
    assert found["auto"] == found["off"]
    assert engine.stats().drafted_tokens > 0
