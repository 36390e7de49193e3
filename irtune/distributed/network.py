"""Network interfaces, addresses and ports of this host."""

import ipaddress
import socket
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Interface:
    """A network interface that is up, with its IPv4 and IPv6 addresses, and its speed in Mbit/s (0: not known)."""

    name: str
    addresses: tuple[str, ...]
    speed: int


def interfaces() -> list[Interface]:
    """Those of this machine that are up."""
    states = psutil.net_if_stats()
    return [
        Interface(name, tuple(a.address for a in found if a.family in (socket.AF_INET, socket.AF_INET6)),
                  states[name].speed)
        for name, found in psutil.net_if_addrs().items()
        if name in states and states[name].isup
    ]  # fmt: skip


def address_towards(host: str, port: int = 9) -> str:
    """This machine's own address on the way to `host`. Nothing is sent.

    Raises:
        OSError: when the name is not known, or there is no way to it.
    """
    family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])


def interface_towards(host: str) -> str | None:
    """Name of the interface whose address is used on the way to `host`; None where that is this machine alone."""
    try:
        mine = address_towards(host)
        if ipaddress.ip_address(mine.partition("%")[0]).is_loopback:
            return None
    except (OSError, ValueError):
        return None
    return next((one.name for one in interfaces() if mine in one.addresses), None)


def port_problem(port: int) -> str | None:
    """Why nobody can listen on a TCP port of this machine; None where that is possible."""
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
            if probe.family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            # No listen(): two nodes of a job on one machine that look at the same moment would take each other's probe
            # for another program. bind() fails where somebody listens.
            probe.bind(("", port))
        except OSError as error:
            return f"port {port} of {socket.gethostname()} cannot be used: {error.strerror or error}"
    return None
