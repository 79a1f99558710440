"""The architecture: imports go leftwards only, and light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

# from left to right: a room imports from the rooms to its left; export and runtime do not see each other
ORDER = [
    {"__init__", "errors", "files", "git"},
    {"processes"},
    {"catalog"},
    {"artifact"},
    {"sources"},
    {"export", "runtime"},
    {"verify"},
    {"build"},
    {"package"},
    {"publish"},
    {"release"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# modules on their way into their rooms
MOVING = {
    "checkout": "git",
    "environments": "processes",
    **dict.fromkeys(["schema", "passes", "faults", "plan", "sizes", "select", "committed"], "catalog"),
    **dict.fromkeys(["checksums", "htp"], "artifact"),
    **dict.fromkeys(["hub", "checkpoint", "gguf_import", "qwen1_import", "tiktoken_import"], "sources"),
    "runners": "runtime",
    **dict.fromkeys(["optimize", "estimate", "compare", "doctor"], "build"),
    "matrix": "release",
    "commands": "cli",
}
# imports against the order that are still to be turned round
PENDING: set[tuple[str, str]] = {
    ("git", "catalog"),
    ("processes", "catalog"),
    ("catalog", "release"),
}


def _room(module: str) -> str:
    name = module.split(".")[1] if "." in module else "__init__"
    return MOVING.get(name, name)


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {module for module in found if module.split(".")[0] == "qwen_onnx"}


def test_imports_go_leftwards_only(repository: Path) -> None:
    package = repository / "qwen_onnx"
    files = sorted(package.rglob("*.py"))
    assert len(files) > 15
    against = set()
    for path in files:
        own = _room("qwen_onnx." + path.relative_to(package).parts[0].removesuffix(".py"))
        assert own in LEVEL, f"{own} has no place in the order"
        for module in _imports(path):
            other = _room(module)
            allowed = own == other or LEVEL[other] < LEVEL[own] or {own, other} <= ORDER[0]
            if not allowed:
                against.add((own, other))
                assert (own, other) in PENDING, f"{path.relative_to(repository)} imports {module}"
    assert against == PENDING, "what was turned round need not be listed"


def _modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print('\\n'.join(m for m in sys.modules if '.' not in m))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_runtime_loads_neither_torch_nor_olive() -> None:
    loaded = _modules_after("import qwen_onnx.runtime.service.qwen, qwen_onnx.runtime.server.app")
    assert not loaded & {"torch", "olive", "transformers", "onnx"}


def test_help_loads_nothing_heavy() -> None:
    loaded = _modules_after(
        "import sys; sys.argv = ['qwen-onnx', '--help']\n"
        "from qwen_onnx import cli\n"
        "try: cli.main()\nexcept SystemExit: pass"
    )
    assert not loaded & {"torch", "olive", "transformers", "onnx", "onnxruntime", "onnxruntime_genai", "numpy"}
    assert not loaded & {"httpx", "huggingface_hub", "httpx2", "modelscope_hub", "requests"}
