"""What a server lets in: bounds on variants and bytes, over all clients and for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from genssl.config.server import LimitsConfig

FullReason = Literal["queue_full", "client_queue_full"]


@dataclass(frozen=True)
class Claim:
    """What a request holds from admission to its answer.

    Attributes:
        holder: whose limits it counts towards: the token's name, or, on a server without tokens, the client's.
        variants: how many it wants.
        num_bytes: of the request and of the answer it will get.
    """

    holder: str
    variants: int
    num_bytes: int


@dataclass(frozen=True)
class Full:
    """Why a claim cannot be admitted now.

    Attributes:
        reason: of `Statistics`: "queue_full" or "client_queue_full".
        message: for the client's user.
        excess: how many variants must be done before it could be.
    """

    reason: FullReason
    message: str
    excess: int


class Admission:
    """Counts what has been admitted and not yet answered. Lives on one event loop.

    Args:
        limits: of the server file.
    """

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._variants: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self.variants = self.num_bytes = 0

    def most(self, token_most: int | None) -> int:
        """Returns the most variants that one client can ever have here at once."""
        limits = self._limits
        return min(limits.max_queued_variants, limits.max_queued_variants_per_client, token_most or 2**62)

    def refuses(self, claim: Claim, token_most: int | None = None) -> Full | None:
        """Says why a claim must be refused now; None if it may come in.

        Args:
            claim: what is asked for.
            token_most: the most variants that the client's token may have waiting.
        """
        limits = self._limits
        own = min(limits.max_queued_variants_per_client, token_most or 2**62)
        whose = "of this client or token"
        tests: tuple[tuple[FullReason, str, int, int, int], ...] = (
            (
                "client_queue_full",
                f"variants {whose}",
                self._variants[claim.holder],
                claim.variants,
                own,
            ),
            (
                "client_queue_full",
                f"bytes {whose}",
                self._bytes[claim.holder],
                claim.num_bytes,
                limits.max_queued_bytes_per_client,
            ),
            ("queue_full", "variants", self.variants, claim.variants, limits.max_queued_variants),
            ("queue_full", "bytes", self.num_bytes, claim.num_bytes, limits.max_queued_bytes),
        )
        for reason, what, held, wanted, most in tests:
            if held + wanted > most:
                share = (held + wanted - most) / max(wanted, 1)
                return Full(
                    reason,
                    f"{held:,} {what} wait already and {wanted:,} more would exceed the limit of {most:,}; "
                    "come back when RetryInfo says",
                    max(1, round(share * claim.variants)),
                )
        return None

    @contextmanager
    def hold(self, claim: Claim) -> Iterator[None]:
        """Counts a claim that `refuses` let in, until the block ends."""
        self._count(claim, 1)
        try:
            yield
        finally:
            self._count(claim, -1)

    def _count(self, claim: Claim, sign: int) -> None:
        self.variants += sign * claim.variants
        self.num_bytes += sign * claim.num_bytes
        self._variants[claim.holder] += sign * claim.variants
        self._bytes[claim.holder] += sign * claim.num_bytes
        if self._variants[claim.holder] == 0:  # the counters hold the clients of this moment alone
            del self._variants[claim.holder], self._bytes[claim.holder]
