"""What strangers send is read under limits, or refused with a deliberate error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_onnx.bounded import MOST_DIGITS, open_plain, read_bytes, read_json, read_object, read_record
from qwen_onnx.errors import ArtifactError, PackageError
from qwen_onnx.records import Record

MOST = 1 << 20
REFUSED = {
    "not UTF-8": (b'"\xff"', "not UTF-8"),
    "not JSON": (b"{'a': 1}", "not JSON"),
    "cut off": (b'{"a": [1, "x', "not JSON"),
    "nothing": (b"", "not JSON"),
    "a key twice": (b'{"a": {"b": 1, "b": 2}}', "same key twice"),
    "NaN": (b"[NaN]", "NaN is not a number"),
    "infinite": (b"[1e999]", "too large"),
    "many digits": (b"[" + b"9" * (MOST_DIGITS + 1) + b"]", "digits"),
    "lone surrogate": (rb'["\ud800"]', "surrogate"),
    "deep lists": (b"[" * 100_000, "nested deeper"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested deeper"),
    "many values": (b"[" + b"1," * 500_001 + b"1]", "values"),
    "large": (b'"' + b"x" * MOST + b'"', "more than 1,048,576 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_parsers_disagree_about_is_refused(name: str, tmp_path: Path) -> None:
    body, word = REFUSED[name]
    with pytest.raises(PackageError, match=word):
        read_json(body, most_bytes=MOST, error=PackageError, what="the listing")
    path = tmp_path / "list.json"
    path.write_bytes(body)
    with pytest.raises(ArtifactError, match=word) as raised:
        read_json(path, most_bytes=MOST, error=ArtifactError, hint="get it again")
    assert raised.value.what.startswith("list.json ")
    assert (raised.value.where, raised.value.hint) == (str(path), "get it again")


def test_brackets_and_commas_in_strings_are_not_structure() -> None:
    value = {"text": "[{," * 200_000, "escaped": '"[' * 100_000, "emoji": "\N{GRINNING FACE}"}
    assert read_json(json.dumps(value).encode(), most_bytes=2 * MOST, error=PackageError) == value


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    # surrogates apart, which UTF-8 cannot write
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(values, st.booleans())
def test_what_json_writes_is_read(value: object, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert read_json(body, most_bytes=MOST, error=PackageError) == value


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.text('[]{}",:\\u1eE.d8- \n').map(str.encode))
def test_any_bytes_give_a_value_or_a_deliberate_error(body: bytes) -> None:
    try:
        value = read_json(body, most_bytes=100, most_depth=3, most_values=20, error=PackageError)
    except PackageError:
        return
    assert json.loads(json.dumps(value)) == value


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_only_a_plain_file_is_opened(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "link", "endless", "folder"):
        with pytest.raises(PackageError, match="not a plain file"):
            read_json(tmp_path / name, most_bytes=MOST, error=PackageError)
    with pytest.raises(PackageError, match="is missing"):
        open_plain(tmp_path / "absent", PackageError)
    with pytest.raises(PackageError, match="cannot be read"):
        open_plain(tmp_path / "a\0b", PackageError)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.touch()
    # sparse: it takes no room, but reading it would
    os.truncate(path, 3_000_000_000)
    with pytest.raises(PackageError, match="more than 10 bytes"):
        read_bytes(path, most_bytes=10, error=PackageError)


def test_objects_and_records(tmp_path: Path) -> None:
    class Pair(Record):
        one: int
        rest: tuple[str, ...]

    path = tmp_path / "pair.json"
    path.write_text('{"one": 1, "rest": ["a"]}')
    assert read_record(path, Pair, most_bytes=100, error=PackageError) == Pair(one=1, rest=("a",))
    path.write_text('{"one": 1, "rest": [5]}')
    with pytest.raises(PackageError, match=r"pair.json is damaged: rest.0: "):
        read_record(path, Pair, most_bytes=100, error=PackageError)
    with pytest.raises(PackageError, match="the index is not an object"):
        read_object(b"[]", most_bytes=100, error=PackageError, what="the index")
