"""JSON as a stranger may write it: valid documents with a value exchanged, added or left out, and others."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# bounded, so that it fits the quick tests; the same cases each time
BOUNDED = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = ["../x", "/etc/passwd", ".hidden", "", "a/b", "a\nb", "a\0b", "x" * 5000, "C:x", "config.json", "a.safetensors"]
NUMBERS = [0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308]
SCALARS = (
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(NAMES) | st.integers() | st.text(max_size=20)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [place, *(found for key, inner in steps for found in _places(inner, (*place, key)))]


@st.composite
def mutated(draw: st.DrawFn, valid: Any) -> Any:
    """``valid`` with one to three of its values exchanged or left out, at whatever level."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(_places(value)))
        if not place:
            return draw(VALUES)
        holder = value
        for step in place[:-1]:
            holder = holder[step]
        if draw(st.integers(0, 4)) == 0:
            del holder[place[-1]]
        else:
            holder[place[-1]] = draw(VALUES)
    return value


def documents(valid: Any) -> st.SearchStrategy[bytes]:
    """Bytes of a document: nearly valid, deep, repeated, cut off, or anything."""
    nearly = mutated(valid).map(lambda value: json.dumps(value).encode())
    text = json.dumps(valid).encode()
    odd = [b"", b"null", b"[" * 100_000, b'{"a":' * 50_000, text[:-1], text + text, b"\xff\xfe", b'{"a": 1, "a": 2}']
    return nearly | st.sampled_from(odd) | st.binary(max_size=50)
