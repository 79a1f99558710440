"""Finished steps of a long build, kept so that the same build goes on after it was killed.

Each step writes files under temporary names, then ``commit`` flushes them, takes their SHA-256, renames them and
writes the step's record by one rename. A step counts only with its record, and only while the files that the record
names still have their SHA-256.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from qwen_onnx.errors import ExportError
from qwen_onnx.files import RECORD_SUFFIX, sha256_of

IDENTITY = "identity.json"
# where a pass finds the folder of its finished steps, below the folder that Olive runs in
KEPT_FOLDER = "kept"
# where it finds the text that the user gave to calibrate on, likewise
OWN_TEXT = "own-text"
# where a pass says, beside it, what it expects of the artifact: ``kld`` in nats per token, ``bytes`` of its files
PREDICTION = "prediction.json"


class WorkFolder:
    """Steps of one build below ``path``.

    Args:
        path: made when it is not there.
        identity: what the steps depend on; a folder with another identity is emptied first.
    """

    def __init__(self, path: Path, identity: Any) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(identity, sort_keys=True)
        known = path / IDENTITY
        if not known.exists() or known.read_text(encoding="utf-8") != text:
            self._empty()
            self._write(known, text)

    def temporary(self, name: str) -> Path:
        """Where a step writes the file that ``commit`` will call ``name``; an older attempt is removed."""
        path = self.path / f"{name}.part"
        path.unlink(missing_ok=True)
        return path

    def commit(self, step: str, files: list[str], facts: dict[str, Any] | None = None) -> None:
        """Keep the temporary ``files`` and record the step as finished, with what else is to be remembered."""
        for name in files:
            part = self.path / f"{name}.part"
            with part.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(part, self.path / name)
        checksums = {name: sha256_of(self.path / name) for name in files}
        self._record(step, checksums, facts or {})

    def finished(self, step: str) -> dict[str, Any] | None:
        """The facts of a finished step whose files are whole, else None: do it (again)."""
        record = self._read(step)
        if record is None:
            return None
        for name, checksum in record["files"].items():
            path = self.path / name
            if not path.exists() or sha256_of(path) != checksum:
                (self.path / f"{step}{RECORD_SUFFIX}").unlink()
                return None
        facts: dict[str, Any] = record["facts"]
        return facts

    def required(self, step: str, name: str) -> Path:
        """A file of a finished step that the next one reads.

        Raises:
            ExportError: the step is not finished, or its file is gone or altered; the folder is emptied.
        """
        record = self._read(step)
        if record is None or name not in record["files"] or self.finished(step) is None:
            self._empty()
            raise ExportError(
                f"{name} of an interrupted build is gone or altered",
                where=str(self.path),
                hint="run the command again: it starts from the beginning",
            )
        return self.path / name

    def release(self, step: str, *names: str) -> None:
        """Remove files of a finished step that no later step needs; it stays finished."""
        record = self._read(step)
        if record is None:
            return
        kept = {name: checksum for name, checksum in record["files"].items() if name not in names}
        if kept != record["files"]:
            # the record first: a file that it no longer names may be there or not
            self._record(step, kept, record["facts"])
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def _empty(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _read(self, step: str) -> dict[str, Any] | None:
        path = self.path / f"{step}{RECORD_SUFFIX}"
        if not path.exists():
            return None
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record

    def _record(self, step: str, files: dict[str, str], facts: dict[str, Any]) -> None:
        self._write(self.path / f"{step}{RECORD_SUFFIX}", json.dumps({"files": files, "facts": facts}))

    @staticmethod
    def _write(path: Path, text: str) -> None:
        part = path.with_name(f"{path.name}.part")
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
