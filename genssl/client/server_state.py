"""One generation server as a client sees it: its channel, what it said of itself, and how it is doing."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc

from genssl.client.channel import ClientTLS, check_target, open_channel
from genssl.client.diagnosis import MARK as TLS_MARK
from genssl.client.diagnosis import diagnose
from genssl.errors import RequestRefusedError, ServerUnavailableError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc
from genssl.variants.prefetch.loop import note_channel
from genssl.wire.channel import (
    MESSAGE_OVERHEAD,
    OTHER_CALLS,
    ROW_OVERHEAD,
    UNSTATED_CALLS,
)

log = logging.getLogger(__name__)

FIRST_BACKOFF, LONGEST_BACKOFF = 0.1, 2.0
LOADING_POLL_SECONDS = 0.2
PROBE_SECONDS = 5.0
SILENT_SECONDS = 10.0  # an unanswered call of this age, and no other answer since, make one suspect a stuck server
RECENT_SECONDS = 10.0  # for so long a refusal is named as the reason why others wait
FIRST_AVOIDANCE, LONGEST_AVOIDANCE = 30.0, 480.0  # each trial of a slow server may cost its caller a whole deadline


@dataclass(frozen=True)
class Advice:
    """The settings that errors tell users to change, in the words in which they gave them.

    They say how long is waited, how to ask for fewer variants, what to do when there is no server at the address, after
    "Start it again with ...", and where the token is given.
    """

    deadline: str
    fewer: str
    away: str
    token: str


CLIENT_ADVICE = Advice(
    deadline="the deadline (deadline_seconds)",
    fewer="ask for fewer variants",
    away="or correct its address",
    token="token=",
)
RECIPE_ADVICE = Advice(
    deadline="variants.deadline_seconds",
    fewer="ask for fewer variants (views.probability, variants.per_image)",
    away="correct variants.server, or set variants.server=embedded",
    token="variants.token_file",
)


class Window:
    """How many requests may be in flight at one server: additive increase, multiplicative decrease (AIMD).

    Grows by one for every window of successes and halves when the server refuses, between 1 and `largest`. Starts at
    `largest`: a server that has room should not be kept waiting, and one that has none says so at once.
    """

    def __init__(self, largest: int) -> None:
        if largest < 1:
            raise ValueError(f"max_in_flight is {largest}; at least 1 request must be allowed in flight")
        self.size = self._largest = largest
        self.smallest_seen = largest
        self._successes = 0
        self._cut_at = float("-inf")

    def succeeded(self) -> None:
        """Counts a request that was served."""
        self._successes += 1
        if self._successes >= self.size:
            self.size, self._successes = min(self._largest, self.size + 1), 0

    def refused(self, sent: float, now: float) -> None:
        """Halves the window, once for all the requests that one full queue refused; times in seconds of one clock."""
        if sent <= self._cut_at:
            return
        self.size, self._successes, self._cut_at = max(1, self.size // 2), 0, now
        self.smallest_seen = min(self.smallest_seen, self.size)


class Target:
    """A server, its limits, and how much of this client's work it has; UserError if its address or a file is wrong.

    Attributes:
        info, generators: what it last told of itself; no generators while it loads.
        met, ready: it has answered since the client was made; it has generators loaded and did not fail since.
        trouble: what it last failed with; empty if it is well.
        fault: why nothing can be asked of it until someone puts it right; empty if there is no reason.
        outstanding: variants under way.
        window: requests that may be in flight.
        heard: when it last answered a request or a probe, on time.monotonic's clock.
    """

    def __init__(
        self,
        address: str,
        *,
        tls: ClientTLS | None,
        token: str | None,
        max_in_flight: int,
        advice: Advice = CLIENT_ADVICE,
    ) -> None:
        self.address, self._advice, self._tls = check_target(address), advice, tls
        self.channel = open_channel(address, tls, token)
        note_channel(self.channel)
        self.stub = pb_grpc.GenerationServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self.info = pb.GetServerInfoResponse()
        self.generators: dict[str, pb.GeneratorInfo] = {}
        self.met = self.ready = False
        self.trouble = self.fault = ""
        self._diagnosed = ("", "")  # what gRPC said, and what was found out about it
        self._refusal, self._refused_at = "", 0.0
        self.outstanding = 0
        self.used = self.heard = 0.0
        self.not_before = 0.0
        self._unanswered: dict[int, float] = {}  # when each call under way was sent; by a number of its own
        self._calls = self._times_avoided = 0
        self._avoided_until = 0.0
        self.window = Window(max_in_flight)
        self._asking = asyncio.Semaphore(OTHER_CALLS)
        self._strikes, self._struck_at = 0, float("-inf")
        self._jitter = random.Random()

    async def introduce(self) -> None:
        """Asks for limits and generators, which change when it is started anew; raises what gRPC does after 5 s."""
        async with self._asking:
            info = await self._ask(self.stub.GetServerInfo, pb.GetServerInfoRequest())
            self.heard = time.monotonic()
            if self.met and info.instance_id != self.info.instance_id:
                log.info("the generation server at %s was started anew", self.address)
            self.info, self.met = info, True
            offered = await self._ask(self.stub.ListGenerators, pb.ListGeneratorsRequest())
        self.generators = {generator.generator_id: generator for generator in offered.generators}

    async def statistics(self) -> pb.GetStatisticsResponse:
        """Asks for the server's counters; raises ServerUnavailableError if it does not answer within 5 s."""
        try:
            async with self._asking:
                answer: pb.GetStatisticsResponse = await self._ask(self.stub.GetStatistics, pb.GetStatisticsRequest())
        except grpc.aio.AioRpcError as error:
            self.trouble = f"{error.code().name}: {error.details()}"
            raise ServerUnavailableError(self.state()) from None
        return answer

    async def _ask(self, method: Any, request: Any) -> Any:
        return await method(request, timeout=PROBE_SECONDS, metadata=self.metadata)

    async def diagnose(self, details: str) -> None:
        """Notes why no connection to the server comes about; looks into it once for what gRPC says."""
        if details != self._diagnosed[0]:
            self._diagnosed = details, await asyncio.to_thread(diagnose, self.address, self._tls)
        if reasons := self._diagnosed[1]:
            self.trouble = reasons if reasons.startswith(TLS_MARK) else f"UNAVAILABLE: {reasons}"

    def message_bytes(self) -> int:
        """Returns how many bytes of images one message may have, to or from this server."""
        queued = [most // 2 for most in (self.info.max_queued_bytes, self.info.max_queued_bytes_per_client) if most]
        return max(1, min([self.info.max_message_bytes, *queued]) - MESSAGE_OVERHEAD)

    def image_bytes(self) -> int:
        """Returns how many bytes one source may have: a message has to hold it."""
        return min(self.info.max_image_bytes, self.info.max_message_bytes - MESSAGE_OVERHEAD)

    def most_rows(self, image_size: int) -> int:
        """Returns how many variants of this size (pixels) one call can bring; limits of 0 are not advertised."""
        fitting = self.message_bytes() // (3 * image_size * image_size + ROW_OVERHEAD)
        info = self.info
        limits = (info.max_variants_per_request, info.max_queued_variants, info.max_queued_variants_per_client)
        return max(1, min([fitting, *filter(None, limits)]))

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        return len(self._unanswered)

    @property
    def has_room(self) -> bool:
        """Says whether one more request may be in flight: within the window, and what a connection may have."""
        calls = self.info.max_concurrent_calls or UNSTATED_CALLS
        return self.in_flight < min(self.window.size, max(1, calls - OTHER_CALLS))

    @property
    def waiting_since(self) -> float:
        """When the oldest call under way was sent; infinite if there is none."""
        return min(self._unanswered.values(), default=float("inf"))

    def doubtful(self, now: float) -> bool:
        """Says whether others should be asked first: it let a deadline pass in silence, or seems about to."""
        return now < self._avoided_until or now - max(self.waiting_since, self.heard) > SILENT_SECONDS

    def begin(self, rows: int) -> int:
        """Counts a call for so many variants as under way; returns its number, for `end`."""
        self._calls += 1
        self.outstanding += rows
        self._unanswered[self._calls] = self.used = time.monotonic()
        return self._calls

    def end(self, call: int, rows: int) -> None:
        """Counts a call as under way no more, however it ended."""
        del self._unanswered[call]
        self.outstanding -= rows

    def pause(self) -> float:
        """Returns seconds to wait: half to all of the back-off, so that not all clients return at once."""
        backoff = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2.0 ** min(self._strikes, 10))
        return backoff * (0.5 + self._jitter.random() / 2)

    def strike(self, sent: float) -> None:
        """Counts a failure towards the back-off, once for all requests that were in flight together."""
        if sent > self._struck_at:
            self._strikes, self._struck_at = self._strikes + 1, time.monotonic()

    def succeeded(self) -> None:
        """Counts a request that was served."""
        self.trouble, self._strikes = "", 0
        self._times_avoided, self._avoided_until, self.heard = 0, 0.0, time.monotonic()
        self.window.succeeded()

    def refused(self, sent: float, retry_after: float | None, details: str) -> None:
        """Notes that the server is full: fewer requests at once, and none before it wants them."""
        self.trouble = self._refusal = f"RESOURCE_EXHAUSTED: {details}"
        self.heard = self._refused_at = time.monotonic()
        self.window.refused(sent, time.monotonic())
        self.strike(sent)
        delay = self.pause() if retry_after is None else retry_after * (1 + self._jitter.random() / 4)
        self.not_before = max(self.not_before, time.monotonic() + delay)

    def late(self, sent: float, details: str) -> None:
        """Notes that the server ended a request at, or ahead of, its deadline."""
        self.trouble = f"DEADLINE_EXCEEDED: {details}"
        self.strike(sent)
        self.not_before = max(self.not_before, time.monotonic() + self.pause())

    def silent(self, sent: float) -> bool:
        """Says whether nothing was heard since; if so others are asked first for a while, longer each time."""
        if self.heard >= sent:
            return False
        if self._avoided_until <= sent:  # once for all calls that were in flight together
            seconds = min(LONGEST_AVOIDANCE, FIRST_AVOIDANCE * 2.0 ** min(self._times_avoided, 10))
            self._times_avoided, self._avoided_until = self._times_avoided + 1, time.monotonic() + seconds
        return True

    def state(self) -> str:
        """Says, for an error message, how the server is doing and what to do about it."""
        # A limit that lets a request through now and then is still why the others wait.
        limited = self._refusal if time.monotonic() - self._refused_at < RECENT_SECONDS else ""
        trouble, advice = self.trouble or limited, self._advice
        server = f"the generation server at {self.address}"
        if not trouble:
            seconds = time.monotonic() - max(self.waiting_since, self.heard)
            silent = f" for {seconds:.0f} s" if seconds > 1 else ""
            return (
                f"{server} says nothing of what it was asked{silent}: see with `genssl top` whether it works. If it "
                f"does, raise {advice.deadline}; if not, it is stuck: its log may say why, start it again"
            )
        if trouble.startswith("RESOURCE_EXHAUSTED"):
            return (
                f"{server} has more work than it takes ({trouble}): {advice.fewer}, raise {advice.deadline} or its own "
                "limits, or add a server"
            )
        if trouble.startswith("DEADLINE_EXCEEDED"):
            return (
                f"{server} is too slow for what is asked ({trouble}): raise {advice.deadline}, {advice.fewer}, add a "
                "server, or use a faster generator"
            )
        if trouble.startswith(TLS_MARK):
            reasons = trouble.removeprefix(TLS_MARK)
            return f"there is no connection to {server}: {reasons}"
        hint = ""
        if "handshake" in self.trouble.lower() or "CERTIFICATE" in self.trouble:
            hint = " Its certificate must be signed by tls.ca and name this host."
        return (
            f"{server} gives no answer ({self.trouble}).{hint} Start it again with `genssl serve-generator FILE`, "
            f"{advice.away}"
        )

    def refusal(self, code: grpc.StatusCode, details: str) -> RequestRefusedError:
        """Returns the error for a request that will not succeed by being repeated."""
        advice = {
            grpc.StatusCode.UNAUTHENTICATED: f"; give the token that the server file names ({self._advice.token})",
            grpc.StatusCode.FAILED_PRECONDITION: "; connect anew to use the generator it has now",
            grpc.StatusCode.UNIMPLEMENTED: "; is this the address of a genssl server of this version?",
        }.get(code, "")
        return RequestRefusedError(f"the generation server at {self.address} refused: {code.name}: {details}{advice}")


def state_of(targets: Iterable[Target]) -> str:
    """Says, for an error message, how servers are doing: those in trouble, and the one that is silent the longest."""
    waiting = sorted(targets, key=lambda target: (target.waiting_since, target.heard))
    named = [target for target in waiting if target.trouble]
    if waiting[0] not in named and waiting[0].heard < waiting[0].waiting_since < float("inf"):
        named.insert(0, waiting[0])
    return "; ".join(target.state() for target in named or waiting[:1])
