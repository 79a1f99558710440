"""Addresses of this machine."""

from __future__ import annotations

import ipaddress
import re


def is_loopback(host: str) -> bool:
    """Whether a name or address, with or without a port, is this machine's own and stays on it."""
    # a bare IPv6 address ends like a port
    for name in (host, re.sub(r":[0-9]+$", "", host).removeprefix("[").removesuffix("]")):
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            if name.lower() == "localhost":
                return True
    return False
