"""The asynchronous client of generation servers: digest first, cut to their limits, repeated where that helps.

Imports no torch: it serves trainers that know nothing else of genssl.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from genssl.client.balancer import OversizedError, TargetPool
from genssl.client.channel import ClientTLS
from genssl.client.images import Wanted, wanted_variants
from genssl.client.messages import (
    Answer,
    Priority,
    Received,
    VariantBatch,
    build_request,
    check_priority,
    cut_uploads,
    read_variant,
)
from genssl.client.server_state import CLIENT_ADVICE, Advice, Target
from genssl.data.base import StoredImage
from genssl.errors import ServerUnavailableError, UserError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.variants.prefetch.loop import refuse_after_fork
from genssl.variants.source import VariantRequest

__all__ = ["Answer", "AsyncVariantClient", "VariantBatch"]


@dataclass(eq=False)
class _Job:
    """One call of `generate` or `variants` under way: what is wanted, by when, and what has come."""

    wanted: Sequence[VariantRequest]
    load: Callable[[int], StoredImage]
    parameters: Mapping[str, float]
    seeds: Sequence[int | None] | None
    priority: Priority
    deadline: float | None
    name: Callable[[int], str] | None = None
    started: float = field(default_factory=time.monotonic)
    images: dict[int, Received] = field(default_factory=dict)
    answer: Answer = field(default_factory=Answer)

    @property
    def ends(self) -> float | None:
        """When its answer is of no more use, on time.monotonic's clock."""
        return None if self.deadline is None else self.started + self.deadline

    def name_of(self, item: int) -> str:
        """Returns what messages call the image of `wanted[item]`."""
        return f"the image in row {self.wanted[item].row}" if self.name is None else self.name(item)


class AsyncVariantClient:
    """Fetches variants from one server or from several that share the work. Made and used on one running event loop.

    gRPC's asyncio stack wants one loop a process: do not use this beside a `VariantClient`, or beside a second loop.
    The arguments are those of `VariantClient`; `advice` is what errors tell users to do.

    Raises:
        UserError: if an address or a file is wrong; in a forked child of a process with a live client.
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
        allow_fork: bool = False,
        advice: Advice = CLIENT_ADVICE,
    ) -> None:
        refuse_after_fork(allow_fork=allow_fork)
        addresses = list(dict.fromkeys([targets] if isinstance(targets, str) else targets))
        if not addresses:
            raise UserError("targets: the list is empty; give the address of at least one generation server")
        self._client_id, self._priority = client_id, check_priority(priority)
        self._pool = TargetPool(addresses, tls=tls, token=token, max_in_flight=max_in_flight, advice=advice)

    async def close(self) -> None:
        """Closes the channels."""
        await self._pool.close()

    async def connect(self) -> None:
        """Asks the servers for their limits; needed once, harmless twice. Raises as `TargetPool.connect`."""
        await self._pool.connect()

    def most_rows(self, image_size: int) -> int:
        """Returns how many variants of this size (pixels) one call can bring within the limits of every server."""
        return min((target.most_rows(image_size) for target in self._pool.targets if target.met), default=1)

    async def find_generator(self, name: str | None = None) -> pb.GeneratorInfo:
        """Returns the generator that the servers offer under this id; None: their only one. Waits while they load.

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
            parameters, priority, deadline, seeds: see `variants`; one seed for each of `wanted`, or None.

        Raises:
            RequestRefusedError: if a server refuses the request or one of its items.
            ServerUnavailableError: at the deadline.
        """
        job = _Job(wanted, load, parameters, seeds, check_priority(priority or self._priority), deadline)
        async with self._in_time(job):
            await self._generate(job, generator)
        return job.answer

    async def _generate(self, job: _Job, generator: pb.GeneratorInfo) -> None:
        rows = self.most_rows(int(job.parameters.get("output_size", generator.image_size)))
        count = len(job.wanted)
        pieces = [list(range(start, min(start + rows, count))) for start in range(0, count, rows)]
        await _all(self._piece(job, generator, piece) for piece in pieces)
        job.answer.images = [job.images[item] for item in range(count)]
        job.answer.seconds = time.monotonic() - job.started

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
        """Fetches a variant of each image, within `deadline` seconds; connects first. See `VariantClient.variants`."""
        started, chosen = time.monotonic(), check_priority(priority or self._priority)
        wanted = (
            images if isinstance(images, Wanted) else await asyncio.to_thread(wanted_variants, images, indices, seeds)
        )
        job = _Job(
            wanted.requests,
            lambda row: wanted.images[row],
            parameters or {},
            wanted.seeds,
            chosen,
            deadline,
            name=wanted.name,
            started=started,
        )
        async with self._in_time(job):
            await self.connect()
            info = await self.find_generator(generator)
            await self._generate(job, info)
        made = [job.answer.images[position] for position in wanted.positions]
        empty = np.zeros((0, 3, info.image_size, info.image_size), np.uint8)
        return VariantBatch(
            images=np.stack([pixels for pixels, _ in made]) if made else empty,
            origins=[origin for _, origin in made],
            source_ids=wanted.source_ids,
            seconds=time.monotonic() - started,
            retries=job.answer.retries,
            model=info.model,
        )

    @property
    def servers(self) -> dict[str, pb.GetServerInfoResponse]:
        """What each server last told of itself, by address; empty messages before `connect`."""
        return {target.address: target.info for target in self._pool.targets}

    async def statistics(self) -> dict[str, pb.GetStatisticsResponse]:
        """Returns the counters of each server, by address; raises ServerUnavailableError if one gives no answer."""
        answers = await asyncio.gather(*(target.statistics() for target in self._pool.targets))
        return {target.address: answer for target, answer in zip(self._pool.targets, answers, strict=True)}

    def state(self) -> str:
        """Says, for an error message, how the servers are doing and what to do about it."""
        return self._pool.state()

    @property
    def reachable(self) -> bool:
        """Says, without waiting, whether a call may be answered now; the servers that are away are probed anyway."""
        return self._pool.reachable

    @property
    def smallest_windows(self) -> dict[str, int]:
        """The fewest requests that were ever allowed in flight, by address; `max_in_flight` if no server was full."""
        return {target.address: target.window.smallest_seen for target in self._pool.targets}

    @asynccontextmanager
    async def _in_time(self, job: _Job) -> AsyncIterator[None]:
        """Ends what is within at the deadline of the job, with an error that says so."""
        timer = asyncio.timeout(None if job.ends is None else max(0.0, job.ends - time.monotonic()))
        try:
            async with timer:
                yield
        except TimeoutError:
            if not timer.expired():
                raise  # the user's own, from reading an image
            error = ServerUnavailableError(f"after {job.deadline:g} s {self.state()}")
            error.retries = job.answer.retries
            raise error from None

    async def _piece(self, job: _Job, generator: pb.GeneratorInfo, items: list[int]) -> None:
        """Fetches a piece by digest, then uploads the sources that a server lacks to that server."""
        met = [target for target in self._pool.targets if target.met]
        for target, unknown in await self._call(job, generator, items, {}):
            messages = await asyncio.to_thread(cut_uploads, job.wanted, unknown, job.load, met, job.name_of)
            await _all(self._call(job, generator, part, data, target) for part, data in messages)

    async def _call(
        self,
        job: _Job,
        generator: pb.GeneratorInfo,
        items: list[int],
        data: dict[bytes, StoredImage],
        prefer: Target | None = None,
    ) -> list[tuple[Target, list[int]]]:
        """Makes one call for `items`, files its images, and returns the items whose source a server does not know."""
        request = build_request(
            generator,
            [job.wanted[item] for item in items],
            seeds=[job.seeds[item] if job.seeds is not None else None for item in items],
            data=data,
            parameters=job.parameters,
            priority=job.priority,
            client_id=self._client_id,
        )
        try:
            response, target = await self._pool.generate(request, job.answer, job.ends, prefer)
        except OversizedError:  # the servers were started anew with smaller limits, or another one has these
            half = len(items) // 2
            parts = await _all(self._call(job, generator, part, data, prefer) for part in (items[:half], items[half:]))
            return [lack for part in parts for lack in part]
        job.answer.calls += 1
        job.answer.generator_seconds += response.timings.generate_seconds
        unknown = []
        for item, variant in zip(items, response.variants, strict=True):
            if variant.status.code == pb.ITEM_CODE_SOURCE_MISSING and not data:
                unknown.append(item)
                continue
            name = functools.partial(job.name_of, item)
            job.images[item] = read_variant(job.wanted[item], variant, address=target.address, name=name)
            job.answer.bytes_received += len(variant.data)
        return [(target, unknown)] if unknown else []


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
