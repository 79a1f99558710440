"""Where a host name leads: to this machine, into its own network, or out of it."""

from __future__ import annotations

import ipaddress
import re
import socket
from enum import IntEnum

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


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
        return name.lower() == "localhost"


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
    if name.lower() == "localhost":
        return Reach.HERE
    try:
        found = addresses_of(name)
    except OSError:
        return None
    return min(map(reach_at, found))


def addresses_of(name: str) -> list[str]:
    """All addresses of a host name, without zones, in the order in which they should be tried.

    Raises:
        OSError: it has none.
    """
    try:
        entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(f"{name!r} is no host name") from error
    return list(dict.fromkeys(str(entry[4][0]).split("%")[0] for entry in entries))


def reach_at(address: str) -> Reach:
    """Of one address; one of IPv6 that a gateway translates is as far as what it stands for."""
    return _reach(ipaddress.ip_address(address))


def _reach(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Reach:
    inner = _translated(address) if isinstance(address, ipaddress.IPv6Address) else None
    if inner is not None:
        return _reach(inner)
    if address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast:
        return Reach.HERE
    return Reach.FAR if address.is_global else Reach.NEAR


def _translated(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """What an IPv4-mapped, 6to4 or NAT64 (RFC 6052) address stands for."""
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour
