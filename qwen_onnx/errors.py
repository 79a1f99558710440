"""Every error that qwen-onnx raises on purpose.

QwenOnnxError                      exit 1
├── ConfigError                    exit 2   recipe, pipeline or command line: all faults at once
├── EnvironmentFault               exit 3   missing extra, package versions that do not fit, full disk
├── SourceError                    exit 4   the weights cannot be had or cannot be trusted
│   ├── ChecksumError                       bytes differ from the pinned SHA-256
│   └── UnsupportedModelError               not a checkpoint that a recipe can build
├── ExportError                    exit 5   Olive failed, or the graph is not what was asked for
├── ArtifactError                  exit 6   missing, altered or foreign artifact
│   └── BuildLockedError                    another process builds the same artifact
├── VerificationError              exit 7   a check could not be carried out
│   └── VerdictError                        the verdict is FAIL or INCONCLUSIVE
├── RequestError                   exit 8   the runtime refuses this input (HTTP 400)
│   ├── PromptTooLongError                  prompt plus answer do not fit the context
│   ├── ConflictError                       it contradicts what the server holds now (HTTP 409)
│   └── TemplateError                       the chat template refuses these messages
├── PackageError                   exit 10  a package breaks a rule, was altered, or may not be made
├── PublishError                   exit 11  a place to publish to or pull from fails, or holds what cannot be trusted
├── ReleaseError                   exit 12  a job of a release did not pass, or the release may not be made
├── TrainingError                  exit 13  examples that nothing can learn from, or a training that failed
└── ServiceError                   exit 9   the request is sound, but cannot be served now (HTTP 503)
    ├── OverloadedError                     too many wait already
    ├── RateLimitError                      this client asked too often (HTTP 429)
    ├── WorkerDiedError                     the engine's process died; it is started again
    └── DeadlineError                       not finished within the time allowed (HTTP 504)

Each message says what happened, where, and the next command (``hint``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn


class QwenOnnxError(Exception):
    """Root of all deliberate errors.

    Args:
        what: one sentence: what went wrong.
        where: file, key, layer or field concerned.
        hint: what the user should do next, a command when there is one.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        parts = [what, f"  where: {where}" if where else "", f"  next:  {hint}" if hint else ""]
        super().__init__("\n".join(part for part in parts if part))

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle calls an exception's class with its ``args`` alone, which is not how these are made
        return _revived, (type(self), self.args, self.__dict__)


def _revived(kind: type[QwenOnnxError], args: tuple[Any, ...], state: dict[str, Any]) -> QwenOnnxError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(QwenOnnxError):
    """A recipe, pipeline or option is wrong; carries every fault found."""

    exit_code = 2

    def __init__(self, faults: Sequence[str], *, hint: str | None = None) -> None:
        self.faults = list(faults)
        count = len(self.faults)
        listing = "\n".join(f"  - {fault}" for fault in self.faults)
        super().__init__(f"{count} fault{'s' if count != 1 else ''} in the configuration:\n{listing}", hint=hint)


class EnvironmentFault(QwenOnnxError):
    """This machine lacks something: an extra, a version, memory, disk."""

    exit_code = 3


class SourceError(QwenOnnxError):
    """The source checkpoint cannot be had."""

    exit_code = 4


class ChecksumError(SourceError):
    """Bytes differ from the pinned SHA-256."""


class UnsupportedModelError(SourceError):
    """The checkpoint is complete, but no recipe can build it."""


class ExportError(QwenOnnxError):
    """The export failed or gave something other than what the plan asked for."""

    exit_code = 5


class ArtifactError(QwenOnnxError):
    """The artifact is missing, altered, or not ours."""

    exit_code = 6


class BuildLockedError(ArtifactError):
    """Another process is building the same artifact."""


class VerificationError(QwenOnnxError):
    """A check could not be carried out."""

    exit_code = 7


class VerdictError(VerificationError):
    """The artifact was measured and is not proven: FAIL or INCONCLUSIVE."""


class TrainingError(QwenOnnxError):
    """Nothing can be learnt from the examples, or the training failed."""

    exit_code = 13


class PackageError(QwenOnnxError):
    """The package breaks a rule, was altered, or may not be made of this artifact."""

    exit_code = 10


class PublishError(QwenOnnxError):
    """A registry, hub or folder refuses, or gives something that cannot be trusted."""

    exit_code = 11


class ReleaseError(QwenOnnxError):
    """A job of a release failed, or the release itself cannot be made as asked."""

    exit_code = 12


class RequestError(QwenOnnxError):
    """The runtime refuses this input; the server answers 400."""

    exit_code = 8


class PromptTooLongError(RequestError):
    """Prompt plus answer do not fit into the model's context."""


class ConflictError(RequestError):
    """What is asked for contradicts what the server holds now; the server answers 409."""


class TemplateError(RequestError):
    """The chat template cannot render, or refuses, these messages."""


class ServiceError(QwenOnnxError):
    """The request is sound, but cannot be served now; the server answers 503.

    Args:
        retry_after: seconds after which it is worth trying again.
    """

    exit_code = 9

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None, retry_after: int = 1) -> None:
        super().__init__(what, where=where, hint=hint)
        self.retry_after = retry_after


class OverloadedError(ServiceError):
    """The queue is full."""


class RateLimitError(ServiceError):
    """This client has used up what it may ask for; the server answers 429."""


class WorkerDiedError(ServiceError):
    """The engine's process died."""


class DeadlineError(ServiceError):
    """The answer was not finished within the time allowed; the server answers 504."""


def full_disk(folder: Path) -> EnvironmentFault:
    """The error for a disk that ran full under ``folder``."""
    return EnvironmentFault("the disk is full", where=str(folder), hint="free space; qwen-onnx doctor says how much")


def printable(text: str) -> str:
    """``text`` for a terminal: what a stranger wrote into it neither moves the cursor nor turns the line round.

    Line ends stay; control characters, marks of direction and other characters that are not seen become escapes.
    """
    return "".join(
        each if each == "\n" or each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def run(main: Callable[[], int]) -> NoReturn:
    """Exit with what ``main`` returns; a deliberate error becomes its message and exit code."""
    try:
        code = main()
    except QwenOnnxError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)
