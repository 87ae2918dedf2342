"""Why no connection to a server comes about, address by address, and whether TLS is the reason.

gRPC tells the failure of the last address alone, and to a client without TLS it tells nothing of the other side's TLS.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from genssl.config.address import hosts_and_ports

if TYPE_CHECKING:
    from genssl.client.channel import ClientTLS

PROBE_SECONDS = 2.0  # for each step at each address
MOST_ADDRESSES = 4
HANDSHAKE, ALERT = b"\x16\x03", b"\x15\x03"  # how every record of TLS that may answer begins
MARK = "TLS: "
HUNG_UP = "it hangs up at once; perhaps it has as many connections as it takes (limits.max_connections)"
GIVE_TLS = "it speaks TLS, and this client does not; give it tls (variants.tls in a recipe)"
NO_TLS = "it does not speak TLS, and this client does; leave tls out, or give the server's file a tls block"


def diagnose(address: str, tls: ClientTLS | None) -> str:
    """Connects to every address that a server's name has, and returns why gRPC's connections fail; empty if unknown.

    Reasons that concern TLS, of which the client has the settings `tls` or none, come first, with "TLS: " in front of
    all.
    """
    try:
        places = list(_places(address))[:MOST_ADDRESSES]
    except OSError as error:
        return f"{address}: {error.strerror}"
    host = "localhost" if address.startswith("unix:") else hosts_and_ports(address)[0].rpartition(":")[0].strip("[]")
    found = [(place, *_reason(family, target, host, tls)) for family, target, place in places]
    reasons = [f"{place}: {reason}" for place, _, reason in sorted(found, key=lambda one: not one[1]) if reason]
    return (MARK if any(about_tls for _, about_tls, _ in found) else "") + "; ".join(reasons)


def _places(address: str) -> Iterator[tuple[int, Any, str]]:
    """Yields family, socket address, and the name under which it is reported, of all that an address stands for."""
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        yield socket.AF_UNIX, path, path
        return
    for one in hosts_and_ports(address):
        host, _, port = one.rpartition(":")
        for family, _, _, _, target in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM):
            yield family, target, f"[{target[0]}]:{port}" if family == socket.AF_INET6 else f"{target[0]}:{port}"


def _reason(family: int, target: Any, host: str, tls: ClientTLS | None) -> tuple[bool, str]:
    """Returns whether TLS is why a connection fails, and the reason; an empty one if it does not fail here."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.settimeout(PROBE_SECONDS)
            connection.connect(target)
            there = _speaks_tls(connection, host)
        if there is None:
            return False, HUNG_UP
        if tls is None or not there:
            return (there, GIVE_TLS) if there else (tls is not None, NO_TLS if tls is not None else "")
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.settimeout(PROBE_SECONDS)
            connection.connect(target)
            said = _refusal_by_tls(connection, host, tls)
            return bool(said), said
    except TimeoutError:
        return False, "no answer"
    except OSError as error:
        return False, error.strerror or str(error)


def _speaks_tls(connection: socket.socket, host: str) -> bool | None:
    """Greets as a client of TLS does, and says whether the answer is one of TLS; None if there is none at all."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent but the greeting
    context.set_alpn_protocols(["h2"])
    hello = ssl.MemoryBIO()
    try:
        context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname=host).do_handshake()
    except ssl.SSLWantReadError:
        connection.sendall(hello.read())
    try:
        first = connection.recv(2)
    except ConnectionError:
        return None
    return first in (HANDSHAKE, ALERT) if first else None


def _refusal_by_tls(connection: socket.socket, host: str, tls: ClientTLS) -> str:
    """Shakes hands as the client of these settings, and returns why that fails."""
    try:
        context = ssl.create_default_context(cafile=str(tls.ca))
        if tls.certificate is not None and tls.key is not None:
            context.load_cert_chain(tls.certificate, tls.key)
    except ssl.SSLError:
        return f"tls.ca ({tls.ca}), tls.certificate or tls.key is not a PEM file, or key and certificate do not fit"
    context.set_alpn_protocols(["h2"])
    try:
        secured = context.wrap_socket(connection, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        if "mismatch" in error.verify_message or "not valid for" in error.verify_message:
            return f"its certificate does not name {host}; connect by a name that it has, or have one issued for this"
        if "issuer" in error.verify_message or "self-signed" in error.verify_message:
            return f"its certificate is signed by none of the authorities in {tls.ca}; give tls.ca the server's own"
        return f"its certificate is refused: {error.verify_message}"
    except ssl.SSLError as error:
        return f"its TLS refuses this client: {str(error.reason).replace('_', ' ').lower()}"
    # A server of gRPC speaks first, unless it hangs up on the client's certificate: in TLS 1.3 that comes last.
    with secured, contextlib.suppress(ssl.SSLError, ConnectionError):
        if secured.recv(1):
            return ""
    if tls.certificate is None:
        return "it hangs up as one that wants a certificate of the client; give tls.certificate and tls.key"
    return f"it hangs up as one that does not accept the client's certificate {tls.certificate}"
