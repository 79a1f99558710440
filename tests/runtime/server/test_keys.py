"""API keys at rest and at the door."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from qwen_onnx.errors import ConfigError
from qwen_onnx.runtime.server.keys import KeyRing, new_key
from tests.conftest import run_cli


def test_a_key_is_known_by_its_hash_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first, second = new_key("alice", path), new_key("bob", path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert first not in path.read_text()
    ring = KeyRing.load(path, {})
    assert (ring.name_of(first), ring.name_of(second)) == ("alice", "bob")
    for wrong in ("", first[:-1], first + "x", first.upper(), "\udc80"):
        assert ring.name_of(wrong) is None
    with pytest.raises(ConfigError, match="already"):
        new_key("alice", path)


def test_the_command_prints_a_key_that_works(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    done = run_cli("keys", "new", "carol", "--file", path)
    assert done.returncode == 0, done.stderr
    assert KeyRing.load(path, {}).name_of(done.stdout.strip()) == "carol"


def test_keys_of_the_environment() -> None:
    ring = KeyRing.load(None, {"QWEN_ONNX_API_KEYS": "a" * 32 + ", " + "b" * 32})
    assert ring.name_of("b" * 32) == "env-2"
    for bad in ("", " , ", "short"):
        with pytest.raises(ConfigError, match="QWEN_ONNX_API_KEYS"):
            KeyRing.load(None, {"QWEN_ONNX_API_KEYS": bad})


@pytest.mark.parametrize("path", ["/run/secrets/keys.json", "some/folder/keys.json", "C:\\secrets\\keys.json"])
def test_a_path_is_not_a_key(path: str) -> None:
    with pytest.raises(ConfigError, match="QWEN_ONNX_API_KEYS_FILE") as caught:
        KeyRing.load(None, {"QWEN_ONNX_API_KEYS": f"{'a' * 32},{path}"})
    assert path not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys.json"
    new_key("alice", path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        KeyRing.load(path, {})


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"keys": 1}', '{"keys": [{"name": "x"}]}', '{"keys": [{"name": "x", "sha256": "1"}]}']
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"keys\.json"):
        KeyRing.load(path, {})
    with pytest.raises(ConfigError):
        KeyRing.load(tmp_path / "none.json", {})
