"""The key of a build moves with the code that carries out its plan, and with no other."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from qwen_onnx.artifact.code import NEUTRAL, code_digest, code_files
from qwen_onnx.catalog.load import load_catalog
from qwen_onnx.catalog.plan import Plan, make_plan
from qwen_onnx.catalog.sources import WheelSource
from qwen_onnx.errors import EnvironmentFault
from qwen_onnx.export.code import exporter_digest, modules_of
from qwen_onnx.files import CHECKSUMS
from qwen_onnx.release.store import JOB
from qwen_onnx.sources import fetch
from tests.conftest import REPOSITORY

CATALOG = load_catalog(REPOSITORY)
PLANS = {
    # from a wheel with a GGUF; Qwen 1.0; safetensors as published
    "cpu": make_plan(CATALOG, "starter", "cpu"),
    "qwen1": make_plan(CATALOG, "qwen-1_8b", "cpu"),
    "hub": make_plan(CATALOG, "qwen3-0.6b", "cpu", "fp32"),
    "htp": make_plan(CATALOG, "starter", "npu-qnn"),
    "openvino": make_plan(CATALOG, "starter", "npu-openvino"),
}
COMMENT = "\n# an edit\n"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and of what stands beside it."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("qwen_onnx", "benchmarks"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def moved(copy: Path, file: str, old: str | None, new: str) -> set[str]:
    """Names of the plans whose digest an edit moves; ``old`` None appends. The file is as before afterwards."""
    path = copy / file
    text = path.read_text(encoding="utf-8")
    assert old is None or text.count(old) == 1
    before = {name: exporter_digest(plan, None, copy / "qwen_onnx") for name, plan in PLANS.items()}
    path.write_text(text + new if old is None else text.replace(old, new), encoding="utf-8")
    after = {name: exporter_digest(plan, None, copy / "qwen_onnx") for name, plan in PLANS.items()}
    path.write_text(text, encoding="utf-8")
    return {name for name in PLANS if before[name] != after[name]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "plans"),
    [
        ("export/passes/gptq/options.py", "BATCH = 4", "BATCH = 8", {"cpu", "qwen1", "htp"}),
        ("export/passes/gptq/options.py", "Field(default=0.01", "Field(default=0.02", {"cpu", "qwen1", "htp"}),
        ("export/passes/genai_builder/options.py", "1 << 20", "1 << 21", {"cpu", "qwen1", "hub"}),
        ("export/passes/openvino_package/package.py", None, COMMENT, {"openvino"}),
        ("export/passes/htp_context/options.py", 'default="60"', 'default="61"', {"htp"}),
        ("artifact/htp/grid.py", None, COMMENT, {"htp"}),
        # imported within a function
        ("export/architectures/moe.py", None, COMMENT, {"cpu", "qwen1", "hub"}),
        ("export/calibration.py", "LONG_LINE = 50", "LONG_LINE = 51", {"cpu", "qwen1", "htp", "openvino"}),
        # read as data
        ("export/calibration.txt", None, "more\n", {"cpu", "qwen1", "htp", "openvino"}),
        # started by name
        ("runtime/engines/runners/qnn.py", None, COMMENT, {"htp"}),
        ("export/worker.py", None, COMMENT, set(PLANS)),
        ("export/readback/htp.py", None, COMMENT, {"htp"}),
        ("export/readback/onnx.py", None, COMMENT, {"cpu", "qwen1", "hub"}),
        ("sources/gguf.py", None, COMMENT, {"cpu", "htp", "openvino"}),
        ("sources/qwen1.py", None, COMMENT, {"qwen1"}),
        ("sources/tiktoken.py", None, COMMENT, {"qwen1"}),
        ("runtime/server/app.py", None, COMMENT, set()),
        ("runtime/service/qwen.py", None, COMMENT, set()),
        ("verify/drift.py", None, COMMENT, set()),
        ("cli/app.py", None, COMMENT, set()),
        ("errors.py", None, COMMENT, set()),
        ("../benchmarks/serving.py", None, COMMENT, set()),
    ],
)
def test_an_edit_moves_the_key_of_the_plans_that_it_concerns(
    file: str, old: str | None, new: str, plans: set[str], copy: Path
) -> None:
    assert moved(copy, f"qwen_onnx/{file}", old, new) == plans


def test_a_local_source_decides_on_the_importer() -> None:
    plan = PLANS["hub"]
    assert "qwen_onnx.sources.gguf" not in modules_of(plan, None)
    assert "qwen_onnx.sources.gguf" in modules_of(plan, Path("weights.gguf"))
    assert "qwen_onnx.sources.gguf" not in modules_of(PLANS["cpu"], Path("checkpoint"))


def test_another_importer_converts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that moves would otherwise find what the old importer left in the cache."""
    digest = next(source.sha256 for source in PLANS["cpu"].sources if isinstance(source, WheelSource))
    made = fetch._folder(tmp_path, digest)
    made.mkdir(parents=True)
    (made / CHECKSUMS).write_text("{}")
    assert fetch.checkpoint_at_hand(PLANS["cpu"], tmp_path, None) == made
    monkeypatch.setattr(fetch, "code_digest", lambda roots: "f" * 64)
    assert fetch.checkpoint_at_hand(PLANS["cpu"], tmp_path, None) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "moves"),
    [
        ("package/templates/card.md.j2", True),
        ("package/rules.py", True),
        ("verify/texts/multilingual.txt", True),
        ("verify/report.html.j2", True),
        ("release/gates.py", True),
        ("runtime/engines/genai.py", True),
        ("runtime/server/app.py", False),
        ("publish/huggingface.py", False),
        ("release/summary.py", False),
    ],
)
def test_a_job_of_a_release_runs_again_for_its_own_code(file: str, moves: bool, copy: Path) -> None:
    def digest(plan: Plan) -> str:
        return code_digest((*JOB, *modules_of(plan, None)), copy / "qwen_onnx")

    path, before = copy / "qwen_onnx" / file, digest(PLANS["cpu"])
    text = path.read_text(encoding="utf-8")
    path.write_text(text + "\n", encoding="utf-8")
    after = digest(PLANS["cpu"])
    path.write_text(text, encoding="utf-8")
    assert (before != after) == moves


@pytest.mark.slow
def test_no_data_file_is_overlooked() -> None:
    """One whose name is put together when the program runs would never move a key."""
    package = REPOSITORY / "qwen_onnx"
    modules = [path.relative_to(REPOSITORY).with_suffix("") for path in package.rglob("*.py")]
    reached = code_files(".".join(module.parts) for module in modules)
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert len(files) > 5
    missing = {path.relative_to(REPOSITORY).as_posix() for path in files} - set(reached)
    assert missing == {"qwen_onnx/py.typed"}


def test_every_import_is_one_that_can_be_followed() -> None:
    paths = list((REPOSITORY / "qwen_onnx").rglob("*.py"))
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_bytes())))
    assert not [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]
    for name in NEUTRAL:
        place = REPOSITORY / name.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").is_file()


def test_code_without_source_has_no_key(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="no source of qwen_onnx"):
        exporter_digest(PLANS["cpu"], None, tmp_path / "qwen_onnx")
