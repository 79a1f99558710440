"""Models that see: encoder, embedding and decoder against PyTorch, on tiny seeded models."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers

from qwen_onnx.artifact.genai_config import GENAI_CONFIG
from qwen_onnx.artifact.processor_config import ImageSettings
from qwen_onnx.errors import ArtifactError, ExportError, RequestError, UnsupportedModelError
from qwen_onnx.export.passes.genai_builder.build import build
from qwen_onnx.export.passes.genai_builder.options import GenAIModelBuilderOptions
from qwen_onnx.export.passes.vision_encoder.encoder import VISION_FILE, write_parts
from qwen_onnx.runtime.engines.batch.model import BatchModel
from qwen_onnx.runtime.engines.batch.sight import Looked
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.loading import EngineOptions, load_engine
from qwen_onnx.runtime.engines.media import Picture
from qwen_onnx.runtime.processing.images import prepare
from qwen_onnx.sources.text_form import write_text_form
from qwen_onnx.sources.vision_config import PREPROCESSOR
from tests.conftest import rewrite_json
from tests.fixtures.dequantized import with_weights_of
from tests.fixtures.pictures import chart, noise
from tests.fixtures.vision import ARCHITECTURES, STACKED, make_vision_checkpoint
from tests.runtime.engines.batch.test_engine import Heard

# each builds and loads two exports
pytestmark = pytest.mark.slow

FP32 = GenAIModelBuilderOptions(precision="fp32")
INT4 = GenAIModelBuilderOptions(
    precision="int4",
    block_size=32,
    is_symmetric=True,
    accuracy_level=1,
    algo_config="rtn_last",
    prune_lm_head=True,
)
EOS, START, END, IMAGE = 1, 258, 259, 260
CHUNK = 64


class Case(NamedTuple):
    """A tiny checkpoint, its text form and its two exports."""

    architecture: str
    original: Path
    text: Path
    fp32: Path
    int4: Path

    def model(self) -> Any:
        return getattr(transformers, self.architecture).from_pretrained(self.original, dtype=torch.float32).eval()


NEWER = ARCHITECTURES[0]


@pytest.fixture(
    scope="module",
    params=ARCHITECTURES,
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("vision")
    original = make_vision_checkpoint(folder / "original", request.param)
    (text := folder / "text").mkdir()
    write_text_form(original, text)
    for name, config in (("fp32", FP32), ("int4", INT4)):
        build(text, folder / f"{name}-decoder", config)
        write_parts(text, folder / f"{name}-decoder", folder / name)
    return Case(request.param, original, text, folder / "fp32", folder / "int4")


def words(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(2, 256, count).tolist()


def seen(folder: Path, *sizes: tuple[int, int]) -> list[Picture]:
    """Pictures of these widths and heights, as the artifact in ``folder`` prepares them."""
    settings = ImageSettings.read(folder)
    images = [chart(*size) if index % 2 else noise(*size, seed=index) for index, size in enumerate(sizes)]
    return [prepare(image, settings, where="it") for image in images]


def prompt_of(*parts: list[int] | Picture) -> list[int]:
    """Text and pictures in this order."""
    ids: list[int] = []
    for part in parts:
        ids += [START, *[IMAGE] * part.tokens, END] if isinstance(part, Picture) else part
    return ids


def prompts(folder: Path) -> dict[str, tuple[list[int], list[Picture]]]:
    """By what each shows: a prompt and its pictures."""
    wide, tall, small, large = seen(folder, (168, 56), (60, 190), (30, 30), (220, 200))
    return {
        "no picture": (words(70, 0), []),
        "before text": (prompt_of(wide, words(9, 1)), [wide]),
        "between text": (prompt_of(words(7, 2), tall, words(8, 3)), [tall]),
        "behind text": (prompt_of(words(9, 4), small), [small]),
        # longer than one piece of prefill
        "two turns": (prompt_of(words(60, 5), large, words(20, 6), tall, words(5, 7)), [large, tall]),
        "side by side": (prompt_of(wide, tall, wide, words(3, 8)), [wide, tall, wide]),
    }


@torch.inference_mode()
def torch_logits(model: Any, ids: Sequence[int], pictures: Sequence[Picture]) -> np.ndarray:
    """[tokens, vocabulary]."""
    tokens = torch.tensor([list(ids)])
    given: dict[str, Any] = {}
    if pictures:
        given = {
            "pixel_values": torch.tensor(np.concatenate([picture.pixels for picture in pictures])),
            "image_grid_thw": torch.tensor([picture.grid for picture in pictures]),
            "mm_token_type_ids": (tokens == IMAGE).int(),
        }
    return np.asarray(model(input_ids=tokens, use_cache=False, **given).logits[0])


def onnx_logits(model: BatchModel, ids: Sequence[int], pictures: Sequence[Picture]) -> np.ndarray:
    """The same by pieces, as the engine gives them to the graph."""
    looked = Looked(TokenRequest(tuple(ids), 1, media=tuple(pictures)), model.sense)
    found = []
    for begin in range(0, len(ids), CHUNK):
        end = min(begin + CHUNK, len(ids))
        found.append(
            model.every_position(
                0,
                np.array(ids[begin:end]),
                begin,
                positions=looked.positions(begin, end),
                features=looked.features(begin, end),
            ).copy()
        )
    return np.concatenate(found)


def torch_greedy(model: Any, ids: Sequence[int], pictures: Sequence[Picture], count: int) -> list[int]:
    """Without the end token, which the engines are asked not to stop at."""
    found = list(ids)
    for _ in range(count):
        logits = torch_logits(model, found, pictures)[-1].copy()
        logits[EOS] = -np.inf
        found.append(int(logits.argmax()))
    return found[len(ids) :]


def assert_same(folder: Path, model: Any, limit: float) -> None:
    """Every position of every prompt, and greedily by an engine that answers all of them together."""
    rows, asked = BatchModel(folder, rows=1, threads=1), prompts(folder)
    for name, (ids, pictures) in asked.items():
        wanted = torch_logits(model, ids, pictures)
        assert 0.5 < wanted.std() < 2, name
        assert np.abs(onnx_logits(rows, ids, pictures) - wanted).max() <= limit, name
    engine = load_engine(folder, EngineOptions(streams=3, capacity=512, threads=1))
    assert engine.stats().kind == "batch"
    heard = {
        name: Heard(engine, TokenRequest(tuple(ids), 4, stop_on_eos=False, media=tuple(pictures)))
        for name, (ids, pictures) in asked.items()
    }
    for name, one in heard.items():
        assert one.tokens() == torch_greedy(model, *asked[name], 4), name
    engine.close()


def test_fp32_equals_pytorch(case: Case) -> None:
    assert_same(case.fp32, case.model(), 2e-4)


def test_int4_equals_pytorch_with_the_dequantized_weights(case: Case) -> None:
    model = case.model()
    ids, pictures = prompts(case.int4)["two turns"]
    before = torch_logits(model, ids, pictures)
    named = [(name.replace("model.language_model.", "model."), value) for name, value in model.named_parameters()]
    matrices = with_weights_of(
        SimpleNamespace(named_parameters=lambda: named, config=model.config), case.int4 / "model.onnx"
    )
    assert matrices == 7 * model.config.text_config.num_hidden_layers + 1
    assert np.abs(torch_logits(model, ids, pictures) - before).max() > 0.05
    assert_same(case.int4, model, 1e-4)


def test_an_answer_depends_on_the_picture(case: Case) -> None:
    """Otherwise the tests above would compare models that do not look."""
    model = case.model()
    one, other = seen(case.fp32, (100, 90), (100, 90))
    assert one.tokens == other.tokens
    ids = prompt_of(words(5, 0), one, words(5, 1))
    assert np.abs(torch_logits(model, ids, [one]) - torch_logits(model, ids, [other]))[-1].max() > 0.1


def test_the_encoder_equals_pytorch_for_every_shape(case: Case) -> None:
    """Whole windows, cut ones, fewer patches than a window has."""
    tower = case.model().model.visual
    session = ort.InferenceSession(str(case.fp32 / VISION_FILE))
    for down, across in ((2, 2), (8, 8), (8, 24), (18, 10), (2, 50), (26, 6)):
        size = session.get_inputs()[0].shape[1]
        pixels = np.random.default_rng(down).normal(size=(down * across, size)).astype(np.float32)
        grid = np.array([[1, down, across]])
        with torch.inference_mode():
            seen = tower(torch.tensor(pixels), torch.tensor(grid))
        stacked = getattr(seen, "deepstack_features", [])
        assert len(stacked) == (2 if case.architecture == STACKED else 0)
        wanted = np.concatenate([part.numpy() for part in (seen.pooler_output, *stacked)], axis=-1)
        (found,) = session.run(None, {"pixel_values": pixels, "image_grid_thw": grid})
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= 2e-5


@pytest.mark.parametrize("case", [STACKED], indirect=True)
def test_every_layer_of_deepstack_reaches_the_answer(case: Case) -> None:
    """Features of one layer less, and PyTorch answers otherwise: the parity above depends on each of them."""
    model = case.model()
    ids, pictures = prompts(case.fp32)["two turns"]
    wanted = torch_logits(model, ids, pictures)
    for merger in model.model.visual.deepstack_merger_list:
        kept = merger.linear_fc2.weight.data, merger.linear_fc2.bias.data
        merger.linear_fc2.weight.data, merger.linear_fc2.bias.data = map(torch.zeros_like, kept)
        assert np.abs(torch_logits(model, ids, pictures) - wanted).max() > 0.1
        merger.linear_fc2.weight.data, merger.linear_fc2.bias.data = kept


def test_genai_itself_answers_alike(case: Case) -> None:
    """Its own multimodal layout: it loads the folder, prepares the picture and decodes the same tokens."""
    import onnxruntime_genai as og

    path = case.fp32.parent / "picture.png"
    # no resize on either side, whose kernels differ
    image = noise(128, 64) if case.architecture == STACKED else noise(112, 56)
    image.save(path)
    picture = prepare(image, ImageSettings.read(case.fp32), where="it")
    model = og.Model(str(case.fp32))
    given = model.create_multimodal_processor()(
        "ab<|vision_start|><|image_pad|><|vision_end|>cd", images=og.Images.open(str(path))
    )
    ids = given["input_ids"].as_numpy().reshape(-1).tolist()
    assert ids.count(IMAGE) == picture.tokens
    assert np.abs(given["pixel_values"].as_numpy().reshape(picture.pixels.shape) - picture.pixels).max() <= 1e-4
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + 6, min_length=len(ids) + 6)
    generator = og.Generator(model, params)
    generator.set_inputs(given)
    for _ in range(6):
        generator.generate_next_token()
    found = list(generator.get_sequence(0))[len(ids) :]
    assert found == torch_greedy(case.model(), ids, [picture], 6)


def test_the_prefix_cache_tells_pictures_apart(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal token ids, another picture: nothing of it is reused; the same picture: it is not encoded again."""
    one, other = seen(case.fp32, (220, 200), (220, 200))
    ids = tuple(prompt_of(words(40, 0), one, words(6, 1)))
    follow = (*ids, *words(9, 2))
    engine = load_engine(case.fp32, EngineOptions(streams=1, capacity=512, threads=1))
    sight = engine._model.sense  # type: ignore[union-attr]
    encoded: list[str] = []
    encode = sight.encode

    def counted(picture: Picture) -> np.ndarray[Any, Any]:
        encoded.append(picture.digest)
        return np.asarray(encode(picture))

    monkeypatch.setattr(sight, "encode", counted)
    model = case.model()
    for prompt, picture, cached in ((ids, one, 0), (follow, one, len(ids)), (ids, other, 40)):
        heard = Heard(engine, TokenRequest(prompt, 4, stop_on_eos=False, media=(picture,)))
        assert heard.tokens() == torch_greedy(model, prompt, [picture], 4)
        # the token before the picture is common, too
        assert cached <= heard.all[-1].cached_tokens <= cached + 1
    assert encoded == [one.digest, other.digest]
    engine.close()


def test_pictures_and_their_places_must_agree(case: Case) -> None:
    one, other = seen(case.fp32, (112, 112), (112, 56))
    engine = load_engine(case.fp32, EngineOptions(streams=1, capacity=512, threads=1))
    for ids, pictures, message in (
        (prompt_of(one), [], "room for more than 0 pictures"),
        (prompt_of(one, one), [one], "room for more than 1 pictures"),
        (words(9, 0), [one], "no room for picture 1 of 1"),
        (prompt_of(other), [one], "no room for picture 1 of 1"),
        (prompt_of(one, other), [other, one], "no room for picture 2 of 2|no room for picture 1 of 2"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.submit(TokenRequest(tuple(ids), 4, media=tuple(pictures)), lambda event: None)
    engine.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": None}, "vision_config.hidden_size is None"),
        ({"image_token_id": 4000}, "image_token_id is 4000"),
        ({"vision_config": {"depth": 10**9}}, "vision_config.depth"),
        ({"vision_config": {"out_hidden_size": 32}}, "gives 32 dimensions, the text model has 64"),
        ({"vision_config": {"num_heads": 5}}, "do not divide into 5 heads"),
        ({"vision_config": {"fullatt_block_indexes": [9]}}, "not a list of layers"),
        ({"vision_config": {"hidden_act": "relu"}}, "hidden_act is relu"),
        ({"vision_config": {"in_channels": 4}}, "three channels"),
    ],
)
@pytest.mark.parametrize("case", [NEWER], indirect=True)
def test_a_tower_that_cannot_be_right_is_refused(
    case: Case, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    broken = Path(shutil.copytree(case.original, tmp_path / "broken"))
    if isinstance(change.get("vision_config"), dict):
        config = transformers.AutoConfig.from_pretrained(case.original).to_dict()["vision_config"]
        change = {"vision_config": config | change["vision_config"]}
    rewrite_json(broken / "config.json", **change)
    (tmp_path / "text").mkdir()
    with pytest.raises(UnsupportedModelError, match=message):
        write_text_form(broken, tmp_path / "text")


@pytest.mark.parametrize("case", [NEWER], indirect=True)
def test_a_checkpoint_that_lacks_a_part_is_refused(case: Case, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    broken = Path(shutil.copytree(case.original, tmp_path / "broken"))
    (broken / PREPROCESSOR).unlink()
    with pytest.raises(UnsupportedModelError, match="how pictures or sounds are prepared"):
        write_text_form(broken, tmp_path / "text")
    for change, message in (
        ({"patch_size": 16}, "patch_size is 16, the tower has 14"),
        ({"min_pixels": 10**12}, "min_pixels and max_pixels"),
        ({"image_std": [0, 1, 1]}, "image_std has a zero"),
        ({"image_mean": "grey"}, "not three numbers"),
        ({"do_resize": False}, "do_resize is false"),
    ):
        text = Path(shutil.copytree(case.text, tmp_path / message.split()[0]))
        rewrite_json(text / PREPROCESSOR, **change)
        with pytest.raises(UnsupportedModelError, match=message):
            write_parts(text, case.fp32, tmp_path / "out")
    plain = Path(shutil.copytree(case.text, tmp_path / "plain"))
    (plain / "vision_config.json").unlink()
    with pytest.raises(ExportError, match="no vision tower"):
        write_parts(plain, case.fp32, tmp_path / "out")


@pytest.mark.parametrize("case", [NEWER], indirect=True)
def test_an_artifact_that_lacks_a_part_does_not_load(case: Case, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(case.fp32, tmp_path / "broken"))
    (broken / VISION_FILE).unlink()
    with pytest.raises(ArtifactError, match="cannot load it"):
        load_engine(broken, EngineOptions(streams=1, capacity=64))
    config = (broken / GENAI_CONFIG).read_text()
    (broken / GENAI_CONFIG).write_text(config.replace('"vision.onnx"', '"../vision.onnx"'))
    with pytest.raises(ArtifactError, match=r"vision\.filename"):
        load_engine(broken, EngineOptions(streams=1, capacity=64))


def without_deepstack(graph: Any) -> None:
    """The decoder that genai's own builder makes."""
    [split] = [node for node in graph.node if node.name == "/model/deepstack/Split"]
    added = [node for node in graph.node if node.name.endswith("/deepstack/Add")]
    assert len(added) == 2
    renamed = {split.output[0]: split.input[0]} | {node.output[0]: node.input[0] for node in added}
    for node in [split, *added]:
        graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    del graph.value_info[:]
    [embedded] = [entry for entry in graph.input if entry.name == "inputs_embeds"]
    embedded.type.tensor_type.shape.dim[-1].dim_value //= 3


def one_part(graph: Any) -> None:
    """An encoder that gives nothing for the layers of the decoder."""
    stack = graph.node[-1]
    assert stack.op_type == "Concat"
    del stack.input[1:]
    graph.output[0].type.tensor_type.shape.dim[-1].dim_value //= 3


@pytest.mark.parametrize("case", [STACKED], indirect=True)
@pytest.mark.parametrize(("part", "change"), [("vision", one_part), ("model", without_deepstack)])
def test_parts_with_and_without_deepstack_do_not_load(
    case: Case, tmp_path: Path, part: str, change: Callable[[Any], None]
) -> None:
    broken = Path(shutil.copytree(case.fp32, tmp_path / "broken"))
    loaded = onnx.load(str(broken / f"{part}.onnx"), load_external_data=False)
    change(loaded.graph)
    onnx.save(loaded, str(broken / f"{part}.onnx"))
    with pytest.raises(ArtifactError, match="64 numbers a token, the embedding has 192"):
        load_engine(broken, EngineOptions(streams=1, capacity=64))
