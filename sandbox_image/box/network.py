"""Which addresses boxes with network may reach."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

_REFUSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        # Special-purpose addresses (IANA's registries) that `is_global` does not know in all versions of Python.
        *("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20", "5f00::/16", "fec0::/10"),
        # IPv6 addresses that stand for IPv4 ones: NAT64, 6to4.
        *("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16"),
        # A cloud's own services at a public address.
        "168.63.129.16/32",
    )
)
_HOST = re.compile(r"[\w.:-]+")


@dataclass(frozen=True)
class Destination:
    """A host, by the name or address that a program uses for it, and a port; None is any port."""

    host: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> Destination:
        """Read `HOST`, `HOST:PORT`, `[V6]` or `[V6]:PORT`.

        Raises:
            ValueError: it is none of these.
        """
        parts = urlsplit(f"//{text}")
        host = parts.hostname or ""
        if not _HOST.fullmatch(host) or parts.netloc != text or "@" in text or text.endswith(":"):
            raise ValueError(f"{text!r} is not HOST or HOST:PORT")
        return cls(_normalised(host), parts.port)

    def covers(self, host: str, port: int) -> bool:
        """Whether this host and port are meant."""
        return self.host == _normalised(host) and self.port in (None, port)


def _normalised(host: str) -> str:
    return host.lower().rstrip(".")


@dataclass(frozen=True)
class NetworkPolicy:
    """Boxes with network may reach the internet, and the `allowed` hosts at whatever addresses they have."""

    allowed: tuple[Destination, ...] = ()

    def admits(self, host: str, port: int, address: str) -> bool:
        """Whether a host may be reached at this one of its addresses."""
        return any(destination.covers(host, port) for destination in self.allowed) or is_outside(address)


def is_outside(address: str) -> bool:
    """Whether an address is on the internet: neither a special-purpose one nor one of this machine."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if not parsed.is_global or parsed.is_multicast or parsed.is_reserved:
        return False
    return not any(parsed in network for network in _REFUSED if network.version == parsed.version) and not _is_own(address)


def _is_own(address: str) -> bool:
    """Whether the address is one of this machine: a socket can be bound to no other."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True
