"""The asynchronous client of generation servers: digest first, cut to their limits, repeated where that helps.

Imports no torch: it serves trainers that know nothing else of genssl.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from genssl.data.base import StoredImage, UInt8Array
from genssl.errors import ServerUnavailableError, UserError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.serving.images import Wanted, wanted_variants
from genssl.serving.messages import Priority, build_request, check_priority, cut_uploads, read_variant
from genssl.serving.target_pool import OversizedError, Tally, TargetPool
from genssl.serving.targets import ClientTLS
from genssl.variants.ledger import Origin
from genssl.variants.source import VariantRequest

__all__ = ["Answer", "AsyncVariantClient", "GenerationClient", "VariantBatch"]

Received = tuple[UInt8Array, Origin]


@dataclass
class Answer:
    """What a request brought, and what it cost.

    Attributes:
        images: uint8 [3, h, w], read-only, with their origins, in the order of the request.
        generator_seconds: device time that the servers spent on it.
        bytes_received: of variants.
        calls: that were answered.
        retries: calls repeated, because a server was away, full or late.
        refusals: those of them where it was full.
        seconds: from the request to the last image.
    """

    images: list[Received] = field(default_factory=list)
    generator_seconds: float = 0.0
    bytes_received: int = 0
    calls: int = 0
    retries: int = 0
    refusals: int = 0
    seconds: float = 0.0


@dataclass
class VariantBatch:
    """Variants as a trainer wants them.

    Attributes:
        images: uint8 [N, 3, h, w], one for each image asked for, in their order.
        origins: N of "generated" (computed for this call) or "store" (the server had it already).
        source_ids: N times 16 bytes that name the sources.
        seconds: that the call took.
        retries: calls repeated, because a server was away, full or late.
    """

    images: UInt8Array
    origins: list[Origin]
    source_ids: list[bytes]
    seconds: float
    retries: int


class _Job:
    """One `generate` under way: what is wanted and what has come."""

    def __init__(self, wanted: Sequence[VariantRequest], load: Callable[[int], StoredImage], build: Any) -> None:
        self.wanted, self.load, self.build = wanted, load, build
        self.images: dict[int, Received] = {}
        self.answer, self.tally = Answer(), Tally()


class AsyncVariantClient:
    """Fetches variants from one server or from several that share the work. Made and used on one running event loop.

    gRPC's asyncio stack wants one loop a process: do not use this beside a `VariantClient`, or beside a second loop.

    Args:
        targets: host:port or unix:/path, one or several. All must offer the same generator, with one fingerprint.
        client_id: names this client in the servers' logs and fair shares.
        token: the bearer token that the servers want.
        tls: the files of a secure channel; None: unencrypted.
        max_in_flight: requests in flight at each server; fewer while it says that it is full.
        priority: of its requests, unless they say otherwise.

    Raises:
        UserError: if an address or a file is wrong.
    """

    def __init__(
        self,
        targets: str | Sequence[str],
        *,
        client_id: str = "",
        token: str | None = None,
        tls: ClientTLS | None = None,
        max_in_flight: int = 8,
        priority: Priority = "training",
    ) -> None:
        addresses = list(dict.fromkeys([targets] if isinstance(targets, str) else targets))
        if not addresses:
            raise UserError("targets: the list is empty; give the address of at least one generation server")
        self._client_id, self._priority = client_id, check_priority(priority)
        self._pool = TargetPool(addresses, tls=tls, token=token, max_in_flight=max_in_flight)

    async def close(self) -> None:
        """Closes the channels."""
        await self._pool.close()

    async def connect(self) -> None:
        """Asks the servers for their limits; tells soon whether there is a server at all. Needed once, harmless twice.

        Raises:
            ServerUnavailableError: if none answers within 15 s.
            RequestRefusedError: if one does not let this client in.
        """
        await self._pool.connect()

    def most_rows(self, image_size: int) -> int:
        """Returns how many variants of this size (pixels) one call can bring within the limits of every server."""
        return min((target.most_rows(image_size) for target in self._pool.targets if target.met), default=1)

    async def find_generator(self, name: str | None = None) -> pb.GeneratorInfo:
        """Returns the generator that the servers offer under this id; None: their only one.

        Waits while all of them are still loading.

        Raises:
            RequestRefusedError: if they offer others only, or disagree on its fingerprint.
            ServerUnavailableError: if none answers within 15 s, or is still loading after 15 minutes.
        """
        return await self._pool.find(name)

    async def list_generators(self) -> list[pb.GeneratorInfo]:
        """Returns what the servers offer; waits and raises as `find_generator`."""
        return list((await self._pool.offered()).generators.values())

    async def generate(
        self,
        generator: pb.GeneratorInfo,
        wanted: Sequence[VariantRequest],
        load: Callable[[int], StoredImage],
        parameters: Mapping[str, float],
        *,
        priority: Priority | None = None,
        deadline: float | None = None,
        seeds: Sequence[int | None] | None = None,
    ) -> Answer:
        """Fetches variants of one generator: by digest first, then those whose sources a server had to see.

        Cut to the servers' limits, and the pieces sent at once. Calls are repeated while a server is away, or is full,
        until the deadline; without one, whoever waits sets the limit, and `state` says what the trouble is.

        Args:
            generator: as `find_generator` returned it; the servers must still have this fingerprint.
            wanted: the variants.
            load: returns the stored image of a row; called in a thread, for sources that a server does not know.
            parameters: on top of the generator's defaults.
            priority: None: the client's.
            deadline: seconds from now; the servers are told, and drop what would be late.
            seeds: one for each of `wanted`, in place of those that follow from their names; None: as they follow.

        Raises:
            RequestRefusedError: if a server refuses the request or one of its items.
            ServerUnavailableError: at the deadline.
        """
        chosen = check_priority(priority or self._priority)
        own = list(seeds) if seeds is not None else [None] * len(wanted)

        def build(items: Sequence[int], data: Mapping[bytes, StoredImage]) -> pb.GenerateVariantsRequest:
            return build_request(
                generator,
                [wanted[item] for item in items],
                seeds=[own[item] for item in items],
                data=data,
                parameters=parameters,
                priority=chosen,
                client_id=self._client_id,
            )

        started = time.monotonic()
        ends = None if deadline is None else started + deadline
        job = _Job(wanted, load, build)
        rows = self.most_rows(int(parameters.get("output_size", generator.image_size)))
        pieces = [list(range(start, min(start + rows, len(wanted)))) for start in range(0, len(wanted), rows)]
        async with self._until(deadline):
            await _all(self._piece(job, piece, ends) for piece in pieces)
        answer = job.answer
        answer.images = [job.images[item] for item in range(len(wanted))]
        answer.retries, answer.refusals = job.tally.retries, job.tally.refusals
        answer.seconds = time.monotonic() - started
        return answer

    async def variants(
        self,
        images: Sequence[Any] | Wanted,
        indices: int | Sequence[int] = 0,
        *,
        generator: str | None = None,
        parameters: Mapping[str, float] | None = None,
        seeds: int | Sequence[int] | None = None,
        priority: Priority | None = None,
        deadline: float | None = None,
    ) -> VariantBatch:
        """Fetches a variant of each image; connects first if need be. See `VariantClient.variants`."""
        started = time.monotonic()
        wanted = (
            images if isinstance(images, Wanted) else await asyncio.to_thread(wanted_variants, images, indices, seeds)
        )
        async with self._until(deadline):
            await self.connect()
            info = await self.find_generator(generator)
            left = None if deadline is None else max(0.001, deadline - (time.monotonic() - started))
            answer = await self.generate(
                info,
                wanted.requests,
                lambda row: wanted.images[row],
                parameters or {},
                priority=priority,
                deadline=left,
                seeds=wanted.seeds,
            )
        chosen = [answer.images[position] for position in wanted.positions]
        empty = np.zeros((0, 3, info.image_size, info.image_size), np.uint8)
        return VariantBatch(
            images=np.stack([pixels for pixels, _ in chosen]) if chosen else empty,
            origins=[origin for _, origin in chosen],
            source_ids=wanted.source_ids,
            seconds=time.monotonic() - started,
            retries=answer.retries,
        )

    @property
    def servers(self) -> dict[str, pb.GetServerInfoResponse]:
        """What each server last told of itself, by address; empty messages before `connect`."""
        return {target.address: target.info for target in self._pool.targets}

    async def statistics(self) -> dict[str, pb.GetStatisticsResponse]:
        """Returns the counters of each server, by address.

        Raises:
            ServerUnavailableError: if one does not answer within 5 s.
        """
        answers = await asyncio.gather(*(target.statistics() for target in self._pool.targets))
        return {target.address: answer for target, answer in zip(self._pool.targets, answers, strict=True)}

    def state(self) -> str:
        """Says, for an error message, how the servers are doing and what to do about it."""
        return self._pool.state()

    @property
    def smallest_windows(self) -> dict[str, int]:
        """The fewest requests that were ever allowed in flight, by address; `max_in_flight` if no server was full."""
        return {target.address: target.window.smallest_seen for target in self._pool.targets}

    @asynccontextmanager
    async def _until(self, seconds: float | None) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise ServerUnavailableError(f"after {seconds:g} s {self.state()}") from None

    async def _piece(self, job: _Job, items: list[int], ends: float | None) -> None:
        """Fetches a piece by digest, then uploads the sources that the server lacks."""
        unknown = await self._call(job, items, {}, ends)
        if unknown:
            met = [target for target in self._pool.targets if target.met]
            messages = await asyncio.to_thread(cut_uploads, job.wanted, unknown, job.load, met)
            await _all(self._call(job, part, data, ends) for part, data in messages)

    async def _call(self, job: _Job, items: list[int], data: dict[bytes, StoredImage], ends: float | None) -> list[int]:
        """Makes one call for `items`, files its images, and returns the items whose source is unknown."""
        try:
            response, target = await self._pool.generate(job.build(items, data), job.tally, ends)
        except OversizedError:  # the servers were started anew with smaller limits, or another one has these
            half = len(items) // 2
            parts = await _all(self._call(job, part, data, ends) for part in (items[:half], items[half:]))
            return [item for part in parts for item in part]
        job.answer.calls += 1
        job.answer.generator_seconds += response.timings.generate_seconds
        unknown = []
        for item, variant in zip(items, response.variants, strict=True):
            if variant.status.code == pb.ITEM_CODE_SOURCE_MISSING and not data:
                unknown.append(item)
                continue
            job.images[item] = read_variant(job.wanted[item], variant, target.address)
            job.answer.bytes_received += len(variant.data)
        return unknown


async def _all(works: Any) -> list[Any]:
    """Awaits all of them at once; the first failure cancels the others and is raised as it is."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


GenerationClient = AsyncVariantClient
