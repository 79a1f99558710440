"""What stays on this machine."""

from __future__ import annotations

import pytest

from qwen_onnx.processes.network import Reach, addresses_of, is_loopback, reach_at, reach_of


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


@pytest.mark.parametrize(
    ("address", "reach"),
    [
        ("127.0.0.1", Reach.HERE),
        ("169.254.169.254", Reach.HERE),
        ("fe80::1", Reach.HERE),
        ("10.0.0.1", Reach.NEAR),
        ("100.64.0.1", Reach.NEAR),
        ("fd00::1", Reach.NEAR),
        ("93.184.215.14", Reach.FAR),
        ("2606:4700::1", Reach.FAR),
        # what a gateway translates
        ("::ffff:127.0.0.1", Reach.HERE),
        ("::ffff:93.184.215.14", Reach.FAR),
        ("64:ff9b::a00:1", Reach.NEAR),
        ("64:ff9b::5db8:d70e", Reach.FAR),
        ("2002:7f00:1::", Reach.HERE),
    ],
)
def test_how_far_an_address_is(address: str, reach: Reach) -> None:
    assert reach_at(address) is reach


def test_a_name_has_each_address_once_and_a_strange_one_none() -> None:
    assert set(addresses_of("localhost")) <= {"127.0.0.1", "::1"}
    assert addresses_of("10.1.2.3") == ["10.1.2.3"]
    for name in ("", "a" * 70):
        assert reach_of(name) is None
