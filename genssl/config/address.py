"""Addresses of generation servers: `host:port`, or `unix:/path` for a socket file."""

from __future__ import annotations

LONGEST_SOCKET = 107  # sun_path of Linux
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def check_address(value: str) -> str:
    """Returns the address if it is `host:port` or `unix:/path`; raises ValueError otherwise."""
    if value.startswith("unix:"):
        path = value.removeprefix("unix:")
        if not path:
            raise ValueError("unix: needs the path of a socket, such as unix:/run/genssl.sock")
        if len(path.encode()) > LONGEST_SOCKET:
            raise ValueError(f"the path of a socket may have {LONGEST_SOCKET} bytes, and this has {len(path.encode())}")
        return value
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("an address is host:port (such as 127.0.0.1:50051) or unix:/path")
    return value


def is_local(address: str) -> bool:
    """Says whether only processes on this machine can reach the address."""
    return address.startswith("unix:") or address.rpartition(":")[0] in LOOPBACK
