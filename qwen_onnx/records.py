"""What every record of ours is made of: strict, frozen, digested the same way everywhere."""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
)

COMMIT = r"[0-9a-f]{40}"
# ORG/NAME on a hub
REPOSITORY = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
Reason = Annotated[str, StringConstraints(min_length=10)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Record(BaseModel):
    """Frozen, strict about its keys: what a user mistypes is never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Grown(Record):
    """A record that is digested and got fields since: ``added`` are left out as long as they have their defaults.

    The digest of what does not ask for them thus stays what it was.
    """

    added: ClassVar[frozenset[str]]

    @model_serializer(mode="wrap")
    def _without_what_is_usual(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = serialize(self)
        fields = type(self).model_fields
        usual = {name for name in self.added if getattr(self, name) == fields[name].default}
        return {name: value for name, value in found.items() if name not in usual}


class Verdict(StrEnum):
    """Only ``PASS`` proves anything; ``INCONCLUSIVE`` counts as not passed, ``UNVERIFIED`` was not measured at all."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    UNVERIFIED = "UNVERIFIED"


def _was_measured(verdict: Verdict) -> Verdict:
    if verdict is Verdict.UNVERIFIED:
        raise ValueError("what was measured is PASS, FAIL or INCONCLUSIVE")
    return verdict


# of a check, a report or a gate
MeasuredVerdict = Annotated[Verdict, AfterValidator(_was_measured)]


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of ``value`` as JSON with sorted keys and no spaces."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
