"""The servers of one client: who gets the next request, who is away, and what is repeated where."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import grpc

from genssl.client.breaker import Reminder
from genssl.client.channel import ClientTLS
from genssl.client.messages import Answer
from genssl.client.server_state import CLIENT_ADVICE, LOADING_POLL_SECONDS, Advice, Target, state_of
from genssl.errors import RequestRefusedError, ServerUnavailableError, suggest
from genssl.generation.v1 import generation_pb2 as pb
from genssl.wire.refusals import read_refusal

log = logging.getLogger(__name__)

CONNECT_SECONDS = 15.0  # a wrong address should be told soon
OTHERS_SECONDS = 1.0  # how long a connection waits for further servers when one has answered
AWAY_SECONDS = 2.0  # a server may be away for so long before it is worth a line in the log
LOADING_SECONDS = 900.0  # a large model on a slow disk
# What a server says to a client that must not, or cannot, talk to it; anything else may pass.
UNWELCOME = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INVALID_ARGUMENT,
)


REFUSED_STREAM = "RST_STREAM with error code 7"  # of HTTP/2 (RFC 9113, section 7), in the words of gRPC's C core


class OversizedError(Exception):
    """A call has more variants than its server takes by now; it must be cut."""


class TargetPool:
    """Sends each call to the server with the least of this client's work that is well and has room.

    A server that fails, or lets a deadline pass in silence, is probed in the background until it is back, with its
    limits read anew; calls never wait for one server while another has room. A source is not tied to a server that has
    seen it: what a server lacks it asks for, an upload and an embedding cost little beside a variant, and ties would
    unbalance the work. The arguments are those of `AsyncVariantClient`.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        tls: ClientTLS | None,
        token: str | None,
        max_in_flight: int,
        advice: Advice = CLIENT_ADVICE,
    ) -> None:
        self.targets = [
            Target(address, tls=tls, token=token, max_in_flight=max_in_flight, advice=advice) for address in addresses
        ]
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()  # who waits for room gets it in the order of coming
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._expected: dict[str, tuple[bytes, str]] = {}
        self._connected = False

    async def close(self) -> None:
        """Ends the probing and closes the channels."""
        for probe in self._probes.values():
            probe.cancel()
        await asyncio.gather(*self._probes.values(), return_exceptions=True)
        await asyncio.gather(*(target.channel.close() for target in self.targets))

    async def connect(self) -> None:
        """Waits until a server has told its limits, and, the first time, a second for the others.

        Raises:
            ServerUnavailableError: if none does within 15 s.
            RequestRefusedError: if one does not let this client in.
        """
        for target in self.targets:
            self._probe(target, first=True)
        started = time.monotonic()
        if not await self._until(lambda: any(target.met for target in self.targets), CONNECT_SECONDS):
            raise ServerUnavailableError(f"after {time.monotonic() - started:.0f} s {self.state()}")
        first, self._connected = not self._connected, True
        if first and not await self._until(lambda: all(target.met for target in self.targets), OTHERS_SECONDS):
            for target in self.targets:
                if not target.met:
                    log.warning("going on without the generation server at %s: %s", target.address, target.trouble)

    async def offered(self) -> Target:
        """Returns a server that has loaded its generators; waits for one, and raises as `find`."""
        started = time.monotonic()
        while not await self._until(lambda: any(target.ready for target in self.targets), CONNECT_SECONDS):
            loading = [target.address for target in self.targets if target.met and not target.trouble]
            if not loading:
                raise ServerUnavailableError(f"after {CONNECT_SECONDS:.0f} s {self.state()}")
            if time.monotonic() - started > LOADING_SECONDS:
                raise ServerUnavailableError(
                    f"the generation server at {loading[0]} has been loading for {LOADING_SECONDS:g} s; see its log"
                )
        return next(target for target in self.targets if target.ready)

    async def find(self, name: str | None) -> pb.GeneratorInfo:
        """Returns the generator of this id, or the only one, of a server that has loaded it.

        Raises:
            RequestRefusedError: if there is none, if there are several and no name, or if servers disagree on it.
            ServerUnavailableError: if no server answers within 15 s, or is still loading after 15 minutes.
        """
        first = await self.offered()
        if name is None:
            if len(first.generators) != 1:
                raise RequestRefusedError(
                    f"the generation server at {first.address} has several generators; name one of them: "
                    f"{', '.join(sorted(first.generators))}"
                )
            name = next(iter(first.generators))
        if name not in first.generators:
            raise RequestRefusedError(
                f"the generation server at {first.address} has no generator {name!r}{suggest(name, first.generators)}"
            )
        info = first.generators[name]
        self._expected[name] = (info.fingerprint, first.address)
        for target in self.targets:
            if target.ready and (fault := self._disagreement(target)):
                raise RequestRefusedError(fault)
        return info

    async def generate(
        self,
        request: pb.GenerateVariantsRequest,
        answer: Answer,
        ends: float | None,
        prefer: Target | None = None,
    ) -> tuple[pb.GenerateVariantsResponse, Target]:
        """Makes one call, repeating it, at another server if there is one, for as long as that may help.

        `ends` says when the answer is of no more use, on time.monotonic's clock; the caller ends the wait then.
        `prefer` is a server that has asked for what the call brings; another gets it if that one has no room. Repeats
        are counted in the answer.

        Raises:
            RequestRefusedError: if a server refuses for good.
            OversizedError: if the chosen server takes fewer variants in a call.
        """
        rows = len(request.variants)
        while True:
            target = await self._acquire(prefer)
            if 0 < target.info.max_variants_per_request < rows:
                raise OversizedError
            call = target.begin(rows)
            sent = target.used
            timeout = None if ends is None else max(0.001, ends - sent)
            try:
                response = await target.stub.GenerateVariants(request, timeout=timeout, metadata=target.metadata)
                target.succeeded()
                return response, target
            except grpc.aio.AioRpcError as error:
                self._failed(target, error, sent, answer)
                if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED and ends is not None:
                    self._note_silence(target, sent, ends)
            except asyncio.CancelledError:
                # The caller's timer fires together with gRPC's, mostly ahead of it.
                if ends is not None and time.monotonic() >= ends:
                    target.late(sent, f"no answer in {time.monotonic() - sent:.3g} s")
                    self._note_silence(target, sent, ends)
                raise
            finally:
                target.end(call, rows)
                self._changed.set()

    @property
    def reachable(self) -> bool:
        """Says whether some server is well, or has said why it cannot be asked, which the next call raises."""
        return any(target.ready or target.fault for target in self.targets)

    def state(self) -> str:
        """Says, for an error message, how the servers are doing and what to do about it."""
        return state_of(self.targets)

    def _note_silence(self, target: Target, sent: float, ends: float) -> None:
        """Asks nothing of a server that has let a deadline pass in silence, unless it answers a probe."""
        if time.monotonic() >= ends and target.silent(sent):
            self._probe(target)

    def _failed(self, target: Target, error: grpc.aio.AioRpcError, sent: float, answer: Answer) -> None:
        """Notes what a failed call says of its server; raises if the call need not be repeated."""
        said = read_refusal(error)
        # gRPC reports a message over the size limit as RESOURCE_EXHAUSTED too, but it will not shrink by waiting.
        full = said.code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" not in said.message
        # Nor is a server away that resets a stream beyond those it allows: it has not looked at the call.
        full = full or (said.code == grpc.StatusCode.UNAVAILABLE and REFUSED_STREAM in said.message)
        if full and said.reason != "TOO_LARGE":
            answer.refusals += 1
            target.refused(sent, said.retry_after, said.message)
        elif said.code == grpc.StatusCode.DEADLINE_EXCEEDED:
            target.late(sent, said.message)
        elif said.code == grpc.StatusCode.UNAVAILABLE:
            target.trouble = f"UNAVAILABLE: {said.message}"
            target.strike(sent)
            self._probe(target)
        else:
            raise target.refusal(said.code, said.message)
        answer.retries += 1

    async def _acquire(self, prefer: Target | None = None) -> Target:
        """Waits, in turn, for a server that is well and has room; returns the one with the fewest variants.

        The preferred one if it is among them. The fewest variants do not tell a stuck server when calls come one by
        one, therefore doubtful ones come last.
        """
        async with self._turn:
            while True:
                self._raise_fault()
                now = time.monotonic()
                ready = [target for target in self.targets if target.ready]
                free = [target for target in ready if target.not_before <= now and target.has_room]
                if prefer is not None and prefer in free:
                    return prefer
                if free:
                    return min(free, key=lambda target: (target.doubtful(now), target.outstanding, target.used))
                waits = [target.not_before - now for target in ready if target.not_before > now]
                await self._change(min(waits, default=None))

    def _raise_fault(self) -> None:
        if fault := next((target.fault for target in self.targets if target.fault), ""):
            raise RequestRefusedError(fault)

    async def _change(self, seconds: float | None) -> None:
        self._changed.clear()
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except TimeoutError:
            return

    async def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        ends = time.monotonic() + seconds
        while not condition():
            self._raise_fault()
            left = ends - time.monotonic()
            if left <= 0:
                return False
            await self._change(left)
        return True

    def _probe(self, target: Target, *, first: bool = False) -> None:
        """Asks nothing of a server until it has told again, in the background, what it is."""
        if first and target.met:
            return
        target.ready = False
        running = self._probes.get(target.address)
        if running is None or running.done():
            pause = 0.0 if first else target.pause()
            self._probes[target.address] = asyncio.get_running_loop().create_task(self._keep_probing(target, pause))

    async def _keep_probing(self, target: Target, pause: float) -> None:
        away = Reminder(after=AWAY_SECONDS)
        while not target.ready:
            await asyncio.sleep(pause)
            asked = time.monotonic()
            try:
                await target.introduce()
            except grpc.aio.AioRpcError as error:
                target.trouble = f"{error.code().name}: {error.details()}"
                if error.code() == grpc.StatusCode.UNAVAILABLE:
                    await target.diagnose(str(error.details()))
                target.strike(asked)
                target.fault = ""
                if error.code() in UNWELCOME:
                    target.fault = str(target.refusal(error.code(), error.details() or ""))
                pause = target.pause()
                if not target.fault and away.lasts():
                    log.warning("%s", target.state())
            else:
                if away.ended():
                    log.warning("the generation server at %s answers again", target.address)
                target.fault = self._disagreement(target) if target.generators else ""
                target.ready = bool(target.generators) and not target.fault
                target.trouble = ""
                pause = target.pause() if target.fault else LOADING_POLL_SECONDS
            self._changed.set()

    def _disagreement(self, target: Target) -> str:
        """Says what is wrong with a server whose generators are not those that this client has begun with."""
        for name, (fingerprint, address) in self._expected.items():
            there = target.generators.get(name)
            if there is None:
                return (
                    f"the generation server at {target.address} has no generator {name!r}, but the one at {address} "
                    "has: servers that share the work must offer the same generators"
                )
            if there.fingerprint != fingerprint and target.address == address:
                return (
                    f"the generation server at {address} was started anew with another generator {name!r}: its "
                    f"fingerprint was {fingerprint.hex()} and is {there.fingerprint.hex()}; connect anew to use it"
                )
            if there.fingerprint != fingerprint:
                return (
                    f"generator {name!r} has the fingerprint {there.fingerprint.hex()} on the server at "
                    f"{target.address}, but {fingerprint.hex()} on the one at {address}: their weights, config or code "
                    "differ, so their variants would too; give all servers the same generator, or connect anew"
                )
        return ""
