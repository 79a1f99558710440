"""How the next token is chosen: every parameter with its default, its range, and the engines that honour it.

Whatever else needs to know a parameter reads it from here: the checks of ``GenerationConfig``, the fields of the API,
/set of the terminal chat, the engines' lists of what they honour, and the names that genai gives them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from qwen_onnx.errors import RequestError

# weights of the tokens that are left, after temperature, the likeliest's being 1, and the parameter's value: which stay
Keep = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Parameter:
    """What is known of a number that a request may give.

    Args:
        default: None: the request may leave it open.
        least, most: its range, both included; whole numbers when ``least`` is one.
        above: ``least`` itself is outside.
        told: what it does, for the API's documentation.
        batch: whether the batch engine honours it.
        genai: the name of genai's search option; None: the serial engine refuses it.
        greedy: whether it matters at temperature 0 too.
        keep: what the batch engine does for it, where that is no more than to leave tokens out of the draw.
    """

    default: float | None
    least: float
    most: float
    told: str
    above: bool = False
    batch: bool = True
    genai: str | None = None
    greedy: bool = False
    keep: Keep | None = None

    @property
    def whole(self) -> bool:
        """Whether it counts something."""
        return isinstance(self.least, int)

    def check(self, name: str, value: object) -> None:
        """RequestError for a value out of the range, naming field and range."""
        if not (self._holds(value) or (value is None and self.default is None)):
            kind = "a whole number" if self.whole else "a number"
            begin = "above" if self.above else "from"
            raise RequestError(f"{name} is {value!r}, not {kind} {begin} {self.least} to {self.most}", where=name)

    def _holds(self, value: object) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            return False
        fits = isinstance(value, int) or not self.whole
        return fits and self.least <= value <= self.most and not (self.above and value == self.least)


def parameter(default: float | None, least: float, most: float, told: str, **more: Any) -> Any:
    """A field of a dataclass that is a ``Parameter``; ``more`` are arguments of it."""
    return field(default=default, metadata={"parameter": Parameter(default, least, most, told, **more)})


def parameters(record: Any) -> dict[str, Parameter]:
    """Those of a dataclass by their names, in the order of the fields."""
    return {one.name: one.metadata["parameter"] for one in fields(record) if "parameter" in one.metadata}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; top_k 0, min_p 0 and penalties 0 (repetition: 1) are off.

    Args:
        seed: the same answer to the same prompt, whatever else runs; None draws anew.
        logit_bias: token id to what is added to its logit, -100 to 100.
    """

    # adding one needs no other edit (docs/extending.md)
    temperature: float = parameter(0.0, 0.0, 2.0, "0 is greedy.", genai="temperature")
    top_p: float = parameter(1.0, 0.0, 1.0, "Nucleus sampling.", above=True, genai="top_p")
    top_k: int = parameter(
        0, 0, 2**31 - 1, "Sample from that many tokens; 0: from all. Not in OpenAI's API.", genai="top_k"
    )
    min_p: float = parameter(
        0.0, 0.0, 1.0, "Least probability relative to the best token's. Not in OpenAI's API.", keep=operator.ge
    )
    repetition_penalty: float = parameter(
        1.0, 0.1, 10.0, "1 is off. Not in OpenAI's API.", genai="repetition_penalty", greedy=True
    )
    presence_penalty: float = parameter(0.0, -2.0, 2.0, "0 is off.")
    frequency_penalty: float = parameter(0.0, -2.0, 2.0, "0 is off.")
    seed: int | None = parameter(
        None,
        0,
        2**63 - 1,
        "Choice i of n has the seed s + i. The same seed gives the same answer.",
        genai="random_seed",
    )
    logit_bias: Mapping[int, float] = field(default_factory=dict)


GREEDY = Sampling()
MOST_BIAS = 100
SAMPLING = parameters(Sampling)
# what a request may ask for that is not a number; of the two engines the batch engine alone has it
OTHERS = frozenset({"logit_bias", "logprobs", "grammar", "echo"})
BATCH_FEATURES = frozenset(name for name, one in SAMPLING.items() if one.batch) | OTHERS
GENAI_FEATURES = frozenset(name for name, one in SAMPLING.items() if one.genai)
ALL_FEATURES = BATCH_FEATURES | GENAI_FEATURES


def search_options(sampling: Sampling) -> dict[str, Any]:
    """What genai is told: its names of what a sampling says."""
    drawn = sampling.temperature != 0
    used = {name: one.genai for name, one in SAMPLING.items() if one.genai and (drawn or one.greedy)}
    given = {theirs: getattr(sampling, name) for name, theirs in used.items()}
    return {"do_sample": drawn, **{name: value for name, value in given.items() if value is not None}}
