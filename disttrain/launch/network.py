"""This host's network interfaces, and which of them the ranks speak through."""

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

_NAME_OF_VARIABLE = "GLOO_SOCKET_IFNAME"


@dataclass(frozen=True)
class Interface:
    """A network interface that is up."""

    name: str
    addresses: tuple[str, ...] = ()
    """IPv4 first; IPv6 addresses of the own link only (fe80::...) are left out."""
    speed_megabits_per_second: int | None = None
    """None where the driver does not tell (bridges, virtual links without a rate)."""

    @property
    def is_loopback(self) -> bool:
        """Whether it reaches this host only."""
        return any(ipaddress.ip_address(address).is_loopback for address in self.addresses)


def interfaces() -> list[Interface]:
    """Interfaces that are up and have an address."""
    states, found = psutil.net_if_stats(), []
    for name, entries in psutil.net_if_addrs().items():
        addresses = [entry.address for entry in entries if entry.family == socket.AF_INET]
        addresses += [entry.address for entry in entries if entry.family == socket.AF_INET6]
        usable = tuple(address for address in addresses if "%" not in address and not address.startswith("fe80"))
        if usable and name in states and states[name].isup:
            found.append(Interface(name, usable, states[name].speed or None))
    return found


def interface_of(address: str) -> Interface | None:
    """The interface of this host that has the address."""
    return next((interface for interface in interfaces() if address in interface.addresses), None)


def resolve(host: str) -> list[str]:
    """Addresses of a host name, in the resolver's order; none when it is unknown."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def route_to(host: str) -> Interface | None:
    """The interface through which this host sends to another one; None when there is no route."""
    for address in resolve(host):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, 9))  # a datagram socket sends nothing when it connects
            except OSError:
                continue
            return interface_of(str(probe.getsockname()[0]))
    return None


def gloo_interface(environ: Mapping[str, str]) -> Interface | None:
    """The interface that torch's gloo binds to; None where GLOO_SOCKET_IFNAME names none that is up.

    Without the variable it is the one with the address of this host's own name, and the loopback where that name does
    not resolve to an address of this host (as in torch's ProcessGroupGloo).
    """
    named = environ.get(_NAME_OF_VARIABLE, "").split(",")[0]
    if named:
        return next((interface for interface in interfaces() if interface.name == named), None)
    own = [interface_of(address) for address in resolve(socket.gethostname())]
    return next((found for found in own if found), interface_of("127.0.0.1"))


def nccl_interfaces(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the interfaces that NCCL opens its sockets on, by the rules of its documentation.

    NCCL_SOCKET_IFNAME has beginnings of names, exact ones after "=", or such that are not taken after "^". Without it
    ib* goes before all others, docker* comes after them and the loopback last.
    """
    up = [(interface.name, interface.is_loopback) for interface in interfaces()]
    wanted = environ.get("NCCL_SOCKET_IFNAME", "")
    if not wanted:
        ranked = [(name, 3 if loopback else 2 if name.startswith("docker") else 0 if name.startswith("ib") else 1)
                  for name, loopback in up]  # fmt: skip
        best = min((order for _, order in ranked), default=0)
        return tuple(name for name, order in ranked if order == best)
    without, exact = wanted.startswith("^"), "=" in wanted[:2]
    words = wanted.lstrip("^=").split(",")
    hits = [any(name == word if exact else name.startswith(word) for word in words) for name, _ in up]
    return tuple(name for (name, _), hit in zip(up, hits, strict=True) if hit != without)


def reachable_candidates(environ: Mapping[str, str]) -> list[str]:
    """Addresses of this host that other hosts may reach, the likeliest first."""
    preferred = gloo_interface(environ)
    ordered = sorted(interfaces(), key=lambda interface: interface != preferred)
    return [address for interface in ordered if not interface.is_loopback for address in interface.addresses]
