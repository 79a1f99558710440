"""Models that see: encoder, embedding and decoder against PyTorch, on tiny seeded models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qwen_onnx.artifact.genai_config import GENAI_CONFIG
from qwen_onnx.artifact.processor_config import ImageSettings
from qwen_onnx.errors import ArtifactError, ExportError, RequestError, UnsupportedModelError
from qwen_onnx.export.embedding import EMBEDDING_FILE
from qwen_onnx.export.passes.genai_builder.build import build
from qwen_onnx.export.passes.genai_builder.options import GenAIModelBuilderOptions
from qwen_onnx.export.passes.vision_encoder.encoder import VISION_FILE, write_parts
from qwen_onnx.runtime.engines.batch.sight import Sight
from qwen_onnx.runtime.engines.interface import TokenRequest
from qwen_onnx.runtime.engines.loading import EngineOptions, load_engine
from qwen_onnx.runtime.engines.media import Picture
from qwen_onnx.runtime.processing.images import prepare
from qwen_onnx.sources.checkpoint import SINGLE_FILE
from qwen_onnx.sources.text_form import write_text_form
from qwen_onnx.sources.vision_config import PREPROCESSOR
from qwen_onnx.verify.graph import Graph
from qwen_onnx.verify.scoring import OnnxScorer
from qwen_onnx.verify.senses import given_of
from qwen_onnx.verify.tower import coded_matrices, tower_beside
from tests.conftest import rewrite_json
from tests.fixtures.media import FP32, Case, assert_same, dequantized, exported
from tests.fixtures.pictures import noise
from tests.fixtures.sight import IMAGE, genai_answer, prompt_of, prompts, seen, torch_greedy, torch_logits, words
from tests.fixtures.tools import first
from tests.fixtures.vision import ARCHITECTURES, MIXTURE, NEWER, make_vision_checkpoint
from tests.runtime.engines.batch.test_engine import Heard

# each builds and loads two exports
pytestmark = pytest.mark.slow

WINDOWS = ARCHITECTURES[0]
# as the pipelines of GPUs have it: the CPU computes no norms of q and k within an attention
UNFUSED = {"fuse_qk_norm_gqa": False}


@pytest.fixture(
    scope="module",
    params=first(ARCHITECTURES, WINDOWS, MIXTURE),
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return built(tmp_path_factory.mktemp("vision"), request.param)


def built(folder: Path, architecture: str) -> Case:
    """Below ``folder``."""
    return exported(folder, architecture, lambda original: make_vision_checkpoint(original, architecture), write_parts)


def test_fp32_equals_pytorch(case: Case) -> None:
    assert_same(case.fp32, prompts(case.fp32), case.model(), torch_logits, torch_greedy, 2e-4)


def test_int4_equals_pytorch_with_the_dequantized_weights(case: Case) -> None:
    model = case.model()
    matrices = dequantized(case.int4 / "model.onnx", prompts(case.int4), model, torch_logits)
    # q, k, v, o, and gate, up, down or the experts' two
    each = 6 if case.architecture == MIXTURE else 7
    assert matrices == each * model.config.text_config.num_hidden_layers + 1
    assert_same(case.int4, prompts(case.int4), model, torch_logits, torch_greedy, 1e-4)


@pytest.mark.parametrize("provider", [*first(("cuda", "dml", "webgpu"), "cuda")])
def test_fp16_for_a_gpu_equals_pytorch_but_for_its_rounding(case: Case, tmp_path: Path, provider: str) -> None:
    """On the CPU, which widens it operator by operator; genai hands on what encoder and embedding give, as it is."""
    decoder, folder, model = tmp_path / "decoder", tmp_path / "artifact", case.model()
    build(case.text, decoder, GenAIModelBuilderOptions(precision="fp16", execution_provider=provider, **UNFUSED))
    write_parts(case.text, decoder, folder)
    scorer, sight = OnnxScorer(folder, 1), Sight(folder, 1)
    assert sight.kind is np.float16
    for name, (ids, pictures) in prompts(folder).items():
        features = np.concatenate([sight.encode(picture) for picture in pictures]) if pictures else None
        found = scorer.logits(ids, given_of(sight, ids, pictures, features, IMAGE))
        assert np.abs(found - torch_logits(model, ids, pictures)).max() <= 1e-2, name
    for file in case.fp32.glob(f"{EMBEDDING_FILE}*"):
        shutil.copy(file, folder)
    with pytest.raises(ArtifactError, match=r"image_features is a tensor\(float16\), the embedding is in float32"):
        Sight(folder, 1)


def test_an_encoder_of_8_bits_equals_pytorch_with_its_matrices(case: Case, tmp_path: Path) -> None:
    """At level 1; as it is served, activations are rounded to 8 bits, too."""
    write_parts(case.text, case.fp32.with_name("fp32-decoder"), tmp_path, bits=8)
    graph, [large], [whole] = Graph(tmp_path / VISION_FILE), seen(tmp_path, (220, 200)), seen(case.fp32, (220, 200))
    coded = coded_matrices(graph)
    # all but the first, which sees pixels
    assert len(coded) == sum(node.op_type == "Gemm" for node in Graph(case.fp32 / VISION_FILE).nodes) - 1
    graph.at_level_one()
    own, wanted = (tower_beside(case.text, matrices).features(large) for matrices in ({}, coded))
    exact = Sight(tmp_path, 1, rewritten=lambda file: graph.serialized()).encode(large)
    served, before = Sight(tmp_path, 1).encode(large), Sight(case.fp32, 1).encode(whole)
    assert np.abs(exact - wanted).max() <= 2e-5
    assert np.abs(before - own).max() <= 2e-5
    # .06 to .11 of a deviation: processors without VNNI round otherwise
    assert 1e-4 < np.abs(wanted - own).max() < np.abs(served - own).max() < 0.15 * own.std()


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
        assert len(stacked) == (2 if case.architecture in NEWER else 0)
        wanted = np.concatenate([part.numpy() for part in (seen.pooler_output, *stacked)], axis=-1)
        (found,) = session.run(None, {"pixel_values": pixels, "image_grid_thw": grid})
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= 2e-5


@pytest.mark.parametrize("case", [MIXTURE], indirect=True)
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


@pytest.mark.parametrize("case", [MIXTURE], indirect=True)
@pytest.mark.parametrize("kind", ["gate_up_proj", "down_proj"])
def test_a_transposed_expert_is_refused(case: Case, tmp_path: Path, kind: str) -> None:
    """Weights that lie as published, in a checkpoint that says it is a Qwen3-MoE."""
    text = Path(shutil.copytree(case.text, tmp_path / "text"))
    name = f"model.layers.1.mlp.experts.{kind}"
    found = load_file(text / SINGLE_FILE)
    found[name] = found[name].transpose(1, 2).contiguous()
    save_file(found, text / SINGLE_FILE, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"experts are \[.*\], their architecture has"):
        build(text, tmp_path / "out", FP32)


@pytest.mark.parametrize("case", [MIXTURE], indirect=True)
def test_each_part_of_the_experts_reaches_the_answer(case: Case) -> None:
    """Of experts whose gate and up change places, or that are transposed, PyTorch answers otherwise."""
    model = case.model()
    ids, pictures = prompts(case.fp32)["two turns"]
    wanted = torch_logits(model, ids, pictures)
    experts = model.model.language_model.layers[1].mlp.experts
    for kind in ("gate_up_proj", "down_proj"):
        whole = getattr(experts, kind).data
        turned = whole.transpose(1, 2).reshape(whole.shape)
        swapped = torch.cat(whole.chunk(2, dim=1)[::-1], dim=1)
        for other in (turned, swapped):
            getattr(experts, kind).data = other
            assert np.abs(torch_logits(model, ids, pictures) - wanted).max() > 0.1
        getattr(experts, kind).data = whole


def test_genai_itself_answers_alike(case: Case) -> None:
    """Its own multimodal layout: it loads the folder, prepares the picture and decodes the same tokens."""
    # no resize on either side, whose kernels differ
    image = noise(128, 64) if case.architecture in NEWER else noise(112, 56)
    picture = prepare(image, ImageSettings.read(case.fp32), where="it")
    ids, found = genai_answer(case.fp32, image, case.fp32.parent / "picture.png", 6)
    assert ids.count(IMAGE) == picture.tokens
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
@pytest.mark.parametrize("case", [WINDOWS], indirect=True)
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


@pytest.mark.parametrize("case", [WINDOWS], indirect=True)
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


@pytest.mark.parametrize("case", [WINDOWS], indirect=True)
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


@pytest.mark.parametrize("case", [MIXTURE], indirect=True)
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
