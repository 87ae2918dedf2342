"""Files of a server that are read anew when they change, and the one of them that is checked most: its certificate.

The certificate of a TLS port is checked by a handshake of gRPC with itself.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import grpc

from genssl.config.server import TLSConfig
from genssl.errors import UserError

log = logging.getLogger(__name__)

REREAD_SECONDS = 10.0
WARNING_SECONDS = 14 * 86400.0
HANDSHAKE_SECONDS = 10.0
KINDS = (
    "give a certificate for an RSA key of 2048 bits or more, or for an ECDSA key on P-256 or P-384; Ed25519, Ed448 and "
    "P-521 are among those that gRPC's clients do not take"
)
BEGIN, END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
SEQUENCE, UTC_TIME = 0x30, 0x17


class Refreshable(Protocol):
    """What reads files of its own."""

    def refresh(self) -> None:
        """Reads them if they have changed; keeps what it has if they cannot be used."""
        ...


class FileStamps:
    """Tells whether files, which may be absent, were changed since it was last asked; links are followed."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._seen = self._look()

    def changed(self) -> bool:
        """Says whether any file is another than at the last call, or, at the first, than when this was made."""
        before, self._seen = self._seen, self._look()
        return self._seen != before

    def _look(self) -> list[tuple[int, int, int] | None]:
        found: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                status = path.stat()
                found.append((status.st_ino, status.st_size, status.st_mtime_ns))
            except OSError:
                found.append(None)
        return found


async def keep_rereading(files: Sequence[Refreshable], seconds: float = REREAD_SECONDS) -> None:
    """Refreshes again and again, in a thread, until cancelled; start it as a task."""
    while True:
        await asyncio.sleep(seconds)
        for each in files:
            try:
                await asyncio.to_thread(each.refresh)
            except Exception:  # the next replacement must still be seen
                log.exception("a file could not be read anew")


def read_file(key: str, path: Path) -> bytes:
    """Returns a file's content; raises UserError naming `key` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{key}: {path}: {error.strerror}; give a file that the server's user can read") from None


class ServerCertificate:
    """Certificate, key and client CA of a TLS port; with `client_ca`, clients must show a certificate too (mTLS).

    Attributes:
        expires: when the server's own certificate ends, in seconds since 1970.

    Raises:
        UserError: if a file cannot be read or is not PEM, the key does not belong to the certificate, or gRPC's clients
            cannot use them.
    """

    def __init__(self, tls: TLSConfig, clock: Callable[[], float] = time.time) -> None:
        self._tls, self._clock = tls, clock
        self._stamps = FileStamps([path for path in (tls.certificate, tls.key, tls.client_ca) if path is not None])
        self._configuration, self.expires = self._read()
        self._served, self._warned = self._configuration, ""
        self._warn()

    def credentials(self) -> grpc.ServerCredentials:
        """Returns what a port is opened with; its handshakes follow `refresh`."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration, self._fetch, require_client_authentication=self._tls.client_ca is not None
        )

    def refresh(self) -> None:
        """Reads the files if they have changed; broken ones are logged once, and those read before stay in use."""
        if self._stamps.changed():
            try:
                self._configuration, self.expires = self._read()
            except UserError as error:
                log.error("%s; the certificate that was read before stays in use", error)
            else:
                self._warned = ""
                log.info("tls.certificate: %s was read anew, it is valid until %s", self._tls.certificate, self._end())
        self._warn()

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Returns what is new since the last handshake, or None; called by gRPC's threads."""
        latest = self._configuration
        if latest is self._served:
            return None
        self._served = latest
        return latest

    def _read(self) -> tuple[grpc.ServerCertificateConfiguration, float]:
        tls = self._tls
        chain, key = read_file("tls.certificate", tls.certificate), read_file("tls.key", tls.key)
        client_ca = None if tls.client_ca is None else read_file("tls.client_ca", tls.client_ca)
        _check_files(tls)
        _check_handshake(tls, key, chain)
        try:
            expires = _expiry(chain)
        except (ValueError, IndexError):  # OpenSSL reads more headers than gRPC and we do
            raise UserError(_no_certificate("tls.certificate", tls.certificate)) from None
        return grpc.ssl_server_certificate_configuration([(key, chain)], client_ca), expires

    def _warn(self) -> None:
        """Says once that the certificate ends soon, and once that it has."""
        left = self.expires - self._clock()
        state = "has expired" if left <= 0 else "expires" if left <= WARNING_SECONDS else ""
        if state and state != self._warned:
            log.warning(
                "tls.certificate: %s %s on %s; %s. Put a new one in its place: it is read without a restart",
                self._tls.certificate,
                state,
                self._end(),
                "no client accepts it" if left <= 0 else f"that is in {left / 86400:.1f} days",
            )
        self._warned = state

    def _end(self) -> str:
        return f"{datetime.fromtimestamp(self.expires, UTC):%Y-%m-%d %H:%M} UTC"


class _EncryptedKeyError(Exception):
    pass


def _no_password() -> bytes:
    raise _EncryptedKeyError  # without this OpenSSL would ask the terminal


def _check_files(tls: TLSConfig) -> None:
    """Has OpenSSL look at the files, since gRPC takes anything and then fails every handshake without a word."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("DEFAULT@SECLEVEL=2")  # whatever this machine's default: clients elsewhere have it
    _check_certificates("tls.certificate", tls.certificate)
    try:
        context.load_cert_chain(tls.certificate, tls.key, password=_no_password)
    except _EncryptedKeyError:
        raise UserError(
            f"tls.key: {tls.key} is encrypted; give an unencrypted key that only the server's user can read "
            f"(openssl pkey -in {tls.key} -out FILE)"
        ) from None
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
            raise UserError(
                f"tls.key: {tls.key} is not the key of the first certificate in {tls.certificate}; give the one that "
                "was made with it"
            ) from None
        if error.reason is not None:  # such as EE_KEY_TOO_SMALL, CA_MD_TOO_WEAK
            said = (
                error.reason.replace("_", " ").lower().replace("ee key", "its key is").replace("ca md", "its digest is")
            )
            raise UserError(f"tls.certificate: {tls.certificate} cannot be used: {said}; {KINDS}") from None
        raise UserError(f"tls.key: {tls.key} holds no private key in PEM form (-----BEGIN PRIVATE KEY-----)") from None
    if tls.client_ca is not None:
        _check_certificates("tls.client_ca", tls.client_ca)


def _check_certificates(key: str, path: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError:
        raise UserError(_no_certificate(key, path)) from None


def _no_certificate(key: str, path: Path) -> str:
    return f"{key}: {path} holds no certificate in PEM form ({BEGIN})"


def _check_handshake(tls: TLSConfig, key: bytes, chain: bytes) -> None:
    """Has a client of gRPC, which trusts just this certificate, call a server of gRPC that shows it.

    OpenSSL serves keys that gRPC's clients do not take, and gRPC then tells the clients something else.
    """
    server = grpc.server(ThreadPoolExecutor(1))
    try:
        try:
            port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)]))
        except RuntimeError:
            raise UserError(f"tls.certificate: gRPC cannot serve {tls.certificate} with {tls.key}; {KINDS}") from None
        server.start()
        said = _call_without_method(f"127.0.0.1:{port}", chain)
    finally:
        server.stop(None)
    # A name that fails is looked at after the handshake; what a date means is said by `ServerCertificate`.
    if any(words in said for words in ("Hostname Verification", "expired", "not yet valid")):
        return
    if said:
        raise UserError(
            f"tls.certificate: gRPC's own client fails the handshake with {tls.certificate} and {tls.key} ({said}); "
            f"{KINDS}"
        )


def _call_without_method(address: str, trusted: bytes) -> str:
    """Returns why a call does not reach a server, or nothing if it does."""
    options = [("grpc.ssl_target_name_override", "localhost"), ("grpc.enable_http_proxy", 0)]
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(trusted), options) as channel:
        try:
            channel.unary_unary("/genssl/Handshake")(b"", timeout=HANDSHAKE_SECONDS)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                return str(error.details()).rpartition(f"{address}: ")[2]
    return ""


def _expiry(chain: bytes) -> float:
    """Returns the notAfter of the first certificate, in seconds since 1970 (RFC 5280, 4.1)."""
    first = chain.decode("ascii", "replace")
    first = first[first.index(BEGIN) :].partition(END)[0] + END
    ((_, certificate),) = _elements(ssl.PEM_cert_to_DER_cert(first))
    _, body = next(_elements(certificate))
    # signature, issuer, validity, subject, key: the sequences of a certificate's body, in this order
    validity = [content for tag, content in _elements(body) if tag == SEQUENCE][2]
    tag, text = list(_elements(validity))[1]
    form = "%y%m%d%H%M%SZ" if tag == UTC_TIME else "%Y%m%d%H%M%SZ"
    return datetime.strptime(text.decode(), form).replace(tzinfo=UTC).timestamp()


def _elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields tag and content of the elements that follow each other in DER."""
    while der:
        tag, length, start = der[0], der[1], 2
        if length & 0x80:
            start += length & 0x7F
            length = int.from_bytes(der[2:start])
        yield tag, der[start : start + length]
        der = der[start + length :]
