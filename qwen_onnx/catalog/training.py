"""How an adapter is trained: a record that a file of ``pipelines/finetune/`` fills and the command line overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError

from qwen_onnx.catalog.faults import describe
from qwen_onnx.catalog.load import read_yaml
from qwen_onnx.errors import ConfigError
from qwen_onnx.records import Grown, Name

FILE = "pipelines/finetune/lora.yaml"
# matrices of a dense layer, by the names that every architecture of ours gives them
Matrix = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Share = Annotated[float, Field(ge=0, lt=1)]
# far above what a low rank is good for
MOST_RANK = 512


def _once(names: tuple[Matrix, ...]) -> tuple[Matrix, ...]:
    if len(set(names)) != len(names):
        raise ValueError("a matrix is named twice")
    return names


class Training(Grown):
    """Options of a fine-tune by LoRA (Hu et al. 2021, arXiv:2106.09685)."""

    added = frozenset({"strength", "retain"})

    name: Name
    rank: int = Field(ge=1, le=MOST_RANK, description="columns of A and B")
    alpha: float = Field(gt=0, le=10_000, description="what is learnt counts alpha / rank times")
    dropout: Share
    targets: Annotated[tuple[Matrix, ...], AfterValidator(_once), Field(min_length=1)]
    learning_rate: float = Field(gt=0, le=1)
    schedule: Literal["linear", "cosine", "constant"] = Field(description="of the rate, behind the warm-up")
    warmup: Share = Field(description="share of the steps in which the rate grows")
    weight_decay: Share
    strength: float = Field(
        default=1, gt=0, le=1, description="share of the change that is kept in the end: less keeps more of the base"
    )
    retain: float = Field(
        default=1,
        gt=0,
        le=1000,
        description="weight, beside the loss, of the divergence from the base on lines to retain",
    )
    max_grad_norm: float = Field(gt=0, le=1000)
    epochs: int = Field(ge=1, le=1000)
    window: int = Field(ge=16, le=1 << 20, description="tokens of a row: of one example, or of several packed together")
    batch: int = Field(ge=1, le=4096, description="rows that are computed at once")
    accumulate: int = Field(ge=1, le=4096, description="batches to a step")
    packing: bool = Field(description="whether a row holds several examples, which do not see each other")
    longer: Literal["refuse", "truncate", "skip"] = Field(description="what becomes of examples that exceed the window")
    held_out: float = Field(gt=0, le=0.5, description="share of the examples that the loss is judged by")
    patience: int = Field(ge=1, le=1000, description="evaluations without a better loss until training stops")
    every: int | None = Field(
        default=None, ge=1, description="steps between evaluations, each with a checkpoint; null: an epoch"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(description="of the base model; auto: bf16 on a GPU that has it")
    gradient_checkpointing: bool = Field(description="a third less speed for a fraction of the memory")
    seed: int = Field(ge=0, lt=1 << 31)


def load_training(root: Path, file: Path | None = None, overrides: Sequence[str] = ()) -> Training:
    """The options of ``file``, or of ``pipelines/finetune/lora.yaml`` below ``root``, with ``KEY=VALUE`` put over them.

    Raises:
        ConfigError: every fault of the file and of the overrides.
    """
    path, name = (file, str(file)) if file else (root / FILE, FILE)
    faults: list[str] = []
    if not path.is_file():
        raise ConfigError([f"{name}: there is no such file"], hint=f"write one after {FILE}")
    data = read_yaml(path, name, faults).get(name)
    if not faults and not isinstance(data, dict):
        faults.append(f"{name}: not a mapping of options")
    changed = _overrides(overrides, faults)
    if faults or not isinstance(data, dict):
        raise ConfigError(faults, hint=f"write it after {FILE}")
    try:
        return Training.model_validate({**data, **changed})
    except ValidationError as error:
        lines = [_blamed(line, name, changed) for line in describe(name, error)]
        raise ConfigError(lines, hint=f"the keys are {', '.join(Training.model_fields)}") from error


def _overrides(texts: Sequence[str], faults: list[str]) -> dict[str, Any]:
    """Values by key; each is read as YAML, as in the file."""
    found: dict[str, Any] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key:
            faults.append(f"--set {text}: not KEY=VALUE")
        elif key in found:
            faults.append(f"--set {key}: given twice")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            faults.append(f"--set {text}: the value is not YAML")
    return found


def _blamed(line: str, name: str, changed: dict[str, Any]) -> str:
    """A fault of the file, or of the override that caused it."""
    told = line.removeprefix(f"{name}: ")
    return f"--set {told}" if told.split(":")[0].split(".")[0] in changed else line
