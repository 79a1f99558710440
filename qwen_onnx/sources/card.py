"""What the front matter of a model card says, as far as a build asks for it.

Two keys are looked for by their lines: no YAML of a stranger is parsed.
"""

from __future__ import annotations

import re

from qwen_onnx.records import REPOSITORY

FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
# characters of a card that are looked at
LONGEST = 1 << 16
# the hub's names, https://huggingface.co/docs/hub/repositories-licenses, of licences that are their own SPDX identifier
SPDX = {
    name.lower(): name
    for name in (
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "CC0-1.0",
        "CC-BY-4.0",
        "CC-BY-NC-4.0",
        "CC-BY-NC-ND-4.0",
        "CC-BY-NC-SA-4.0",
        "CC-BY-SA-4.0",
        "ISC",
        "MIT",
    )
}


def licence_of(card: str) -> str | None:
    """SPDX identifier of the weights' licence, a LicenseRef for one that SPDX does not know; None: it is not stated."""
    said = _value(card, "license", r"[A-Za-z0-9._-]{1,64}")
    if said is None:
        return None
    if said.lower() in SPDX:
        return SPDX[said.lower()]
    name = _value(card, "license_name", r"[A-Za-z0-9._ -]{1,64}") if said.lower() == "other" else said
    words = re.findall(r"[A-Za-z0-9.]+", name or "")
    return "LicenseRef-" + "-".join(word[0].upper() + word[1:] for word in words) if words else None


def base_of(card: str) -> str | None:
    """The model that this one was made of."""
    return _value(card, "base_model", REPOSITORY)


def _value(card: str, key: str, form: str) -> str | None:
    """The value of a key at the top level, or the first of its list."""
    front = FRONT.match(card[:LONGEST])
    found = front and re.search(
        rf"^{key}:[ \t]*(?:\r?\n?[ \t]*-[ \t]*|\[[ \t]*)?([\"']?)({form})\1[ \t\],]*\r?$", front[1], re.MULTILINE
    )
    return found[2].strip() if found else None
