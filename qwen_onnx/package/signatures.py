"""Signatures of device records, by OpenSSH: any key that ``ssh-keygen`` knows, hardware keys and agents included.

A record names the digest of the artifact that was run, so that its signature covers every byte of both. It is a file of
its own beside the record, ``NAME.json.sig``.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from qwen_onnx.artifact.seal import runnable_digest
from qwen_onnx.bounded import read_bytes
from qwen_onnx.errors import ConfigError, EnvironmentFault, PackageError
from qwen_onnx.files import write_whole
from qwen_onnx.package.devices_proven import MOST_BYTES, read_record_of_device
from qwen_onnx.package.records import DEVICE_RECORDS, SIGNATURE
from qwen_onnx.records import Verdict

# of OpenSSH: a signature made for anything else is none of a record
NAMESPACE = "device-record@qwen-onnx"
MOST_SIGNATURE = 64 << 10
# whoever signs may have to type a passphrase or touch a key
SECONDS = 120


def require_signing(key: Path) -> None:
    """Whether a record can be signed, before minutes go by.

    Raises:
        EnvironmentFault: there is no ``ssh-keygen``. ConfigError: there is no such key.
    """
    _program()
    if not key.is_file():
        raise ConfigError([f"--sign {key}: no such file"], hint=f"ssh-keygen -t ed25519 -f {key}")


def signature_of(record: Path) -> Path:
    """Where the signature of a record is, if it has one."""
    return record.with_name(record.name + SIGNATURE)


def sign(record: Path, key: Path) -> Path:
    """Sign a record; returns the file of the signature.

    Args:
        key: private, or public where an agent holds the other half.

    Raises:
        ConfigError: ``ssh-keygen`` does not sign with it.
    """
    done = _run("sign", "-f", str(key), "-n", NAMESPACE, given=record.read_bytes())
    if done.returncode:
        raise ConfigError([f"--sign {key}: {_said(done)}"], hint=f"the record is not signed: {record}")
    write_whole(signature_of(record), done.stdout.decode("ascii"))
    return signature_of(record)


def signers(folder: Path, allowed: Path) -> dict[str, str]:
    """Who signed each record of a device, in a package or beside it.

    Args:
        allowed: OpenSSH's file of allowed signers, see ssh-keygen(1).

    Returns:
        Names of ``allowed`` by the name of the record's file.

    Raises:
        PackageError: names every record that is unsigned, altered, signed by somebody else, or no PASS; or there is
            none.
        EnvironmentFault: there is no ``ssh-keygen``. ConfigError: there is no such file.
    """
    _program()
    if not allowed.is_file():
        raise ConfigError([f"--allowed-signers {allowed}: no such file"], hint="one line for each: NAME KEY")
    found, faults = {}, []
    for record in _records(folder):
        try:
            found[record.name] = _signer(record, allowed)
        except PackageError as error:
            faults.append(f"{record.name}: {error.what}")
    if faults:
        raise PackageError("; ".join(faults), where=str(folder), hint="qwen-onnx verify ... --device NAME --sign KEY")
    if not found:
        raise PackageError(
            "no run on a device is recorded in it or beside it",
            where=str(folder),
            hint=f"qwen-onnx verify {folder} --device NAME --sign KEY",
        )
    return found


def _records(folder: Path) -> Iterator[Path]:
    """Those in a package, and those beside it that are of this very package."""
    for device, name in DEVICE_RECORDS.items():
        if (folder / name).exists():
            yield folder / name
        beside = folder.with_name(f"{folder.name}.{device}.json")
        if beside.exists() and read_record_of_device(beside).digest == runnable_digest(folder):
            yield beside


def _signer(record: Path, allowed: Path) -> str:
    verdict, signature = read_record_of_device(record).verdict, signature_of(record)
    if verdict is not Verdict.PASS:
        raise PackageError(f"the verdict is {verdict}")
    if not signature.exists():
        raise PackageError("it is not signed")
    read_bytes(signature, most_bytes=MOST_SIGNATURE, error=PackageError)
    told = read_bytes(record, most_bytes=MOST_BYTES, error=PackageError)
    named = ("-s", str(signature), "-f", str(allowed))
    principals = _run("find-principals", *named)
    if principals.returncode:
        raise PackageError(f"it is signed by nobody whom {allowed.name} names")
    for name in principals.stdout.decode("utf-8", "replace").split():
        if not _run("verify", *named, "-I", name, "-n", NAMESPACE, given=told).returncode:
            return name
    raise PackageError("its signature is not of these bytes: it was altered, or signed as something else")


def _program() -> str:
    found = shutil.which("ssh-keygen")
    if found is None:
        hint = "install OpenSSH's client, e.g. apt install openssh-client"
        raise EnvironmentFault("ssh-keygen is not installed", hint=hint)
    return found


def _run(verb: str, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [_program(), "-Y", verb, *arguments]
    try:
        return subprocess.run(command, input=given, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise EnvironmentFault(f"ssh-keygen gave no answer in {SECONDS} seconds", where=f"-Y {verb}") from error


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"ssh-keygen ended with {done.returncode}"
