"""The peers, and the same checkpoint converted for each."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock

from benchmarks.bnb4 import files_bytes
from benchmarks.peers.gguf_file import write_gguf
from qwen_onnx.catalog.load import find_root, load_catalog
from qwen_onnx.errors import ConfigError, EnvironmentFault, SourceError
from qwen_onnx.processes.environments import Environment, Interpreter, interpreter_of
from qwen_onnx.processes.progress import progress
from qwen_onnx.records import digest_of
from qwen_onnx.sources.checkpoint import shards

ROOT = Path(__file__).resolve().parents[2]
OPENVINO_GENAI = "openvino-genai==2026.4.1.0"
OURS = "ours"
LLAMA_TYPES = ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
LLAMA = {f"llama-{kind.lower()}": kind for kind in LLAMA_TYPES}
OPENVINO = "openvino-int4"
PEERS = (*LLAMA, OPENVINO)
# what each backend imports, and the next command where it is not there
NEEDED = {
    "llama": ("llama_cpp", "pip install 'qwen-onnx[bench]' (it compiles llama.cpp; or --python llama=PYTHON)"),
    "openvino": ("openvino_genai", f"pip install {OPENVINO_GENAI} optimum-intel into it, or leave --python out"),
}


@dataclass(frozen=True)
class Model:
    """One that is measured: ``path`` is what its backend loads; ``bytes`` of graph and weights, no tokenizer."""

    name: str
    backend: str
    path: Path
    bytes: int
    interpreter: Interpreter


class Interpreters:
    """The Python of each backend.

    Args:
        given: by backend, instead of ours and of the environment that is made for OpenVINO.
        cache: where that is made.

    Raises:
        ConfigError: a backend has no such name.
    """

    def __init__(self, given: Mapping[str, Path], cache: Path) -> None:
        unknown = sorted(set(given) - set(NEEDED))
        if unknown:
            raise ConfigError([f"--python: no backend {unknown[0]!r}; there are {', '.join(NEEDED)}"])
        self._given, self._cache = given, cache

    def of(self, backend: str) -> Interpreter:
        """Raises EnvironmentFault: it has not what the backend needs, or OpenVINO's cannot be made."""
        if backend == OURS:
            return Interpreter(Path(sys.executable), ROOT)
        if backend in self._given:
            found = Interpreter(self._given[backend], ROOT)
        elif backend == "openvino":
            found = Interpreter(interpreter_of(_openvino(), self._cache).python, ROOT)
        else:
            found = Interpreter(Path(sys.executable), ROOT)
        package, hint = NEEDED[backend]
        command = [str(found.python), "-c", f"import sys, importlib.util as u; sys.exit(not u.find_spec({package!r}))"]
        try:
            lacking = subprocess.run(command, check=False, capture_output=True).returncode != 0
        except OSError as error:
            raise EnvironmentFault(f"--python {backend}: {error.strerror}", where=str(found.python)) from error
        if lacking:
            raise EnvironmentFault(f"{package} is not installed", where=str(found.python), hint=hint)
        return found


def _openvino() -> Environment:
    """What OpenVINO's target is built with, and GenAI."""
    found = load_catalog(find_root()).environment("openvino")
    return found.model_copy(update={"name": "openvino-genai", "requirements": (*found.requirements, OPENVINO_GENAI)})


def models(
    artifact: Path, checkpoint: Path, names: Sequence[str], interpreters: Interpreters, cache: Path, threads: int
) -> list[Model]:
    """Our artifact, and the checkpoint as each peer wants it; what was converted before is taken from ``cache``.

    Raises:
        ConfigError: no peer has such a name.
        EnvironmentFault: a peer is not installed, or does not convert the checkpoint.
        UnsupportedModelError: see ``write_gguf``.
    """
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ConfigError([f"--peers: no peer {name!r}; there are {', '.join(PEERS)}" for name in unknown])
    if not (checkpoint / "config.json").is_file():
        raise SourceError("there is no checkpoint", where=str(checkpoint), hint="qwen-onnx fetch starter --output DIR")
    found = [Model(OURS, OURS, artifact, files_bytes(artifact), interpreters.of(OURS))]
    # all of them before the first conversion, which takes minutes
    pythons = {name: interpreters.of("openvino" if name == OPENVINO else "llama") for name in names}
    for name, python in pythons.items():
        if name == OPENVINO:
            path = _converted(cache / _key(checkpoint, OPENVINO_GENAI) / name, partial(_ir, python, checkpoint))
            size = folder_bytes_of(path, ".xml", ".bin")
            found.append(Model(name, "openvino", path, size, python))
        else:
            place = cache / _key(checkpoint, name)
            path = _converted(place / f"{name}.gguf", partial(_gguf, python, checkpoint, LLAMA[name], threads))
            found.append(Model(name, "llama", path, path.stat().st_size, python))
    return found


def folder_bytes_of(folder: Path, *suffixes: str) -> int:
    """Bytes of the model's files, not of its tokenizer's, which OpenVINO writes as graphs of their own."""
    files = [path for path in folder.glob("openvino_model*") if path.suffix in suffixes]
    return sum(path.stat().st_size for path in files)


def _key(checkpoint: Path, how: str) -> str:
    """Another checkpoint, or another way to convert it, has another folder."""
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in shards(checkpoint)]
    return digest_of([str(checkpoint.resolve()), stats, how])[:16]


def _converted(target: Path, convert: Callable[[Path], None]) -> Path:
    """``target``, which ``convert`` makes when it is not there: what is there is whole, whatever was killed before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent.with_suffix(".lock")):
        if not target.exists():
            progress(f"converting for {target.stem}")
            scratch = target.parent / "unfinished"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                convert(scratch / target.name)
                (scratch / target.name).rename(target)
            finally:
                shutil.rmtree(scratch)
    return target


def _gguf(python: Interpreter, checkpoint: Path, kind: str, threads: int, target: Path) -> None:
    source = target.with_suffix(".f32.gguf")
    write_gguf(checkpoint, source)
    _module(python, "llama", str(source), str(target), kind, str(threads))
    source.unlink()


def _ir(python: Interpreter, checkpoint: Path, target: Path) -> None:
    _module(python, "openvino", str(checkpoint), str(target))


def _module(python: Interpreter, backend: str, *arguments: str) -> None:
    command = [str(python.python), "-m", f"benchmarks.peers.{backend}", *arguments]
    done = subprocess.run(command, env=python.variables, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise EnvironmentFault(f"{backend} does not convert the checkpoint: {lines[-1][:500]}", where=arguments[0])
