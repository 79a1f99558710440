"""Where a host name leads: to this machine, into its own network, or out of it."""

from __future__ import annotations

import ipaddress
import re
import socket
from enum import IntEnum


class Reach(IntEnum):
    """How far an address is; who asks a far one must not be sent to a nearer one."""

    HERE = 0
    NEAR = 1
    FAR = 2


def is_loopback(host: str) -> bool:
    """Whether a host name, with or without a port, stays on this machine."""
    name = bare_host(host)
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def bare_host(host: str) -> str:
    """A host name without its port and without the brackets of an IPv6 address."""
    if host.count(":") > 1 and not host.startswith("["):
        return host
    return re.sub(r":[0-9]+$", "", host).strip("[]")


def reach_of(host: str) -> Reach | None:
    """The nearest of a host's addresses; None for a name that is not known here, as behind a proxy.

    Link-local addresses count as this machine: clouds keep a machine's own secrets there.
    """
    name = bare_host(host)
    if name == "localhost":
        return Reach.HERE
    try:
        found = {str(entry[4][0]).split("%")[0] for entry in socket.getaddrinfo(name, None)}
    except (OSError, UnicodeError):
        return None
    return min(_reach(ipaddress.ip_address(address)) for address in found)


def _reach(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Reach:
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped is not None:
        return _reach(mapped)
    if address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast:
        return Reach.HERE
    return Reach.FAR if address.is_global else Reach.NEAR
