"""Where a package goes to or comes from, told by the scheme of its address."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qwen_onnx.errors import PublishError

KINDS = "a folder, folder:PATH, oci:PATH:TAG, oci://HOST/REPOSITORY:TAG, hf://ORG/NAME[@REVISION] or ms://ORG/NAME"
# https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pulling-manifests
REPOSITORY = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
TAG = r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}"
HOST = r"(?:[a-zA-Z0-9.-]+|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?"
REGISTRY = re.compile(rf"oci://({HOST})/({REPOSITORY})(?::({TAG})|@(sha256:[0-9a-f]{{64}}))")
LAYOUT = re.compile(rf"oci:(.+):({TAG})")
HUB = re.compile(
    r"(hf|ms)://([A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?"
)


@dataclass(frozen=True)
class FolderAddress:
    """A package's own folder."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class LayoutAddress:
    """An OCI image layout on disk and a tag in it."""

    path: Path
    tag: str

    def __str__(self) -> str:
        return f"oci:{self.path}:{self.tag}"


@dataclass(frozen=True)
class RegistryAddress:
    """A repository of an OCI registry; ``reference`` is a tag or ``sha256:…``, the digest of a manifest."""

    host: str
    repository: str
    reference: str

    def __str__(self) -> str:
        mark = "@" if ":" in self.reference else ":"
        return f"oci://{self.host}/{self.repository}{mark}{self.reference}"


@dataclass(frozen=True)
class HubAddress:
    """A model repository; ``kind`` is ``hf`` or ``ms``; without a revision the hub's main branch is meant."""

    kind: str
    repository: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.kind}://{self.repository}{f'@{self.revision}' if self.revision else ''}"


Address = FolderAddress | LayoutAddress | RegistryAddress | HubAddress


def parse_address(text: str) -> Address:
    """Read an address.

    Raises:
        PublishError: it has no such form, or carries a user or a password. It is not repeated then.
    """
    if re.match(r"[a-z]+://[^/]*@", text):
        raise PublishError(
            "an address carries no user and no password",
            hint="give them by the environment: QWEN_ONNX_REGISTRY_USER, QWEN_ONNX_REGISTRY_PASSWORD, HF_TOKEN or "
            "MODELSCOPE_API_TOKEN",
        )
    if match := REGISTRY.fullmatch(text):
        return RegistryAddress(match[1], match[2], match[3] or match[4])
    if match := HUB.fullmatch(text):
        return HubAddress(match[1], match[2], match[3])
    if text.startswith("folder:") and len(text) > len("folder:"):
        return FolderAddress(Path(text.removeprefix("folder:")))
    if "://" not in text and (match := LAYOUT.fullmatch(text)):
        return LayoutAddress(Path(match[1]), match[2])
    if text and not re.match(r"(oci|hf|ms|folder):|[a-z][a-z0-9+.-]*://", text):
        return FolderAddress(Path(text))
    raise PublishError(f"{text!r} is not an address", hint=f"give {KINDS}")
