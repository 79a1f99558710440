"""API keys: random, kept as hashes, compared in constant time.

A key has 256 random bits, so that its SHA-256 cannot be searched for: the slow salted hashes that passwords need would
only slow every request down (https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html).
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from qwen_onnx.errors import ConfigError, full_disk
from qwen_onnx.files import write_private

KEY_PREFIX = "qo-"
KEYS_VARIABLE = "QWEN_ONNX_API_KEYS"
KEYS_FILE_VARIABLE = "QWEN_ONNX_API_KEYS_FILE"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DIGEST = re.compile(r"[0-9a-f]{64}")
LEAST_KEY = 16


class KeyRing:
    """Names by the SHA-256 of their key, in hexadecimal. An empty ring asks for no key."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = dict(names)

    def __len__(self) -> int:
        return len(self._names)

    def name_of(self, key: str) -> str | None:
        """Whose key it is; every stored hash is looked at, so that the time tells nothing."""
        digest, found = digest_of(key), None
        for stored, name in self._names.items():
            if hmac.compare_digest(stored, digest):
                found = name
        return found

    @classmethod
    def load(cls, path: Path | None, environment: Mapping[str, str]) -> KeyRing:
        """Keys of a file and of ``QWEN_ONNX_API_KEYS``, which holds keys separated by commas.

        Raises:
            ConfigError: see ``read_keys``; or a variable that holds no key, a path, or a key too short to be random.
        """
        names = {digest: name for name, digest in read_keys(path).items()} if path else {}
        if path and not names:
            raise ConfigError([f"{path}: holds no key"], hint=f"qwen-onnx keys new NAME --file {path}")
        text = environment.get(KEYS_VARIABLE)
        if text is not None:
            keys = [key.strip() for key in text.split(",") if key.strip()]
            if not keys or min(map(len, keys)) < LEAST_KEY:
                raise ConfigError([f"{KEYS_VARIABLE}: no key, or one of fewer than {LEAST_KEY} characters"])
            if any("/" in key or "\\" in key for key in keys):
                raise ConfigError(
                    [f"{KEYS_VARIABLE}: holds keys, and this is a path"], hint=f"a file of keys: {KEYS_FILE_VARIABLE}"
                )
            names |= {digest_of(key): f"env-{index + 1}" for index, key in enumerate(keys)}
        return cls(names)


def digest_of(key: str) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> dict[str, str]:
    """Hashes by name.

    Raises:
        ConfigError: unreadable, damaged, or open to other users of the machine.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if os.name == "posix" and mode & 0o077:
            raise ConfigError([f"{path}: mode {mode:04o}: others may read or write it"], hint=f"chmod 600 {path}")
        entries = json.loads(path.read_text(encoding="utf-8"))["keys"]
        names = {entry["name"]: entry["sha256"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError([f"{path}: not a key file ({reason})"], hint="qwen-onnx keys new NAME --file FILE") from error
    wrong = [name for name, digest in names.items() if not NAME.fullmatch(name) or not DIGEST.fullmatch(str(digest))]
    if wrong or len(names) != len(entries):
        raise ConfigError([f"{path}: damaged entries {wrong}" if wrong else f"{path}: a name appears twice"])
    return names


def new_key(name: str, path: Path) -> str:
    """Make a key, add its hash to the file (mode 0600, replaced at once), and return it: it is kept nowhere else.

    Several at once wait for each other, so that none is lost: a lock file stays beside the file.

    Raises:
        ConfigError: see ``read_keys``; the name is taken or no name; the file cannot be written.
        EnvironmentFault: the disk is full.
    """
    if not NAME.fullmatch(name):
        raise ConfigError([f"{name!r} is not a name: letters, digits, '.', '_', '-', at most 64"])
    if not path.parent.is_dir():
        raise ConfigError([f"{path}: there is no such folder"], hint=f"mkdir -m 700 {path.parent}")
    try:
        with FileLock(path.with_name(f".{path.name}.lock"), mode=0o600):
            return _add_key(name, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full_disk(path.parent) from error
        raise ConfigError(
            [f"{path}: cannot be written: {error.strerror}"], hint="name a file in a folder of your own"
        ) from error


def _add_key(name: str, path: Path) -> str:
    names = read_keys(path) if path.exists() else {}
    if name in names:
        raise ConfigError([f"{path}: there is a key named {name!r} already"], hint="choose another name")
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    names[name] = digest_of(key)
    text = json.dumps({"keys": [{"name": name, "sha256": digest} for name, digest in names.items()]}, indent=2)
    write_private(path, text + "\n")
    return key
