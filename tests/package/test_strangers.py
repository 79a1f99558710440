"""A package from a stranger: nothing in it is run, waited for, or read without a bound, and every fault is told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_onnx.artifact.checksums import write_sums
from qwen_onnx.errors import PackageError
from qwen_onnx.package.verify import verify_package
from tests.conftest import run_cli
from tests.package.conftest import edit_json

ESCAPE = "\x1b]0;owned\x07\u202eevil"


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def sparse(path: Path) -> None:
    """100 MB that take no room: far more than any such file has."""
    path.touch()
    os.truncate(path, 100_000_000)


def listed(spoil: Callable[[Path], object]) -> Callable[[Path], object]:
    """With its checksum, as someone who wants to hide it would write it."""

    def both(folder: Path) -> None:
        spoil(folder)
        write_sums(folder)

    return both


def library(folder: Path) -> None:
    (folder / "ops.so").write_bytes(b"\x7fELF")

    def change(data: dict) -> None:  # type: ignore[type-arg]
        data["model"]["decoder"]["session_options"]["custom_ops_library"] = "ops.so"
        del data["model"]["decoder"]["inputs"]["past_key_names"]

    edit_json(folder / "genai_config.json", change)


def outside(folder: Path) -> None:
    def change(data: dict) -> None:  # type: ignore[type-arg]
        data["model"]["decoder"]["filename"] = str(folder / "model.onnx")

    edit_json(folder / "genai_config.json", change)


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def twice(name: str) -> Callable[[Path], object]:
    """The first key once more, at the end."""

    def spoil(folder: Path) -> None:
        whole = (folder / name).read_text()
        key, value = next(iter(json.loads(whole).items()))
        (folder / name).write_text(whole.rstrip().removesuffix("}") + f", {json.dumps(key)}: {json.dumps(value)}}}")

    return spoil


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a library": (listed(library), "'ops.so' is not a name of a file"),
    "a library that is named": (listed(library), "custom_ops_library"),
    "a graph elsewhere": (listed(outside), "model.decoder.filename"),
    "code of Python": (listed(text("tokenizer.py", "import os")), "'tokenizer.py' is not a name"),
    "a pickle": (listed(text("weights.pkl", "x")), "'weights.pkl' is not a name"),
    "deep configuration": (listed(text("genai_config.json", "[" * 100_000)), "genai_config.json is nested deeper"),
    "deep tokenizer": (listed(text("tokenizer_config.json", "[" * 100_000)), "tokenizer_config.json is nested deeper"),
    "a pipe for a record": (replaced("package.json", os.mkfifo), "package.json is not a plain file"),
    "a pipe for sums": (replaced("SHA256SUMS", os.mkfifo), "SHA256SUMS is not a plain file"),
    "a pipe for a manifest": (replaced("manifest.json", os.mkfifo), "manifest.json is not a plain file"),
    "no end": (replaced("model.onnx", lambda path: path.symlink_to("/dev/zero")), "model.onnx is not a plain file"),
    "no end of sums": (replaced("SHA256SUMS", lambda path: path.symlink_to("/dev/zero")), "is not a plain file"),
    "a huge manifest": (replaced("manifest.json", sparse), "manifest.json has more than"),
    "a huge record": (replaced("package.json", sparse), "package.json has more than"),
    "a record in two ways": (listed(twice("package.json")), "package.json has the same key twice"),
    "a manifest in two ways": (listed(twice("manifest.json")), "manifest.json has the same key twice"),
    "a configuration in two ways": (listed(twice("genai_config.json")), "genai_config.json has the same key twice"),
    "odd markers": (
        listed(lambda folder: edit_json(folder / "foundry_local.json", _odd_markers)),
        "tool_call_start is ['x']",
    ),
}


def _odd_markers(data: dict) -> None:  # type: ignore[type-arg]
    data["string_properties"].update(tool_call_start=["x"], capabilities=[])
    data["int_properties"].update(max_output_tokens="x")


@pytest.mark.parametrize("name", SPOILT)
def test_it_is_refused_with_a_deliberate_error(name: str, broken: Path) -> None:
    spoil, word = SPOILT[name]
    spoil(broken)
    with pytest.raises(PackageError) as raised:
        verify_package(broken)
    assert word in str(raised.value)


def test_what_a_stranger_wrote_does_not_reach_the_terminal_raw(broken: Path) -> None:
    edit_json(broken / "package.json", lambda data: data.update(claim=ESCAPE, id=f"{ESCAPE}:1"))
    (broken / f"{ESCAPE}.json").write_text("{}")
    write_sums(broken)
    done = run_cli("verify-package", broken)
    assert done.returncode == 10
    for said in (done.stdout, done.stderr):
        assert not {"\x1b", "\x07", "\u202e"} & set(said)
    assert r"\x1b]0;owned\x07\u202eevil" in done.stderr.replace("\n", "")
