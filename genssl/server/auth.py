"""Who may call: bearer tokens, and what the holder of a token may take."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import grpc

from genssl.config.server import TokenConfig
from genssl.errors import UserError
from genssl.server.batching.schedule import Priority
from genssl.server.certificates import FileStamps, read_file
from genssl.server.guard import refuse
from genssl.server.statistics import Statistics

log = logging.getLogger(__name__)

SHORTEST_TOKEN = 16
HEALTH = "/grpc.health.v1.Health/"  # probes carry no token
BURST_SECONDS = 2.0


class RateLimit:
    """A token bucket that holds two seconds' worth, and at least `largest_request` variants: one of the largest."""

    def __init__(self, per_second: float, largest_request: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_second, self._clock = per_second, clock
        self.burst = max(BURST_SECONDS * per_second, float(largest_request))
        self._level, self._then = self.burst, clock()

    def take(self, variants: int) -> float:
        """Takes so many variants and returns 0; or takes none and returns the seconds after which it could."""
        now = self._clock()
        self._level = min(self.burst, self._level + (now - self._then) * self.per_second)
        self._then = now
        # The tolerance lets in who comes back after exactly the seconds that were named.
        if self._level + 1e-6 >= variants:
            self._level -= variants
            return 0.0
        return (variants - self._level) / self.per_second

    def give_back(self, variants: int) -> None:
        """Returns variants that were taken and then not made, because the request was refused after all."""
        self._level = min(self.burst, self._level + variants)


@dataclass(frozen=True, eq=False)
class Token:
    """A token's name, and what its holder may take; None: no limit but the server's."""

    name: str
    secret: bytes = field(repr=False)
    rate: RateLimit | None = None
    max_queued_variants: int | None = None
    highest_priority: Priority = Priority.INTERACTIVE

    def lowered(self, claimed: Priority) -> Priority:
        """Returns the class in which a request waits that claims this one."""
        return max(claimed, self.highest_priority)


def read_tokens(configs: Sequence[TokenConfig], largest_request: int) -> list[Token]:
    """Reads tokens from their files and environment variables.

    Raises:
        UserError: if a file or variable is missing, or a token is empty, short, not plain text, or given twice.
    """
    tokens: list[Token] = []
    for position, config in enumerate(configs):
        secret, where = _read_token(config, f"tokens.{position}")
        for other in tokens:
            if hmac.compare_digest(secret, other.secret):
                raise UserError(
                    f"{where}: {config.name!r} is the same token as {other.name!r}; give each holder its own"
                )
        rate = config.max_variants_per_second
        limit = None if rate is None else RateLimit(rate, largest_request)
        highest = Priority[config.highest_priority.upper()]
        tokens.append(Token(config.name, secret, limit, config.max_queued_variants, highest))
    return tokens


class Tokens:
    """The tokens of a server, read by `read_tokens` and anew when their files change; `known` are let in now."""

    def __init__(self, configs: Sequence[TokenConfig], largest_request: int) -> None:
        self._configs, self._largest_request = configs, largest_request
        self._stamps = FileStamps([config.file for config in configs if config.file is not None])
        self.known = read_tokens(configs, largest_request)

    def refresh(self) -> None:
        """Reads the tokens if a file has changed; what a holder has taken of its rate stays taken.

        If one cannot be used, that is logged once, and all stay as they were.
        """
        if not self._stamps.changed():
            return
        try:
            fresh = read_tokens(self._configs, self._largest_request)
        except UserError as error:
            log.error("%s; the tokens that were read before stay valid", error)
            return
        changed = [new.name for new, old in zip(fresh, self.known, strict=True) if new.secret != old.secret]
        self.known = [replace(new, rate=old.rate) for new, old in zip(fresh, self.known, strict=True)]
        if changed:
            log.info("tokens read anew: %s", ", ".join(changed))


_current: ContextVar[Token | None] = ContextVar("genssl_token", default=None)


def current_token() -> Token | None:
    """Returns the token under which the call being handled was let in; None if the server asks for none."""
    return _current.get()


def holder_of(token: Token | None, peer: str) -> str:
    """Returns who a call counts as where the device is shared: its token, or without tokens the machine it came from.

    gRPC names a peer such as "ipv4:127.0.0.1:40000", "ipv6:%5B::1%5D:40000" or "unix:". Of IPv6 addresses a machine has
    as many as it likes, so the first 64 bits stand for it.
    """
    if token is not None:
        return f"token:{token.name}"
    kind, _, address = peer.partition(":")
    if not kind.startswith("ip"):
        return kind
    host = address.rpartition(":")[0].removeprefix("%5B").removesuffix("%5D").partition("%25")[0]
    if kind == "ipv6":
        try:
            return str(ipaddress.ip_network((host, 64), strict=False))
        except ValueError:
            return host
    return host


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets in calls with `authorization: Bearer <token>`, and health checks; refuses the rest with UNAUTHENTICATED."""

    def __init__(self, tokens: Tokens, statistics: Statistics) -> None:
        self._tokens, self._statistics = tokens, statistics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Looks at the metadata of one call."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(HEALTH):
            return handler  # that there is no such method is not a secret
        given = [value for key, value in handler_call_details.invocation_metadata or () if key == "authorization"]
        token = self._find(given[0]) if len(given) == 1 else None
        if token is None:
            return self._refusing("the token is not known here" if given else "this server asks for a token")
        # Interceptors and handler of a call run in one context, which no other call shares.
        _current.set(token)
        return handler

    def _find(self, value: str | bytes) -> Token | None:
        header = value if isinstance(value, bytes) else value.encode("utf-8", "replace")
        scheme, _, secret = header.partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        found = None
        for token in self._tokens.known:  # all of them, so that the time taken says nothing
            if hmac.compare_digest(secret.strip(), token.secret):
                found = token
        return found

    def _refusing(self, found: str) -> grpc.RpcMethodHandler:
        async def refuse_call(request: object, context: grpc.aio.ServicerContext) -> None:
            await refuse(
                context,
                self._statistics,
                grpc.StatusCode.UNAUTHENTICATED,
                "auth",
                f"{found}; send the metadata `authorization: Bearer <token>` with a token that the server's operator "
                "gave out",
            )

        # Answers calls of every shape: a refusal needs neither the request nor a response.
        return grpc.stream_stream_rpc_method_handler(refuse_call)


def _read_token(config: TokenConfig, where: str) -> tuple[bytes, str]:
    """Returns the token and the key path of the place that it was read from."""
    if config.file is not None:
        where, place = f"{where}.file", f"{config.file}"
        text = read_file(where, config.file).decode("utf-8", "replace").strip()
    else:
        assert config.env is not None, "TokenConfig sees to it"
        where, place = f"{where}.env", f"${config.env}"
        if config.env not in os.environ:
            raise UserError(f"{where}: the environment variable {config.env} is not set; set it to the token")
        text = os.environ[config.env].strip()
    advice = "make one with `openssl rand -hex 32`"
    if not text:
        raise UserError(f"{where}: {place} holds no token, it is empty; {advice}")
    if len(text) < SHORTEST_TOKEN:
        raise UserError(
            f"{where}: the token in {place} has {len(text)} characters; at least {SHORTEST_TOKEN} are needed; {advice}"
        )
    if not text.isascii() or not text.isprintable() or " " in text:
        raise UserError(f"{where}: the token in {place} has characters that a header cannot carry; {advice}")
    return text.encode(), where
