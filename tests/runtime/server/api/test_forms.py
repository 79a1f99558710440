"""Multipart forms: what clients send, and what nobody may send."""

from __future__ import annotations

import httpx
import numpy as np
import pytest

from qwen_onnx.errors import RequestError
from qwen_onnx.runtime.server.api.forms import MOST_PARTS, read_form

KIND = "multipart/form-data; boundary=xx"


def field(head: str, content: bytes = b"v") -> bytes:
    return b"--xx\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n"


NAMED = 'Content-Disposition: form-data; name="a"'


def test_what_a_client_sends_comes_back() -> None:
    """Bytes of every value, boundaries of lines among them, and names with quotes."""
    random = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8).tobytes()
    content = random + b"\r\n--\r\n\r\n--" + bytes(range(256))
    sent = httpx.Request(
        "POST",
        "http://it/",
        data={"model": "tiny", "prompt": "zwölf\r\n"},
        files={"file": ('a"b.wav', content, "audio/wav")},
    )
    sent.read()
    form = read_form(sent.content, sent.headers["content-type"])
    assert form.keys() == {"model", "prompt", "file"}
    assert (form["model"].text, form["prompt"].text) == ("tiny", "zwölf\r\n")
    assert form["file"].content == content
    assert form["file"].is_file
    assert not form["model"].is_file
    with pytest.raises(RequestError, match="file is not UTF-8"):
        _ = form["file"].text


@pytest.mark.parametrize(
    "kind", ['multipart/form-data; boundary="xx"', "Multipart/Form-Data; charset=utf-8; Boundary=xx"]
)
def test_boundaries_may_be_quoted(kind: str) -> None:
    assert read_form(field(NAMED) + b"--xx--\r\n", kind)["a"].content == b"v"


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"", "", "the body is of no type, not multipart/form-data"),
        (b"{}", "application/json", "the body is application/json, not multipart/form-data"),
        (b"--xx--", "multipart/form-data", "without a boundary"),
        (b"--xx--", "multipart/form-data; boundary=" + "x" * 71, "it does not begin|without a boundary"),
        (b"", KIND, "does not begin with its boundary"),
        (b"--yy--", KIND, "does not begin with its boundary"),
        (b"--xx", KIND, "something follows a boundary"),
        (b"--xxy", KIND, "something follows a boundary"),
        (field(NAMED), KIND, "ends before its last boundary|something follows"),
        (field(NAMED)[:-3], KIND, "ends before its last boundary"),
        (b"--xx\r\n" + b"a: b\r\n" * 1000, KIND, "no end of its headers within 4096 bytes"),
        (field("Content-Type: text/plain") + b"--xx--", KIND, "a field has no name"),
        (field("Content-Disposition: attachment; name=a") + b"--xx--", KIND, "a field has no name"),
        (field(f"{NAMED}\r\nContent-Transfer-Encoding: base64") + b"--xx--", KIND, "transfer encoding"),
        (field(NAMED) * 2 + b"--xx--", KIND, "two fields 'a'"),
        (b"--xx\r\n\xff: \xff\r\n\r\nv\r\n--xx--", KIND, "headers of a field are not UTF-8"),
    ],
)
def test_what_is_no_form_is_refused(content: bytes, kind: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_form(content, kind)


def test_fields_are_bounded() -> None:
    many = b"".join(field(f'Content-Disposition: form-data; name="f{index}"') for index in range(MOST_PARTS + 1))
    with pytest.raises(RequestError, match=f"more than {MOST_PARTS} fields"):
        read_form(many + b"--xx--", KIND)
