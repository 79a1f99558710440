"""HTP contexts of tiny models on the simulator, in an environment that is made from the package index."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from qwen_onnx.artifact.htp.folder import CONTEXT, QDQ, HtpFolder, graph_file
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import make_plan
from qwen_onnx.errors import ArtifactError, ExportError, VerificationError
from qwen_onnx.export.passes.htp_context.context import compile_in
from qwen_onnx.export.passes.htp_context.options import HtpContextOptions
from qwen_onnx.export.passes.htp_qdq.export import export
from qwen_onnx.export.readback.htp import compare_folder, read_folder
from qwen_onnx.processes.environments import Interpreter, interpreter_of
from qwen_onnx.runtime.engines.runners.client import Runner
from qwen_onnx.runtime.engines.runners.qnn import Backend
from qwen_onnx.sources.fetch import cache_root
from tests.conftest import REPOSITORY
from tests.export.test_htp import EXPORT, IDS, PREFILL, quantized
from tests.fixtures.architectures import make_checkpoint

pytestmark = pytest.mark.slow
CATALOG = load_catalog(REPOSITORY)
CONFIG = HtpContextOptions()
BITS = {"Qwen2ForCausalLM": 4, "Qwen3ForCausalLM": 8}


@pytest.fixture(scope="module")
def interpreter() -> Interpreter:
    return interpreter_of(CATALOG.environments["qnn"], cache_root(REPOSITORY), print)


# one of them in CI: each takes about a minute
@pytest.fixture(
    scope="module", params=["Qwen2ForCausalLM", pytest.param("Qwen3ForCausalLM", marks=pytest.mark.release)]
)
def compiled(
    request: pytest.FixtureRequest, interpreter: Interpreter, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A compiled folder: Qwen2 in int4, Qwen3 in int8."""
    folder = tmp_path_factory.mktemp("simulator")
    checkpoint = make_checkpoint(request.param, folder / "checkpoint")
    export(quantized(checkpoint, folder, BITS[request.param]), folder / "out", EXPORT)
    compile_in(interpreter, folder / "out", CONFIG)
    return folder / "out"


def on_cpu(folder: Path, to: Path) -> np.ndarray:
    """Logits of the folder's QDQ graphs on the CPU."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.bin"))
    HtpFolder.read(to).in_form(QDQ).write()
    return Backend(to, 1).logits(IDS)


def test_the_simulator_computes_what_the_cpu_does(compiled: Path, interpreter: Interpreter, tmp_path: Path) -> None:
    expected = on_cpu(compiled, tmp_path / "cpu")
    runner = Runner(compiled, "qnn", interpreter, threads=1)
    found = runner.logits(IDS)
    # the HTP computes the residual stream and its norms in fp16
    assert np.abs(found - expected).max() < 0.3
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.9
    # token by token through the KV cache: the other graph gives the same codes
    decoded = runner.forced_logits(IDS[:20], IDS[20:])
    assert np.abs(decoded - found[19:]).max() < 0.1
    assert len(list(runner.generate(IDS[:3], max_new_tokens=4, stop_on_eos=False))) == 4
    runner.close()


def test_each_context_is_one_node_for_the_chip_that_was_asked_for(compiled: Path) -> None:
    facts = read_folder(compiled)
    bits = max(facts[1]["qdq"]["weights"].values(), key=lambda weight: -weight["bits"])["bits"]
    asked = make_plan(CATALOG, "starter", "npu-qnn", f"int{bits}").readback
    summary = compare_folder(facts, asked)
    assert {found["context"]["operators"]["EPContext"] for found in summary.values()} == {1}
    with pytest.raises(ExportError, match="the context's soc_model is 60, asked 43"):
        compare_folder(facts, asked.model_copy(update={"soc_model": "43"}))
    with pytest.raises(ExportError, match=r"bits, asked \[|no matrix of the body has"):
        compare_folder(facts, asked.model_copy(update={"body_bits": 12 - bits}))


def test_a_binary_that_is_gone_is_found_out(compiled: Path, interpreter: Interpreter, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(compiled, tmp_path / "broken"))
    for path in broken.glob("*.bin"):
        path.unlink()
    asked = make_plan(CATALOG, "starter", "npu-qnn", "int8").readback
    with pytest.raises(ExportError, match="binary is missing or empty"):
        compare_folder(read_folder(broken), asked)
    with pytest.raises((ArtifactError, VerificationError)):
        Runner(broken, "qnn", interpreter, threads=1).logits(IDS)


def test_what_the_htp_refuses_is_no_context(compiled: Path, interpreter: Interpreter, tmp_path: Path) -> None:
    """A node that would fall back to the CPU ends the compilation."""
    broken = Path(shutil.copytree(compiled, tmp_path / "refused"))
    path = broken / graph_file(PREFILL, QDQ)
    model = onnx.load(str(path), load_external_data=False)
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    softmax.op_type = "Hardmax"
    onnx.save(model, str(path))
    for tokens in HtpFolder.read(broken).windows:
        (broken / graph_file(tokens, CONTEXT)).unlink()
    with pytest.raises(ExportError, match="compiled no context"):
        compile_in(interpreter, broken, CONFIG)


def test_the_form_is_written_last(compiled: Path) -> None:
    assert json.loads((compiled / "htp.json").read_text())["form"] == CONTEXT
