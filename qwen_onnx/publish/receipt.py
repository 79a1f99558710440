"""What a publication did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Receipt:
    """What was published where.

    Attributes:
        digest: SHA-256 of ``SHA256SUMS``, what ``qwen-onnx pull --expect`` takes.
        sent: bytes of files that were transferred, ``present`` those that were there already.
        manifest: digest of the OCI manifest, where there is one.
        revision: commit of the hub, where there is one.
    """

    digest: str
    destination: str
    sent: int
    present: int
    manifest: str | None = None
    revision: str | None = None
