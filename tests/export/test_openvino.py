"""Intel NPUs: what is read back from an IR, and the whole way with OpenVINO itself on a tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from qwen_onnx.catalog.plan import UNCATALOGUED
from qwen_onnx.catalog.schema import Readback
from qwen_onnx.errors import ExportError
from qwen_onnx.export.readback.common import read_back
from qwen_onnx.sources.fetch import cache_root
from tests.conftest import REPOSITORY, edit_yaml, fresh_cli, run_cli

ASKED = Readback(form="OpenVINO", provider="OpenVINO", body_bits=4, head_bits=8, block_size=64, symmetric=True)
TABLE = ("self.model.embed_tokens.weight", "i8", "300, 128")
BODY = ("self.model.layers.0.self_attn.q_proj.weight", "i4", "128, 2, 64")
EIGHT = ("self.model.layers.0.mlp.down_proj.weight", "i8", "128, 256")
SCALE = ("self.model.layers.0.self_attn.q_proj.weight/scale", "f16", "128, 2, 1")
NORM = ("self.model.layers.0.input_layernorm.weight", "f32", "1, 1, 128")


def write_ir(
    folder: Path, *constants: tuple[str, str, str], provider: str = "OpenVINO", named: str = "model.xml"
) -> Path:
    """What the conversion leaves, without the weights' bytes."""
    layers = "".join(
        f'<layer id="{index}" name="{name}" type="Const" version="opset1">'
        f'<data element_type="{kind}" shape="{shape}" offset="0" size="1"/></layer>'
        for index, (name, kind, shape) in enumerate(constants)
    )
    (folder / "model.xml").write_text(
        f'<?xml version="1.0"?><net name="Model0" version="11"><layers>{layers}</layers></net>'
    )
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [-1, -1])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [-1, -1, 300])
    node = helper.make_node("EPContext", ["input_ids"], ["logits"], domain="com.microsoft", ep_cache_context=named)
    onnx.save(helper.make_model(helper.make_graph([node], "wrapper", [ids], [logits])), str(folder / "model.onnx"))
    decoder = {"filename": "model.onnx", "session_options": {"provider_options": [{provider: {}}]}}
    sizes = {"context_length": 1024, "vocab_size": 300, "eos_token_id": 1}
    (folder / "genai_config.json").write_text(json.dumps({"model": {**sizes, "decoder": decoder}}))
    return folder


def test_what_was_asked_for_is_found(tmp_path: Path) -> None:
    found = read_back(write_ir(tmp_path, TABLE, BODY, EIGHT, SCALE, NORM), ASKED)
    kinds = {(item["type"], item["block_size"]): item["count"] for item in found["matrices"]}
    assert kinds == {("i8", None): 2, ("i4", 64): 1}


def test_fp16_is_found_under_its_own_name(tmp_path: Path) -> None:
    half = [(f"{name}_compressed", "f16", shape) for name, _, shape in (TABLE, (BODY[0], "", "128, 128"))]
    asked = Readback(form="float", provider="OpenVINO", body_bits=16, head_bits=16)
    assert read_back(write_ir(tmp_path, *half, NORM), asked)["matrices"] == [
        {"type": "f16", "block_size": None, "count": 2}
    ]
    with pytest.raises(ExportError, match=r"q_proj\.weight is f32, asked 16 bits"):
        read_back(write_ir(tmp_path, half[0], (BODY[0], "f32", "128, 128")), asked)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ((TABLE, (BODY[0], "i4", "128, 1, 128")), "q_proj.weight: block_size is 128, asked 64"),
        ((TABLE, (BODY[0], "u4", BODY[2])), "q_proj.weight: symmetric is False, asked True"),
        ((TABLE, BODY, (EIGHT[0], "f16", EIGHT[2])), r"down_proj.weight is f16, asked \[4, 8\] bits"),
        (((TABLE[0], "f16", TABLE[2]), BODY), r"embed_tokens.weight is f16, asked \[8\] bits"),
        ((TABLE, EIGHT), "no matrix of the body has 4 bits"),
    ],
)
def test_what_was_not_asked_for_is_an_error(
    tmp_path: Path, constants: tuple[tuple[str, str, str], ...], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        read_back(write_ir(tmp_path, *constants), ASKED)


def test_the_model_around_the_ir_is_looked_at(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="provider is cpu, asked OpenVINO"):
        read_back(write_ir(tmp_path, TABLE, BODY, provider="cpu"), ASKED)
    with pytest.raises(ExportError, match=r"not one EPContext node for model\.xml"):
        read_back(write_ir(tmp_path, TABLE, BODY, named="other.xml"), ASKED)


@pytest.mark.release
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_a_tiny_model_is_built_for_npus_and_proven_by_openvino(
    checkout: Path, tiny_checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    """Through the command line: the environment, Olive in it, readback, OpenVINO's CPU plugin, the report's claim."""

    def small(pipeline: dict) -> None:  # type: ignore[type-arg]
        build = pipeline["precisions"][precision]
        build["steps"][0]["config"] |= {"windows": 4, "window": 64}
        # a random model's predictions are nearly uniform: its top-1 says little
        build["limits"] |= {"top1": 0.01}

    edit_yaml(checkout / "pipelines/npu-openvino.yaml", small)
    target = tmp_path / "npu"
    # the environment takes 1.6 GB: it is made once, where the checkout under test keeps it
    environment = {**os.environ, "QWEN_ONNX_CACHE": str(cache_root(REPOSITORY))}
    arguments = ("--precision", precision, "--source", tiny_checkpoint, "--output", target)
    done = fresh_cli("optimize", "starter", "--target", "npu-openvino", *arguments, cwd=checkout, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads((target / "report.json").read_text())
    proven = "proven: numerics on OpenVINO's CPU plugin; not run on the device"
    assert report["claim"] == f"{proven}; {UNCATALOGUED}"
    assert "latency" in report["not_checked"]
    checks = {item["name"]: item for item in report["checks"]}
    assert set(checks) >= {"graph_parity", "drift", "kv_decode", "greedy", "tokenizer", "chat_template"}
    assert checks["drift"]["measured"]["kld_mean"] > 0
    settings = json.loads((target / "genai_config.json").read_text())["model"]
    provider = settings["decoder"]["session_options"]["provider_options"][0]["OpenVINO"]
    assert provider["device_type"] == "NPU"
    lengths = json.loads(provider["load_config"])["NPU"]
    assert sum(int(length) for length in lengths.values()) == settings["context_length"] == 8192
    served = run_cli("generate", target, "Hello", cwd=checkout)
    assert served.returncode == 6
    assert "OpenVINO" in served.stderr
