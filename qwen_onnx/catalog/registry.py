"""Our Olive passes as a pipeline sees them: the options of each, found by walking ``qwen_onnx/export/passes``.

A pass is a folder there: ``options.py`` with one subclass of ``PassOptions``, and the module that it names. Olive only
warns about a mistyped option and genai's builder says nothing at all, so the options are checked here, before anything
runs and without importing Olive.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar, Self

from qwen_onnx.catalog.costs import Dimensions, Stored
from qwen_onnx.records import Record

PASSES = "qwen_onnx.export.passes"
# anonymous memory of the process that runs Olive and a pass of ours, torch and transformers imported (2026-11-25,
# x86-64, Python 3.11; from eight builds of random checkpoints of 0.05 to 1.1 GB and the starter)
PROCESS_BYTES = 480_000_000


class PassOptions(Record):
    """What a pipeline may say of a pass: the fields of a subclass. Its module imports nothing heavy.

    Attributes:
        implementation: module of the same folder and class of the pass, whose name pipelines use as ``type``.
        architectures: those that it takes, as ``config.json`` names them; None takes all.
        rewrites: whether it alters norms or biases. Such a graph is not the checkpoint's with rounded matrices, and is
            proven by an fp32 export beside it.
    """

    implementation: ClassVar[str]
    architectures: ClassVar[Collection[str] | None] = None
    rewrites: ClassVar[bool] = False

    @classmethod
    def pass_name(cls) -> str:
        """The ``type`` of a step."""
        return cls.implementation.rpartition(".")[2]

    @classmethod
    def module(cls) -> str:
        """The module of the pass."""
        return f"{cls.__module__.removesuffix('.options')}.{cls.implementation.rpartition('.')[0]}"

    def faults(self, execution_provider: str) -> list[str]:
        """What of the options contradicts the target's provider (ONNX Runtime's name), as ``option: what is wrong``."""
        return []

    def reference(self) -> Self | None:
        """The same step in an export without quantisation, for comparison; None leaves it out."""
        return None

    def written(self, model: Dimensions, before: Stored) -> Stored:
        """What the step makes of ``before``; the default copies it."""
        return before

    def scratch(self, model: Dimensions, before: Stored) -> int:
        """Bytes of disk at the step's peak, beside what it writes."""
        return 0

    def kept(self, model: Dimensions, before: Stored) -> int:
        """Bytes below the cache that stay until the build has ended, for one that is killed to go on with."""
        return 0

    def adopted(self, model: Dimensions) -> int:
        """Weights of the checkpoint that are not the language model's: those of the tower that the step exports."""
        return 0

    def widened(self, model: Dimensions) -> int:
        """Bytes that memory holds beyond what the step writes, where weights change their type when they are loaded."""
        return 0

    def memory(self, model: Dimensions, before: Stored) -> int:
        """Bytes of anonymous memory at the step's peak, that of the process with its imports included."""
        return PROCESS_BYTES


@cache
def passes() -> dict[str, type[PassOptions]]:
    """The options of every pass by the pass's name."""
    found: dict[str, type[PassOptions]] = {}
    for folder in iter_modules(import_module(PASSES).__path__):
        place = f"{PASSES}.{folder.name}.options"
        kinds = vars(import_module(place)).values()
        own = [kind for kind in kinds if isinstance(kind, type) and kind.__module__ == place]
        [options] = [kind for kind in own if issubclass(kind, PassOptions)]
        found[options.pass_name()] = options
    return found


def options_of(step: dict[str, Any]) -> PassOptions:
    """The options of a step, a mapping of ``type`` and its options, of a plan that was checked."""
    given = {name: value for name, value in step.items() if name != "type"}
    return passes()[step["type"]].model_validate(given)
