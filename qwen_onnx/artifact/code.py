"""Which of our code decides a result: the modules that it starts from, what they import, and the data that they read.

Imports are followed in the source, those inside functions too. A string that names a module counts as an import: a
process is started by it; one that is completed when it runs, ``f"qwen_onnx.room.{name}"``, counts for every module of
that room. A string that names a file or folder beside its module counts as data. What is imported under
``TYPE_CHECKING`` never runs.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from qwen_onnx.errors import EnvironmentFault
from qwen_onnx.files import PACKAGE
from qwen_onnx.records import digest_of

# with everything below them; an edit of these cannot alter a byte, and would rebuild every artifact
NEUTRAL = {
    "qwen_onnx.errors": "what people are told when there is no result",
    "qwen_onnx.export.progress": "what people are told meanwhile",
    "qwen_onnx.processes": "starts children and takes their lines; what they do is in their own modules",
    "qwen_onnx.catalog.costs": "predicts sizes, and writes none",
    "qwen_onnx.cli.app": "reads options and calls what the roots name",
}
MODULE = re.compile(r"qwen_onnx(\.\w+)+\.?")
FILE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")


def code_digest(roots: Iterable[str], package: Path = PACKAGE) -> str:
    """Digest of ``code_files``."""
    return digest_of(code_files(roots, package))


def code_files(roots: Iterable[str], package: Path = PACKAGE) -> dict[str, str]:
    """SHA-256 by name of every source and data file that the modules ``roots`` reach, sorted.

    Args:
        roots: full names of modules.
        package: folder of ``qwen_onnx``.

    Raises:
        EnvironmentFault: a root has no source.
    """
    found: dict[Path, str] = {}
    # a package that a module is imported through runs its top level alone
    seen: set[tuple[str, bool]] = set()
    pending = [(name, True) for name in roots]
    missing = [name for name, _ in pending if _source(name, package) is None]
    if missing:
        hint = "install qwen-onnx with its .py files"
        raise EnvironmentFault(f"no source of {', '.join(missing)}", where=str(package), hint=hint)
    while pending:
        name, whole = pending.pop()
        path = _source(name, package)
        if path is None or (name, whole) in seen or _is_neutral(name):
            continue
        seen.add((name, whole))
        text = path.read_bytes()
        found[path] = hashlib.sha256(text).hexdigest()
        modules, strings = _mentioned(text, whole)
        pending += [(module, True) for mention in modules for module in _members(mention, package)]
        pending += [(parent, False) for parent in _parents(name)]
        for file in (file for string in strings for file in _data(path.parent / string)):
            found[file] = hashlib.sha256(file.read_bytes()).hexdigest()
    return dict(sorted((path.relative_to(package.parent).as_posix(), digest) for path, digest in found.items()))


def _is_neutral(name: str) -> bool:
    return any(f"{name}.".startswith(f"{neutral}.") for neutral in NEUTRAL)


def _source(name: str, package: Path) -> Path | None:
    """The file of a module; None for what is no module of the package, such as a name that one imports from it."""
    place = package.parent / name.replace(".", "/")
    files = (place / "__init__.py", place.with_name(f"{place.name}.py"))
    return next((file for file in files if file.is_file()), None)


def _members(name: str, package: Path) -> list[str]:
    """The modules that a mention stands for: itself, or, when it ends with a dot, all that it may begin."""
    if not name.endswith("."):
        return [name]
    return [f"{name}{path.stem}" for path in (package.parent / name.replace(".", "/")).glob("*.py")]


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _data(path: Path) -> Iterator[Path]:
    files = path.rglob("*") if path.is_dir() else (path,)
    yield from (file for file in files if file.is_file() and file.suffix not in (".py", ".pyc"))


@cache
def _mentioned(text: bytes, whole: bool) -> tuple[frozenset[str], frozenset[str]]:
    """Names of modules, and names that files could have, in a source; at its top level alone unless ``whole``."""
    modules, strings = set(), set()
    for node in _nodes(ast.parse(text), whole):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # what is imported may be a module itself
            modules |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and whole:
            if MODULE.fullmatch(node.value):
                modules.add(node.value)
            elif FILE.fullmatch(node.value):
                strings.add(node.value)
    return frozenset(name for name in modules if name.split(".")[0] == PACKAGE.name), frozenset(strings)


def _nodes(node: ast.AST, whole: bool) -> Iterator[ast.AST]:
    """Every node that can run."""
    yield node
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        children: Iterable[ast.AST] = node.orelse
    elif not whole and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        children = ()
    else:
        children = ast.iter_child_nodes(node)
    for child in children:
        yield from _nodes(child, whole)
