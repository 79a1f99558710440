"""Models that hear: encoder, embedding and decoder against PyTorch, on tiny seeded models."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qwen_onnx.artifact.genai_config import GENAI_CONFIG
from qwen_onnx.errors import ArtifactError, ExportError, UnsupportedModelError
from qwen_onnx.export.passes.audio_encoder.encoder import AUDIO_FILE, write_parts
from qwen_onnx.runtime.engines.genai import Engine
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.loading import EngineOptions, load_engine
from qwen_onnx.runtime.engines.media import Sound
from qwen_onnx.runtime.processing.audio import prepare_sound
from qwen_onnx.sources.audio_tower import AUDIO_TOWER_CONFIG, QWEN2_AUDIO
from qwen_onnx.sources.text_form import write_text_form
from qwen_onnx.sources.vision_config import PREPROCESSOR
from tests.conftest import rewrite_json
from tests.fixtures.hearing import SECONDS, make_hearing_checkpoint
from tests.fixtures.media import Case, assert_same, dequantized, exported, greedy_by
from tests.fixtures.sight import EOS, words
from tests.fixtures.sounds import SETTINGS as WHOLE
from tests.fixtures.sounds import hiss, sweep, tone
from tests.runtime.engines.batch.test_engine import Heard

# builds and loads two exports
pytestmark = pytest.mark.slow

START, END, AUDIO = 258, 259, 260
PADDED = 100 * SECONDS
SETTINGS = WHOLE.model_copy(update={"chunk_length": SECONDS})


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return exported(tmp_path_factory.mktemp("hearing"), QWEN2_AUDIO, make_hearing_checkpoint, write_parts)


def prompt_of(*parts: list[int] | Sound) -> list[int]:
    """Text and sounds in this order."""
    ids: list[int] = []
    for part in parts:
        ids += [START, *[AUDIO] * part.tokens, END] if isinstance(part, Sound) else part
    return ids


def heard(*samples: np.ndarray) -> list[Sound]:
    return [prepare_sound(each, SETTINGS) for each in samples]


def prompts() -> dict[str, tuple[list[int], list[Sound]]]:
    """By what each shows: a prompt and its sounds, of odd and even numbers of frames."""
    short, long, other, least = heard(tone(440, 0.505), sweep(4.01), hiss(1), hiss(0.025))
    return {
        "no sound": (words(70, 0), []),
        "before text": (prompt_of(short, words(9, 1)), [short]),
        "between text": (prompt_of(words(7, 2), other, words(8, 3)), [other]),
        "behind text": (prompt_of(words(9, 4), short), [short]),
        # longer than one piece of prefill
        "two turns": (prompt_of(words(60, 5), long, words(20, 6), other, words(5, 7)), [long, other]),
        "side by side": (prompt_of(short, least, other, words(3, 8)), [short, least, other]),
    }


@torch.inference_mode()
def torch_logits(model: Any, ids: Sequence[int], sounds: Sequence[Sound]) -> np.ndarray:
    """[tokens, vocabulary], given all seconds that fit and a mask, as its processor makes them."""
    given: dict[str, Any] = {}
    if sounds:
        mels = torch.stack([torch.nn.functional.pad(torch.tensor(sound.mel), _behind(sound)) for sound in sounds])
        mask = torch.arange(PADDED)[None] < torch.tensor([[sound.frames] for sound in sounds])
        given = {"input_features": mels, "feature_attention_mask": mask.long()}
    tokens = torch.tensor([list(ids)])
    return np.asarray(
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **given).logits[0]
    )


def _behind(sound: Sound) -> tuple[int, int]:
    """Frames behind those that our front end makes; what is in them must not matter."""
    return 0, PADDED - sound.mel.shape[1]


torch_greedy = greedy_by(torch_logits, EOS)


def test_fp32_equals_pytorch(case: Case) -> None:
    assert_same(case.fp32, prompts(), case.model(), torch_logits, torch_greedy, 2e-4)


def test_int4_equals_pytorch_with_the_dequantized_weights(case: Case) -> None:
    model = case.model()
    matrices = dequantized(case.int4 / "model.onnx", prompts(), model, torch_logits)
    # queries, keys and values are one
    assert matrices == 5 * model.config.text_config.num_hidden_layers + 1
    assert_same(case.int4, prompts(), model, torch_logits, torch_greedy, 1e-4)


def test_an_answer_depends_on_the_sound(case: Case) -> None:
    """Otherwise the tests above would compare models that do not listen."""
    model = case.model()
    one, other = heard(tone(440, 1), hiss(1))
    assert one.tokens == other.tokens
    ids = prompt_of(words(5, 0), one, words(5, 1))
    assert np.abs(torch_logits(model, ids, [one]) - torch_logits(model, ids, [other]))[-1].max() > 0.1


def test_the_encoder_equals_pytorch_for_every_length(case: Case) -> None:
    """From the least to the longest, whatever stands behind the sound's last frames."""
    whole = case.model().model
    session = ort.InferenceSession(str(case.fp32 / AUDIO_FILE))
    for frames in (3, 4, 5, 6, 7, 100, 301, 597, 598, 599, 600):
        mel = np.random.default_rng(frames).normal(size=(128, PADDED)).astype(np.float32)
        steps = (frames + 1) // 2
        mask = torch.where(torch.arange(PADDED // 2) < steps, 0.0, -torch.inf)[None, None, None]
        with torch.inference_mode():
            state = whole.audio_tower(torch.tensor(mel)[None], attention_mask=mask).last_hidden_state
            wanted = whole.multi_modal_projector(state)[0, : (steps - 2) // 2 + 1].numpy()
        given = mel[None, :, : min(frames + 2, PADDED)]
        (found,) = session.run(None, {"audio_embeds": given, "audio_lengths": np.array([frames])})
        assert found.shape == wanted.shape, frames
        assert np.abs(found - wanted).max() <= 2e-5, frames


def test_genai_reads_text_alike(case: Case) -> None:
    """Presented as a model that it knows; the checks of text measure it so."""
    ids = words(20, 0)
    found = list(Engine(case.fp32, threads=1).generate(ids, max_new_tokens=6, stop_on_eos=False))
    assert found == torch_greedy(case.model(), ids, [], 6)


def test_the_prefix_cache_tells_sounds_apart(case: Case) -> None:
    """Equal token ids, another sound: nothing of it is reused."""
    one, other = heard(tone(440, 1), hiss(1))
    ids = tuple(prompt_of(words(40, 0), one, words(6, 1)))
    engine = load_engine(case.fp32, EngineOptions(streams=1, capacity=512, threads=1))
    model = case.model()
    for prompt, sound, cached in ((ids, one, 0), ((*ids, *words(9, 2)), one, len(ids)), (ids, other, 40)):
        answer = Heard(engine, TokenRequest(prompt, 4, stop_on_eos=False, media=(sound,)))
        assert answer.tokens() == torch_greedy(model, prompt, [sound], 4)
        assert cached <= answer.all[-1].cached_tokens <= cached + 1
    engine.close()


def test_published_names_of_weights_are_known(case: Case, tmp_path: Path) -> None:
    """As Qwen publishes them, whatever transformers saves."""
    published = Path(shutil.copytree(case.original, tmp_path / "published"))
    plain = load_file(case.text / "model.safetensors")
    assert {"model.norm.weight", "lm_head.weight", "audio_tower.conv1.weight"} <= plain.keys()
    nested = {
        name if name.startswith(("audio_tower.", "multi_modal_projector.")) else f"language_model.{name}": tensor
        for name, tensor in plain.items()
    }
    save_file(nested, published / "model.safetensors", {"format": "pt"})
    (tmp_path / "text").mkdir()
    write_text_form(published, tmp_path / "text")
    found = load_file(tmp_path / "text" / "model.safetensors")
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_config": None}, "audio_config is missing"),
        ({"audio_token_index": 4000}, "audio_token_index is 4000"),
        ({"audio_config": {"encoder_layers": 10**9}}, "audio_config.encoder_layers"),
        ({"audio_config": {"encoder_attention_heads": 7}}, "do not divide into 7 heads"),
        ({"audio_config": {"activation_function": "relu"}}, "activation_function is relu"),
    ],
)
def test_a_tower_that_cannot_be_right_is_refused(
    case: Case, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    broken = Path(shutil.copytree(case.original, tmp_path / "broken"))
    if isinstance(change.get("audio_config"), dict):
        config = transformers.AutoConfig.from_pretrained(case.original).to_dict()["audio_config"]
        change = {"audio_config": config | change["audio_config"]}
    rewrite_json(broken / "config.json", **change)
    (tmp_path / "text").mkdir()
    with pytest.raises(UnsupportedModelError, match=message):
        write_text_form(broken, tmp_path / "text")


def test_a_checkpoint_that_lacks_a_part_is_refused(case: Case, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    broken = Path(shutil.copytree(case.original, tmp_path / "broken"))
    (broken / PREPROCESSOR).unlink()
    with pytest.raises(UnsupportedModelError, match="how pictures or sounds are prepared"):
        write_text_form(broken, tmp_path / "text")
    for change, message in (
        ({"feature_size": 80}, "feature_size is 80, the tower has 128"),
        ({"chunk_length": 20}, "makes 2000 frames, the tower has places for 600"),
        ({"hop_length": "long"}, "hop_length"),
        ({"do_normalize": True}, "do_normalize is True"),
    ):
        text = Path(shutil.copytree(case.text, tmp_path / message.split()[0]))
        rewrite_json(text / PREPROCESSOR, **change)
        with pytest.raises(UnsupportedModelError, match=message):
            write_parts(text, case.fp32, tmp_path / "out")
    plain = Path(shutil.copytree(case.text, tmp_path / "plain"))
    (plain / AUDIO_TOWER_CONFIG).unlink()
    with pytest.raises(ExportError, match="no audio tower"):
        write_parts(plain, case.fp32, tmp_path / "out")


def test_an_artifact_that_lacks_a_part_does_not_load(case: Case, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(case.fp32, tmp_path / "broken"))
    (broken / AUDIO_FILE).unlink()
    with pytest.raises(ArtifactError, match="cannot load it"):
        load_engine(broken, EngineOptions(streams=1, capacity=64))
    config = (broken / GENAI_CONFIG).read_text()
    (broken / GENAI_CONFIG).write_text(config.replace('"audio.onnx"', '"../audio.onnx"'))
    with pytest.raises(ArtifactError, match=r"speech\.filename"):
        load_engine(broken, EngineOptions(streams=1, capacity=64))
