"""What a server lets in: bounds on variants and bytes, over all clients and for each."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from genssl.config.limits import SMALL_MESSAGES, LimitsConfig
from genssl.server.transport.reception import Reception
from genssl.server.transport.release import STEP_BYTES, HeapTrimmer

FullReason = Literal["queue_full", "client_queue_full"]


@dataclass(frozen=True)
class Claim:
    """What a request holds from admission until its answer was sent or dropped."""

    holder: str  # whose limits it counts towards: the token's name, or, on a server without tokens, the client's
    variants: int  # how many it wants
    num_bytes: int  # of the request, of its decoded images, and of the answer it will get


@dataclass(frozen=True)
class Full:
    """Why a claim cannot be admitted now."""

    reason: FullReason  # of `Statistics`: "queue_full" or "client_queue_full"
    message: str  # for the client's user
    excess: int  # how many variants must be done before it could be


class Admission:
    """Counts what has been admitted and not yet left the server. Lives on one event loop.

    Attributes:
        large: where messages with images come in.
        small: where all others do, so that those need not wait for messages with images.
        heap: told of what is freed.
    """

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._most_bytes = limits.most_queued_bytes()
        self._variants: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._claimed = self.variants = 0
        self.large, self.small = Reception(limits.messages_received_at_once()), Reception(SMALL_MESSAGES)
        self.heap = HeapTrimmer(min(STEP_BYTES, limits.max_memory_bytes // 16))

    @property
    def num_bytes(self) -> int:
        """Bytes of requests and answers held now, and of messages that may be on their way in."""
        return self._claimed + (self.large.taken + self.small.taken) * self._limits.max_message_bytes

    def most_bytes(self) -> int:
        """Returns the most bytes that one request with its answer can ever have here."""
        return min(self._most_bytes, self._limits.max_queued_bytes_per_client)

    def most_variants(self, token_most: int | None) -> int:
        """Returns the most variants that one client can ever have here at once, `token_most` by its token."""
        limits = self._limits
        return min(limits.max_queued_variants, limits.max_queued_variants_per_client, token_most or 2**62)

    def refuses(self, claim: Claim, token_most: int | None = None) -> Full | None:
        """Says why a claim must be refused now; None if it may come in."""
        limits = self._limits
        own = min(limits.max_queued_variants_per_client, token_most or 2**62)
        whose = "of this client or token"
        tests: tuple[tuple[FullReason, str, int, int, int], ...] = (
            ("client_queue_full", f"variants {whose}", self._variants[claim.holder], claim.variants, own),
            (
                "client_queue_full",
                f"bytes {whose}",
                self._bytes[claim.holder],
                claim.num_bytes,
                # Not more than it leaves free (Choudhury and Hahne 1998), so that no few of them have all of it.
                max(claim.num_bytes, min(limits.max_queued_bytes_per_client, self._most_bytes - self._claimed)),
            ),
            ("queue_full", "variants", self.variants, claim.variants, limits.max_queued_variants),
            ("queue_full", "bytes", self._claimed, claim.num_bytes, self._most_bytes),
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

    def hold(self, claim: Claim) -> Callable[[], None]:
        """Counts a claim that `refuses` let in until the call that is being handled has sent its answer, or ended.

        The task of a call ends once its last byte was sent, or was dropped with the call.

        Returns:
            What to call once its variants wait no more: from then on its bytes alone count.
        """
        call = asyncio.current_task()
        assert call is not None, "a handler runs in a task"
        waiting = claim.variants

        def done() -> None:
            nonlocal waiting
            self._count(claim.holder, -waiting, 0)
            waiting = 0

        def ended(_: object) -> None:
            self._count(claim.holder, -waiting, -claim.num_bytes)
            self.heap.freed(claim.num_bytes)

        self._count(claim.holder, claim.variants, claim.num_bytes)
        call.add_done_callback(ended)
        return done

    def _count(self, holder: str, variants: int, num_bytes: int) -> None:
        self.variants += variants
        self._claimed += num_bytes
        self._variants[holder] += variants
        self._bytes[holder] += num_bytes
        if self._bytes[holder] == 0:  # the counters hold the clients of this moment alone
            del self._variants[holder], self._bytes[holder]
