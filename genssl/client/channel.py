"""A client's channel to a server: the form of its address, TLS, and the warning where there is none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

import grpc

from genssl.base.home import expand_home
from genssl.config.address import check_target_address, is_local
from genssl.errors import UserError
from genssl.wire.channel import CLIENT_OPTIONS

log = logging.getLogger(__name__)

_warned: set[str] = set()


class ClientTLS(Protocol):
    """What a secure channel needs, as files in PEM; `config.recipe.ClientTLSConfig` has this shape."""

    @property
    def ca(self) -> Path:
        """The server must show a certificate signed by one of these."""
        ...

    @property
    def certificate(self) -> Path | None:
        """The client's own, if the server asks for one."""
        ...

    @property
    def key(self) -> Path | None:
        """Of the client's certificate."""
        ...


def check_target(address: str) -> str:
    """Returns the address; raises UserError if no server can have it: neither the form host:port nor unix:/path."""
    try:
        return check_target_address(str(expand_home(address)))
    except ValueError as error:
        raise UserError(f"targets: {address!r} is not the address of a server: {error}") from None


def _read(path: Path, what: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read ({error.strerror}); give the path of a PEM file") from None


def open_channel(address: str, tls: ClientTLS | None, token: str | None) -> grpc.aio.Channel:
    """Opens a channel, with TLS if there are settings for it; raises UserError if a file cannot be read."""
    if tls is None:
        if not is_local(address) and address not in _warned:
            _warned.add(address)
            log.warning(
                "images%s go to %s unencrypted; give the client tls=, and the server file a tls block",
                " and the token" if token else "",
                address,
            )
        return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
    credentials = grpc.ssl_channel_credentials(
        _read(tls.ca, "tls.ca"),
        _read(tls.key, "tls.key") if tls.key else None,
        _read(tls.certificate, "tls.certificate") if tls.certificate else None,
    )
    return grpc.aio.secure_channel(address, credentials, options=CLIENT_OPTIONS)
