"""Qwen3-ASR: encoder, embedding and decoder against PyTorch, on tiny seeded models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_onnx.artifact.audio_config import AUDIO_CONFIG, AudioSettings
from qwen_onnx.errors import UnsupportedModelError
from qwen_onnx.export.passes.audio_encoder.encoder import AUDIO_FILE, write_parts
from qwen_onnx.runtime.engines.batch.sight import Hearing
from qwen_onnx.runtime.engines.media import Sound
from qwen_onnx.runtime.processing.audio import prepare_sound
from qwen_onnx.runtime.processing.tokenizer import TextTokenizer
from qwen_onnx.sources.chunked_tower import QWEN3_ASR
from qwen_onnx.sources.text_form import PROCESSOR, write_text_form
from qwen_onnx.sources.vision_config import PREPROCESSOR
from tests.conftest import rewrite_json
from tests.export.test_hearing import prompt_of
from tests.fixtures.media import Case, assert_same, dequantized, exported, greedy_by
from tests.fixtures.sight import EOS, words
from tests.fixtures.sounds import RATE, hiss, sweep, tone
from tests.fixtures.speech import SETTINGS, WINDOW, make_speech_checkpoint

# builds and loads two exports
pytestmark = pytest.mark.slow

# samples: the least, what is filled up, around chunks of a second and windows of two, half a minute and more
LENGTHS = (1, 1600, 7999, 8001, 8160, 16_000, 16_159, 16_160, 31_999, 32_001, 33_280, 48_000, 64_160, 160_001, 512_345)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return exported(tmp_path_factory.mktemp("speech"), QWEN3_ASR, make_speech_checkpoint, write_parts)


def prompts() -> dict[str, tuple[list[int], list[Sound]]]:
    """By what each shows: a prompt and its sounds, within one window, of several, and filled up."""
    short, long, other, least = (
        prepare_sound(samples, SETTINGS) for samples in (tone(440, 0.905), sweep(4.31), hiss(1.04), hiss(0.1))
    )
    return {
        "no sound": (words(70, 0), []),
        "before text": (prompt_of(short, words(9, 1)), [short]),
        "between text": (prompt_of(words(7, 2), other, words(8, 3)), [other]),
        "behind text": (prompt_of(words(9, 4), long), [long]),
        # longer than one piece of prefill
        "two turns": (prompt_of(words(60, 5), long, words(20, 6), other, words(5, 7)), [long, other]),
        "side by side": (prompt_of(short, least, words(3, 8)), [short, least]),
    }


def masked(sounds: Sequence[Sound]) -> dict[str, torch.Tensor]:
    """Spectrograms of one length and a mask, as transformers' processor makes them."""
    longest = max(sound.mel.shape[1] for sound in sounds)
    mels = [torch.nn.functional.pad(torch.tensor(sound.mel), (0, longest - sound.mel.shape[1])) for sound in sounds]
    there = torch.arange(longest)[None] < torch.tensor([[sound.frames] for sound in sounds])
    return {"input_features": torch.stack(mels), "input_features_mask": there.long()}


@torch.inference_mode()
def torch_logits(model: Any, ids: Sequence[int], sounds: Sequence[Sound]) -> np.ndarray:
    """[tokens, vocabulary]."""
    tokens = torch.tensor([list(ids)])
    given = masked(sounds) if sounds else {}
    return np.asarray(model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **given).logits[0])


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
    one, other = (prepare_sound(samples, SETTINGS) for samples in (tone(440, 1), hiss(1)))
    ids = prompt_of(words(5, 0), one, words(5, 1))
    assert np.abs(torch_logits(model, ids, [one]) - torch_logits(model, ids, [other]))[-1].max() > 0.1


def test_the_encoder_equals_pytorch_for_every_length(case: Case) -> None:
    """Also where no chunk and no window divides it; features have a deviation of 1.9."""
    model, hearing = case.model().model, Hearing(case.fp32, 1)
    for samples in LENGTHS:
        sound = prepare_sound(hiss(samples / RATE + 0.01)[:samples], SETTINGS)
        with torch.inference_mode():
            wanted = model.get_audio_features(**masked([sound])).pooler_output.numpy()
        found = hearing.encode(sound)
        assert found.shape == wanted.shape == (sound.tokens, 64), samples
        assert np.abs(found - wanted).max() <= 1e-5, samples


def test_the_encoder_gets_no_more_than_a_window_at_a_time(case: Case) -> None:
    """A window hears nothing of another, and the graph has no mask."""
    hearing = Hearing(case.fp32, 1)
    both = hearing.encode(prepare_sound(sweep(4), SETTINGS))
    session = ort.InferenceSession(str(case.fp32 / AUDIO_FILE))
    mel = prepare_sound(sweep(4), SETTINGS).mel
    for place in range(2):
        given = {"audio_embeds": mel[None, :, place * WINDOW :][:, :, :WINDOW], "audio_lengths": np.array([WINDOW])}
        assert np.array_equal(session.run(None, given)[0], both[26 * place :][:26])
    assert "Attention" in {node.op_type.removeprefix("MultiHead") for node in _nodes(case.fp32)}
    assert all(len(node.input) == 3 for node in _nodes(case.fp32) if node.op_type == "MultiHeadAttention")


def _nodes(folder: Path) -> Any:
    import onnx

    return onnx.load(str(folder / AUDIO_FILE), load_external_data=False).graph.node


def published(case: Case, folder: Path) -> Path:
    """As Qwen publishes it: configs and weights within a thinker, the projection within the tower."""
    shutil.copytree(case.original, folder)
    config = json.loads((folder / "config.json").read_text())
    within = {name: config.pop(name) for name in ("audio_config", "text_config", "audio_token_id")}
    within["text_config"]["tie_word_embeddings"] = config.pop("tie_word_embeddings")
    rope = within["text_config"].pop("rope_parameters")
    within["text_config"] |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "default", "mrope_section": [2]},
    }
    within["audio_config"] |= {"max_source_positions": 1500, "model_type": "qwen3_asr_audio_encoder"}
    within["audio_config"].pop("max_position_embeddings")
    (folder / "config.json").write_text(json.dumps(config | {"thinker_config": within}))
    extractor = json.loads((folder / PROCESSOR).read_text())["feature_extractor"]
    (folder / PROCESSOR).unlink()
    (folder / PREPROCESSOR).write_text(json.dumps(extractor | {"feature_extractor_type": "WhisperFeatureExtractor"}))
    split_tokenizer(folder)
    renamed = {}
    projection = {f"multi_modal_projector.linear_{index}.": f"audio_tower.proj{index}." for index in (1, 2)}
    for name, tensor in load_file(case.text / "model.safetensors").items():
        head = name[: name.rfind(".") + 1]
        renamed[f"thinker.{projection.get(head, head)}{name.removeprefix(head)}"] = tensor
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return folder


def split_tokenizer(folder: Path) -> None:
    """Vocabulary and merges in files of their own, and the template as processors kept it."""
    core = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(core["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {str(entry.pop("id")): entry for entry in core["added_tokens"]}
    rewrite_json(folder / "tokenizer_config.json", added_tokens_decoder=added, tokenizer_class="Qwen2Tokenizer")
    template = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()


def test_published_names_are_known(case: Case, tmp_path: Path) -> None:
    """Weights, config and settings become those of transformers' own form."""
    (text := tmp_path / "text").mkdir()
    write_text_form(published(case, tmp_path / "published"), text)
    plain, found = (load_file(folder / "model.safetensors") for folder in (case.text, text))
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    told, wanted = (json.loads((folder / "config.json").read_text()) for folder in (text, case.text))
    assert told == wanted
    assert (text / "chat_template.jinja").read_text() == (case.text / "chat_template.jinja").read_text()
    one, other = (TextTokenizer(folder) for folder in (text, case.text))
    for told in ("Hi <|audio_start|><|audio_pad|>", "language English<asr_text>héllo 12", "<|im_end|>"):
        ids = other.encode(told, allow_special=True)
        assert one.encode(told, allow_special=True) == ids
        assert one.decode(ids) == other.decode(ids)
    write_parts(text, case.fp32.with_name("fp32-decoder"), tmp_path / "out")
    assert AudioSettings.read(tmp_path / "out") == SETTINGS
    assert (tmp_path / "out" / AUDIO_CONFIG).read_text() == (case.fp32 / AUDIO_CONFIG).read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_window": 100}, "n_window is 100, not 50"),
        ({"n_window_infer": 250}, "n_window_infer is 250, no multiple of 100"),
        ({"output_dim": 32}, "output_dim is 32, the text model has 64"),
        ({"downsample_hidden_size": 10**7}, "downsample_hidden_size"),
        ({"encoder_attention_heads": 7}, "do not divide into 7 heads"),
    ],
)
def test_a_tower_that_cannot_be_right_is_refused(
    case: Case, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    broken = Path(shutil.copytree(case.original, tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())["audio_config"]
    rewrite_json(broken / "config.json", audio_config=config | change)
    (tmp_path / "text").mkdir()
    with pytest.raises(UnsupportedModelError, match=message):
        write_text_form(broken, tmp_path / "text")


def test_a_checkpoint_that_does_not_say_how_sounds_are_prepared_is_refused(case: Case, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    broken = Path(shutil.copytree(case.original, tmp_path / "broken"))
    (broken / PROCESSOR).unlink()
    with pytest.raises(UnsupportedModelError, match="how pictures or sounds are prepared"):
        write_text_form(broken, tmp_path / "text")
    text = Path(shutil.copytree(case.text, tmp_path / "odd"))
    for change, message in (
        ({"min_length": 10}, "min_length is less than a frame"),
        ({"dither": 0.1}, "dither is 0.1"),
    ):
        rewrite_json(text / PREPROCESSOR, **change)
        with pytest.raises(UnsupportedModelError, match=message):
            write_parts(text, case.fp32, tmp_path / "out")
