"""The architecture: imports go leftwards only, and light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

# from left to right: a room imports from the rooms to its left; export and runtime do not see each other
ORDER = [
    {"__init__", "bounded", "errors", "files", "git", "records"},
    {"processes"},
    {"catalog"},
    {"artifact"},
    {"sources"},
    {"export", "runtime"},
    {"verify"},
    {"finetune"},
    {"build"},
    {"package"},
    {"publish"},
    {"release"},
    {"cli"},
]
# rooms within the runtime
RUNTIME = [{"engines"}, {"processing"}, {"service"}, {"server", "chat"}, {"__init__"}]


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {module for module in found if module.split(".")[0] == "qwen_onnx"}


def _against(package: Path, order: list[set[str]]) -> dict[tuple[str, str], str]:
    """Pairs of rooms below ``package`` of which the first imports the second, with an example."""
    level = {room: place for place, rooms in enumerate(order) for room in rooms}
    name = "qwen_onnx" if package.name == "qwen_onnx" else f"qwen_onnx.{package.name}"
    found = {}
    for path in sorted(package.rglob("*.py")):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        assert own in level, f"{path} has no place in the order"
        for module in _imports(path):
            if f"{module}.".startswith(f"{name}."):
                other = module.removeprefix(name).removeprefix(".").split(".")[0] or "__init__"
                if own != other and level[other] >= level[own] and not {own, other} <= order[0]:
                    found[own, other] = f"{path.relative_to(package)} imports {module}"
    return found


def test_imports_go_leftwards_only(repository: Path) -> None:
    package = repository / "qwen_onnx"
    assert len(list(package.rglob("*.py"))) > 150
    found = _against(package, ORDER) | _against(package / "runtime", RUNTIME)
    assert not found


def _modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print('\\n'.join(m for m in sys.modules if '.' not in m))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_runtime_loads_neither_torch_nor_olive() -> None:
    loaded = _modules_after("import qwen_onnx.runtime.service.qwen, qwen_onnx.runtime.server.app")
    assert not loaded & {"torch", "olive", "transformers", "onnx"}


def test_what_measures_an_artifact_loads_no_torch() -> None:
    """It would count as memory of the engine: .25 GB."""
    assert not _modules_after("import qwen_onnx.verify.latency_worker") & {"torch", "olive", "transformers", "onnx"}


def test_help_loads_nothing_heavy() -> None:
    loaded = _modules_after(
        "import sys; sys.argv = ['qwen-onnx', '--help']\n"
        "from qwen_onnx.cli.app import main\n"
        "try: main()\nexcept SystemExit: pass"
    )
    assert not loaded & {"torch", "olive", "transformers", "onnx", "onnxruntime", "onnxruntime_genai", "numpy"}
    assert not loaded & {"httpx", "huggingface_hub", "httpx2", "modelscope_hub", "requests"}
