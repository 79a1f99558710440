"""The records that recipes and pipelines are made of. An unknown key is an error.

A *pipeline* (one file per target) holds Olive passes as named steps; a *family*
(one file per Qwen generation) holds one row per size. ``plan.py`` composes the two.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal, get_args

from pydantic import Field, JsonValue, model_validator

from qwen_onnx.catalog.architectures import ARCHITECTURES, DRAFTING, HEARING, SEEING, senses
from qwen_onnx.catalog.sources import Source
from qwen_onnx.processes.environments import Environment
from qwen_onnx.records import Grown, Name, Reason, Record

Precision = Literal["int4", "int6", "int8", "fp16", "fp32"]
Kind = Literal["base", "chat", "thinking", "hybrid"]
Task = Literal["general", "coding", "math"]


class Limits(Grown):
    """What an artifact must reach to be called proven.

    ``kld_*`` are nats per token against PyTorch fp32, ``top1`` a fraction,
    ``ppl_ratio`` artifact over baseline. The speed-ups are paired with PyTorch fp32. ``max_memory`` is the artifact's
    peak memory over PyTorch's, ``max_bytes`` its size on disk. ``kv_int8_kld`` is what an int8 KV cache may add to
    the mean KLD; where it adds more, the artifact is not served with one.
    """

    added = frozenset({"kv_int8_kld"})

    kld_mean: float = Field(gt=0)
    kld_p99: float = Field(gt=0)
    top1: float = Field(gt=0, le=1)
    ppl_ratio: float = Field(ge=1)
    domain_factor: float = Field(default=2.0, ge=1)
    fp32_max_diff: float = Field(default=1e-3, gt=0)
    fp32_kld: float = Field(default=1e-6, gt=0)
    decode_speedup: float | None = Field(default=None, gt=0)
    prefill_speedup: float | None = Field(default=None, gt=0)
    max_bytes: int | None = Field(default=None, gt=0)
    max_memory: float | None = Field(default=None, gt=0)
    kv_int8_kld: float | None = Field(default=None, gt=0)


class Larger(Record):
    """What changes for models from a number of weights on: large models lose less to quantisation.

    ``set`` addresses what an ``Override`` does.
    """

    parameters: int = Field(gt=0)
    limits: dict[str, JsonValue] = Field(default_factory=dict)
    set: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _changes_something(self) -> Larger:
        if not self.limits and not self.set:
            raise ValueError("neither `limits` nor `set`")
        return self


class Verification(StrEnum):
    """How the artifacts of a target are judged here; a report claims no more."""

    RUN = "run"
    SIMULATOR = "simulator"
    NUMERICS_ON_CPU = "numerics-on-cpu"
    OPENVINO_CPU = "openvino-cpu"
    IN_SLICES = "in-slices"
    STRUCTURE = "structure"

    @property
    def text(self) -> str:
        """What is then known, and what is not."""
        return {
            Verification.RUN: "run here by the target's own execution provider",
            Verification.SIMULATOR: "the quantised graph on the CPU, and samples of what was compiled from it on the "
            "vendor's simulator; not run on the device",
            Verification.NUMERICS_ON_CPU: "numerics on the CPU execution provider; not run on the device",
            Verification.OPENVINO_CPU: "numerics on OpenVINO's CPU plugin; not run on the device",
            Verification.IN_SLICES: "numerics and KV cache on the CPU execution provider, a few layers at a time, "
            "since memory did not hold them all; never loaded as a whole, not run on the device as served",
            Verification.STRUCTURE: "structure of the graph; never run",
        }[self]

    def claim(self, verdict: str) -> str:
        """What a report or manifest may say of an artifact with ``verdict``."""
        return f"proven: {self.text}" if verdict == "PASS" else f"not proven ({verdict}); judged by: {self.text}"


# what a target's artifacts are judged by; in slices depends on the machine
TargetVerification = Literal[
    Verification.RUN,
    Verification.SIMULATOR,
    Verification.NUMERICS_ON_CPU,
    Verification.OPENVINO_CPU,
    Verification.STRUCTURE,
]


class Step(Record):
    """One Olive pass. ``config`` goes to Olive as it stands."""

    name: Name
    type: str = Field(min_length=1)
    config: dict[str, JsonValue] = Field(default_factory=dict)


class ExpertReadback(Grown):
    """What the finished graph must hold in every QMoE node."""

    added = frozenset({"finer_blocks"})

    bits: Literal[4, 8]
    block_size: int = Field(gt=0)
    finer_blocks: tuple[int, ...] = Field(default=(), description="block sizes that a layer may have instead")
    symmetric: bool


class Readback(Grown):
    """What the finished graph must hold; compared with the graph itself, never with the request.

    Bits of 16 and 32 are floats, but in the form HTP all inputs, outputs and activations of 16 bits are codes.
    ``io_bits`` are those of the logits and the KV cache.
    """

    added = frozenset({"scale_block", "float_bits"})

    form: Literal["MatMulNBits", "QDQ", "HTP", "float", "OpenVINO"] = Field(
        default="MatMulNBits", description="how weights are stored"
    )
    provider: str = Field(default="cpu", description="execution provider in genai_config.json, by genai's name")
    io_bits: Literal[16, 32] = 32
    body_bits: Literal[4, 8, 16, 32]
    head_bits: Literal[4, 8, 16, 32]
    block_size: int | None = Field(default=None, gt=0)
    finer_blocks: tuple[int, ...] = Field(default=(), description="block sizes that a matrix may have instead")
    symmetric: bool | None = None
    accuracy_level: int | None = Field(default=None, ge=0, le=4)
    stored_bits: tuple[Literal[4, 5, 6, 7, 8], ...] = Field(
        default=(), description="bits that an 8-bit code may be stored in; fewer than 8 are planes, one matrix has them"
    )
    scale_bits: Literal[16, 32] | None = Field(
        default=None, description="bits that every scale is stored in; null: any"
    )
    scale_block: int | None = Field(
        default=None, gt=0, description="weights that share a stored scale; null: any, as many as a block or more"
    )
    float_bits: Literal[16] | None = Field(
        default=None, description="bits of matrices of the body that stay floats; null: none does"
    )
    soc_model: str | None = Field(default=None, description="Qualcomm's number of the chip that a context is for")
    htp_arch: str | None = Field(default=None, description="version of that chip's HTP")
    prune_lm_head: bool = Field(default=False, description="the graph gives logits of the last position only")
    experts: ExpertReadback | None = Field(default=None, description="of a mixture of experts; null: there are none")

    @model_validator(mode="after")
    def _says_what_its_form_has(self) -> Readback:
        has = {
            "MatMulNBits": ("block_size", "symmetric", "accuracy_level"),
            "QDQ": ("block_size", "symmetric"),
            "OpenVINO": ("symmetric",) if self.body_bits == 8 else ("block_size", "symmetric"),
            "HTP": ("symmetric", "soc_model", "htp_arch"),
            "float": (),
        }[self.form]
        for name in ("block_size", "symmetric", "accuracy_level", "soc_model", "htp_arch"):
            if (getattr(self, name) is not None) != (name in has):
                raise ValueError(f"{name}: {'missing' if name in has else 'has no meaning'} for {self.form} weights")
        for name in ("finer_blocks", "stored_bits", "scale_bits", "scale_block"):
            if getattr(self, name) and self.form != "MatMulNBits":
                raise ValueError(f"{name}: has no meaning for {self.form} weights")
        if self.float_bits and self.form != "QDQ":
            raise ValueError(f"float_bits: has no meaning for {self.form} weights")
        if (self.form == "float") != (self.body_bits >= 16):
            raise ValueError(f"body_bits: {self.body_bits} bits are not {self.form} weights")
        return self


class Largest(Record):
    """The largest model that a build is made for, and why no larger one."""

    parameters: int = Field(gt=0)
    why: Reason


class Build(Record):
    """One precision of a target: its Olive passes as named steps, what they must give, the checks' limits."""

    steps: tuple[Step, ...] = Field(min_length=1)
    readback: Readback
    limits: Limits
    larger: tuple[Larger, ...] = Field(default=(), description="by rising number of weights; the last that fits counts")
    largest: Largest | None = Field(default=None, description="models with more weights have no such build")

    @model_validator(mode="after")
    def _steps_have_one_name_each(self) -> Build:
        names = [step.name for step in self.steps]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"steps: name used twice: {', '.join(doubled)}")
        return self


class Pipeline(Record):
    """A target: how it is built in each precision, or why not, and how far what was built is proven here."""

    target: Name
    verification: TargetVerification
    environment: Name | None = Field(default=None, description="environment that builds the artifacts or runs them")
    context: int | None = Field(default=None, gt=0, description="most tokens, where the device wants fixed shapes")
    device: Literal["cpu", "gpu", "npu"]
    execution_provider: str = Field(min_length=1)
    default: Precision = "int4"
    precisions: dict[Precision, Build] = Field(default_factory=dict)
    unavailable: dict[Precision, Reason] = Field(default_factory=dict, description="precisions without a build")
    vision: tuple[Step, ...] = Field(
        default=(), description="steps that follow for an architecture with a vision tower; none: it is not built"
    )
    audio: tuple[Step, ...] = Field(default=(), description="likewise for one with an audio tower")
    drafts: tuple[Step, ...] = Field(
        default=(), description="likewise for one whose checkpoints have a head for multi-token prediction"
    )

    def tower(self, architecture: str) -> tuple[Step, ...]:
        """The steps that follow for the tower of an architecture."""
        if architecture in SEEING:
            return self.vision
        return self.audio if architecture in HEARING else ()

    def beside(self, architecture: str, modality: str) -> tuple[Step, ...]:
        """The steps that write what a model has beside its decoder: a tower, a head for multi-token prediction."""
        tower = self.tower(architecture) if senses(architecture, modality) else ()
        return (*tower, *(self.drafts if architecture in DRAFTING else ()))

    @model_validator(mode="after")
    def _every_precision_is_built_or_says_why_not(self) -> Pipeline:
        for name in get_args(Precision):
            if (name in self.precisions) == (name in self.unavailable):
                raise ValueError(f"{name}: must stand in exactly one of `precisions` and `unavailable`")
        if self.precisions and self.default not in self.precisions:
            raise ValueError(f"default: {self.default} is unavailable")
        return self


class Variant(Record):
    """Other steps for a pipeline, to be measured beside it; ``readback`` changes fields of the pipeline's."""

    name: Name
    about: str = Field(min_length=1)
    steps: tuple[Step, ...] = Field(min_length=1)
    readback: dict[str, JsonValue] = Field(default_factory=dict)


class Variants(Record):
    """The variants of one target: ``pipelines/variants/<target>.yaml``."""

    variants: tuple[Variant, ...] = Field(min_length=1)


class Override(Record):
    """A change for one size on one target, or ``excluded``, the reason why that target has none.

    ``set`` addresses ``steps.<name>.<field>``, ``limits.<field>`` or ``readback.<field>`` and applies to those of
    ``precisions`` (default: all) that have the field. ``steps.<name>: null`` leaves the step out.
    """

    excluded: Reason | None = None
    without: dict[Precision, Reason] = Field(default_factory=dict, description="precisions that this size has not")
    why: Reason | None = None
    precisions: tuple[Precision, ...] = get_args(Precision)
    set: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _changes_or_excludes(self) -> Override:
        if self.excluded and (self.why or self.set or self.without):
            raise ValueError("excluded: a target that is excluded takes no `why`, `set` or `without`")
        if not self.excluded and not self.without and not self.set:
            raise ValueError("either `set` with its `why`, `without`, or `excluded`")
        if bool(self.why) != bool(self.set):
            raise ValueError("`set` and `why` go together")
        return self


class ExtendedContext(Record):
    """A context beyond the native one, and how it is reached."""

    tokens: int = Field(gt=0)
    method: str | None = Field(default=None, description="yarn, dynamic-ntk, …")
    factor: float | None = Field(default=None, gt=1)


class Shape(Record):
    """Sizes from the model's ``config.json``; a checkpoint that contradicts them is refused."""

    layers: int | None = Field(default=None, gt=0)
    hidden_size: int | None = Field(default=None, gt=0)
    intermediate_size: int | None = Field(default=None, gt=0)
    heads: int | None = Field(default=None, gt=0)
    kv_heads: int | None = Field(default=None, gt=0)
    head_dim: int | None = Field(default=None, gt=0)
    vocab_size: int | None = Field(default=None, gt=0)
    tied: bool | None = Field(default=None, description="whether the head shares the embedding's weights")
    experts: int | None = Field(default=None, gt=0)
    experts_per_token: int | None = Field(default=None, gt=0)
    moe_intermediate_size: int | None = Field(default=None, gt=0)
    shared_expert_intermediate_size: int | None = Field(default=None, gt=0)


class Row(Record):
    """One size of a family. A fact that was not looked up is absent; ``read_in`` says where the others were read."""

    id: Name
    title: str = Field(min_length=1)
    kind: Kind | None = None
    parameters: int | None = Field(default=None, gt=0, description="number of weights")
    active_parameters: int | None = Field(default=None, gt=0, description="weights that one token uses, of a MoE")
    license: str | None = Field(default=None, min_length=1, description="SPDX identifier of the weights")
    context: int | None = Field(default=None, gt=0, description="native context: tokens that the artifact accepts")
    extended_context: ExtendedContext | None = None
    languages: int | tuple[str, ...] | None = Field(default=None, description="ISO 639-1 codes, or how many")
    modality: str = "text"
    tasks: tuple[Task, ...] = ()
    released: str | None = Field(default=None, pattern=r"^20\d\d-\d\d$")
    shape: Shape = Shape()
    sources: tuple[Source, ...] = Field(min_length=1)
    quantization: Literal["fp8"] | None = Field(
        default=None, description="how the checkpoint stores its weights, which are dequantised before anything else"
    )
    rope: Literal["yarn"] | None = Field(
        default=None, description="scaling of positions in the checkpoint's config, by which it has this context"
    )
    planned: str | None = Field(default=None, min_length=10, description="why this size cannot be exported yet")
    read_in: dict[str, str] = Field(default_factory=dict, description="where each fact was read; default: the rest")
    targets: dict[Name, Override] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _can_be_built_or_says_why_not(self) -> Row:
        missing = [name for name in ("parameters", "context") if getattr(self, name) is None]
        if missing and not self.planned:
            raise ValueError(f"{' and '.join(missing)} missing: without them the row needs `planned` with the reason")
        return self


class About(Record):
    """What a model is for; fields as in ``Row``. No step of a build reads it: packages and model cards do."""

    kind: Kind | None = None
    tasks: tuple[Task, ...] = ()
    languages: int | tuple[str, ...] | None = None


class Family(Record):
    """One Qwen generation."""

    family: Name
    architecture: str = Field(min_length=1, description="as in the checkpoint's config.json")
    targets: dict[Name, Override] = Field(default_factory=dict, description="of every size that has none of its own")
    sizes: tuple[Row, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _architecture_is_known(self) -> Family:
        buildable = any(row.planned is None for row in self.sizes)
        if buildable and self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"architecture: {self.architecture!r} cannot be exported; known: {known}")
        return self


def json_schemas() -> dict[str, dict[str, Any]]:
    """JSON Schemas for editors, by file name."""
    records: dict[str, type[Record]] = {
        "recipe": Family,
        "pipeline": Pipeline,
        "variants": Variants,
        "environment": Environment,
    }
    return {f"{name}.schema.json": record.model_json_schema() for name, record in records.items()}
