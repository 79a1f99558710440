"""What stays on this machine."""

from __future__ import annotations

import pytest

from qwen_onnx.processes.network import is_loopback


@pytest.mark.parametrize(
    ("host", "stays"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1:5000", True),
        ("localhost", True),
        ("LocalHost:80", True),
        ("::1", True),
        ("[::1]", True),
        ("[::1]:80", True),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("::", False),
        ("local.host", False),
        ("localhost.example:80", False),
        ("", False),
    ],
)
def test_addresses_of_this_machine(host: str, stays: bool) -> None:
    assert is_loopback(host) is stays
