"""Addresses of generation servers: `host:port`, or `unix:/path` for a socket file."""

from __future__ import annotations

import ipaddress
import re

LONGEST_SOCKET = 107  # sun_path of Linux
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
FORM = "an address is host:port (such as 127.0.0.1:50051) or unix:/path"


def check_address(value: str) -> str:
    """Returns the address to serve at if it is `host:port` or `unix:/path`; raises ValueError otherwise.

    Port 0 is any free port. gRPC's own forms are allowed too: `dns:///host:port`, `ipv4:` and `ipv6:` with addresses in
    a row, `unix:path` and `unix:///path`.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{FORM}, and this is empty")
    if value != value.strip() or (not value.startswith("unix:") and re.search(r"\s", value)):
        raise ValueError(f"{FORM}, and this has blanks")
    if value.startswith("unix:"):
        return _check_socket(value)
    scheme, found, rest = value.partition("://")
    if found and (scheme != "dns" or "/" not in rest):
        raise ValueError(f"{FORM}, without {scheme}://{_instead(rest)}")
    for one in hosts_and_ports(value):
        _check_host_and_port(one)
    return value


def hosts_and_ports(address: str) -> list[str]:
    """Returns every host:port that an address of TCP names, without gRPC's own forms around it."""
    scheme, found, rest = address.partition("://")
    if found:
        return [rest.partition("/")[2]]  # what stands before it is a name server
    scheme, _, rest = address.partition(":")
    if scheme not in ("dns", "ipv4", "ipv6") or ":" not in rest:
        return [address]
    return [rest] if scheme == "dns" else rest.split(",")


def check_target_address(value: str) -> str:
    """Returns the address of a running server; raises ValueError as `check_address`, and for port 0."""
    check_address(value)
    if not value.startswith("unix:") and any(int(one.rpartition(":")[2]) == 0 for one in value.split(",")):
        raise ValueError("port 0 is not the port of a running server; give the one that its log names")
    return value


def _check_socket(value: str) -> str:
    path = value.removeprefix("unix:")
    if not path.strip("/"):
        raise ValueError("unix: needs the path of a socket, such as unix:/run/genssl.sock")
    if len(path.encode()) > LONGEST_SOCKET:
        raise ValueError(f"the path of a socket may have {LONGEST_SOCKET} bytes, and this has {len(path.encode())}")
    return value


def _check_host_and_port(value: str) -> None:
    host, colon, port = value.rpartition(":")
    if "/" in port:
        raise ValueError(f"{FORM}, and nothing may follow the port{_instead(value)}")
    if not colon or host.count("[") != host.count("]"):
        raise ValueError(f"{FORM}, and this has no port")
    if not host:
        raise ValueError(f"{FORM}, and this has no host")
    if not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise ValueError(f"{FORM}, and {port!r} is not a port: they go to 65535")
    try:
        if host.startswith("[") and host.endswith("]"):
            ipaddress.IPv6Address(host[1:-1])
        elif re.fullmatch(r"\d+(\.\d+){3}", host):
            ipaddress.IPv4Address(host)
        elif ":" in host:
            raise ValueError(f"IPv6 addresses stand in brackets, such as [::1]:{port}")
        elif re.search(r"[/@?#\[\]\\]", host):
            raise ValueError(f"{FORM}, and {host!r} is not the name of a host")
    except ipaddress.AddressValueError as error:
        raise ValueError(f"{FORM}, and {host} is not an IP address ({error})") from None


def _instead(rest: str) -> str:
    """Suggests what stands in a URL's place, if host and port are there."""
    found = re.match(r"[^/?#@\s]+:\d+(?![^/?#])", rest)
    return f"; write {found[0]}" if found else ""


def is_local(address: str) -> bool:
    """Says whether only processes on this machine can reach the address."""
    return address.startswith("unix:") or address.rpartition(":")[0] in LOOPBACK
