"""The architecture: imports go leftwards only, and light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

LAYERS = [
    {"__init__"},
    {"errors", "files", "checksums", "htp"},
    {"schema"},
    {"passes"},
    {"faults"},
    {"catalog"},
    {"plan"},
    {"checkout"},
    {"sizes"},
    {"select", "estimate"},
    {"environments"},
    {"artifact", "hub", "checkpoint", "gguf_import", "qwen1_import", "tiktoken_import", "sources"},
    {"export", "runtime"},
    {"runners"},
    {"verify"},
    {"package"},
    {"publish", "matrix"},
    {"committed"},
    {"optimize"},
    {"doctor", "compare"},
    {"release"},
    {"commands"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _part(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def test_imports_go_leftwards_only(repository: Path) -> None:
    package = repository / "qwen_onnx"
    files = sorted(package.rglob("*.py"))
    assert len(files) > 15
    for path in files:
        own = path.relative_to(package).parts[0].removesuffix(".py")
        assert own in LEVEL, f"{own} has no place in the layers"
        for module in _imports(path):
            if module.split(".")[0] != "qwen_onnx":
                continue
            other = _part(module)
            allowed = other == own or LEVEL[other] < LEVEL[own] or (LEVEL[other] == LEVEL[own] and own != "runtime")
            allowed = allowed and {own, other} != {"export", "runtime"}
            assert allowed, f"{path.relative_to(repository)} imports {module}"


def _modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print('\\n'.join(m for m in sys.modules if '.' not in m))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_runtime_loads_neither_torch_nor_olive() -> None:
    loaded = _modules_after("import qwen_onnx.runtime.service, qwen_onnx.runtime.server")
    assert not loaded & {"torch", "olive", "transformers", "onnx"}


def test_help_loads_nothing_heavy() -> None:
    loaded = _modules_after(
        "import sys; sys.argv = ['qwen-onnx', '--help']\n"
        "from qwen_onnx import cli\n"
        "try: cli.main()\nexcept SystemExit: pass"
    )
    assert not loaded & {"torch", "olive", "transformers", "onnx", "onnxruntime", "onnxruntime_genai", "numpy"}
    assert not loaded & {"httpx", "huggingface_hub", "httpx2", "modelscope_hub", "requests"}
