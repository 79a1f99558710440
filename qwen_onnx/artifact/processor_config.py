"""``processor_config.json``: how pictures are prepared for a model, in the form that onnxruntime-genai reads.

As with ``genai_config.json`` the record is an allow-list: what is not listed is refused before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from qwen_onnx.bounded import read_record
from qwen_onnx.errors import ArtifactError
from qwen_onnx.records import Record

PROCESSOR_CONFIG = "processor_config.json"
MOST_CONFIG = 64 << 10

Side = Annotated[int, Field(ge=1, le=256)]
Pixels = Annotated[int, Field(ge=1, le=1 << 28)]
Three = tuple[float, float, float]


class _Part(Record):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Attributes(_Part):
    """What an operation of genai's image pipeline is told; each of ours tells some of these."""

    color_space: Literal["RGB"] | None = None
    width: Pixels | None = None
    height: Pixels | None = None
    smart_resize: Literal[1] | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    patch_size: Side | None = None
    temporal_patch_size: Annotated[int, Field(ge=1, le=16)] | None = None
    merge_size: Annotated[int, Field(ge=1, le=16)] | None = None
    rescale_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    mean: Three | None = None
    std: Three | None = None
    qwen2_5_vl: Literal[1] | None = None
    qwen3_vl: Literal[1] | None = None


class Operation(_Part):
    """A step of genai's image pipeline."""

    name: str = Field(max_length=64)
    type: Literal["DecodeImage", "ConvertRGB", "Resize", "Rescale", "Normalize", "PatchImage"]
    attrs: Attributes = Attributes()


class _Step(_Part):
    operation: Operation


class _Processor(_Part):
    name: str = Field(max_length=64)
    transforms: Annotated[tuple[_Step, ...], Field(min_length=1, max_length=16)]


class ProcessorConfig(_Part):
    """``processor_config.json``, as onnxruntime-genai reads it."""

    processor: _Processor

    @model_validator(mode="after")
    def _says_all(self) -> Self:
        told = ImageSettings.names() - self.told().keys()
        if told:
            raise ValueError(f"it does not say {', '.join(sorted(told))}")
        if not all(self.told()["std"]):
            raise ValueError("a deviation in std is 0")
        return self

    def told(self) -> dict[str, Any]:
        """Every attribute of every operation by its name."""
        return {
            name: value
            for step in self.processor.transforms
            for name, value in step.operation.attrs.model_dump(exclude_none=True).items()
        }


@dataclass(frozen=True)
class ImageSettings:
    """How pictures are prepared for one model; lengths in pixels, ``merge_size`` in patches."""

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    mean: Three
    std: Three

    @classmethod
    def names(cls) -> frozenset[str]:
        """Of the fields."""
        return frozenset(cls.__dataclass_fields__)

    @classmethod
    def read(cls, folder: Path) -> ImageSettings:
        """From ``processor_config.json`` of an artifact; ArtifactError when it is missing or says what it may not."""
        path = folder / PROCESSOR_CONFIG
        told = read_record(path, ProcessorConfig, most_bytes=MOST_CONFIG, error=ArtifactError).told()
        return cls(**{name: told[name] for name in cls.names()})

    def config(self, genai_type: str = "qwen2_5_vl") -> dict[str, Any]:
        """The content of ``processor_config.json``; ``genai_type`` is what genai calls the model."""

        def step(name: str, kind: str, **attributes: Any) -> dict[str, Any]:
            return {"operation": {"name": name, "type": kind, "attrs": attributes}}

        sizes = {"patch_size": self.patch_size, "merge_size": self.merge_size}
        bounds = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        # genai wants a width and a height beside smart_resize, which computes its own
        transforms = [
            step("decode", "DecodeImage", color_space="RGB"),
            step("convert", "ConvertRGB"),
            step("resize", "Resize", width=540, height=360, smart_resize=1, **bounds, **sizes),
            step("rescale", "Rescale", rescale_factor=1 / 255),
            step("normalize", "Normalize", mean=list(self.mean), std=list(self.std), **{genai_type: 1}),
            step("patch", "PatchImage", temporal_patch_size=self.temporal_patch_size, **sizes),
        ]
        return {"processor": {"name": "qwen_vl_image_processor", "transforms": transforms}}
