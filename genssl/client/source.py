"""The remote source: variants from generation servers, through the prefetch queue."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Sequence

import numpy as np

from genssl.client.aio import AsyncVariantClient
from genssl.client.breaker import FallbackLog
from genssl.client.messages import Priority
from genssl.client.server_state import RECIPE_ADVICE
from genssl.config.recipe import ClientTLSConfig, VariantsConfig
from genssl.data.base import ImageDataset, UInt8Array
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generators.parameters import Parameters, is_known, merge
from genssl.variants.ledger import Ledger, Origin
from genssl.variants.prefetch.budget import Budget
from genssl.variants.prefetch.pool import VariantPool
from genssl.variants.prefetch.queue import BULK_IN_FLIGHT, Image, Key, PrefetchQueue
from genssl.variants.source import REAL, Delivery, VariantRequest

log = logging.getLogger(__name__)

NO_STEP = sys.maxsize  # what is taken without a step is announced for a time that never passes


class RemoteSource:
    """Asks servers for the variants of coming steps while the current one trains.

    Args:
        targets: addresses of servers that share the work.
        generator_id: what the servers call the generator.
        parameters: on top of the servers' defaults.
        dataset: has the sources.
        config: how many at once, how patient, and what a step does whose variants are late.
        ledger: gets calls, retries, bytes, latencies and generator seconds.
        pool: received variants, which `late: reuse` takes for others; belongs to this source from now on.
        budget: which of the planned variants are asked for; None: all that the pool lacks.
        token: the bearer token that the servers want.
        tls: how the servers are checked.
        check: raises when the server is known to be gone for good.
        client_id: names this source in the servers' logs and fair shares.
        priority: of what is planned.

    Attributes:
        generator: as the servers describe it.
        image_size: side of its variants in pixels.
        announced: the last step that was planned; -1 before the first.
        received: called in a thread with requests and images before they are handed on; what it raises ends them.
        lacking: returns those of some requests that are worth generating ahead of the plan.

    Raises:
        ServerUnavailableError: if no server can be reached.
        RequestRefusedError: if they do not have the generator.
        PoolError: if the pool does not hold even one variant.
    """

    def __init__(
        self,
        *,
        targets: Sequence[str],
        generator_id: str,
        parameters: Parameters,
        dataset: ImageDataset,
        config: VariantsConfig,
        ledger: Ledger,
        pool: VariantPool | None = None,
        budget: Budget | None = None,
        token: str | None = None,
        tls: ClientTLSConfig | None = None,
        check: Callable[[], None] = lambda: None,
        client_id: str = "genssl run",
        priority: Priority = "training",
    ) -> None:
        self._targets, self._generator_id, self._parameters = list(targets), generator_id, parameters
        self._client_id, self._priority = client_id, priority
        self.received: Callable[[Sequence[VariantRequest], Sequence[Image]], object] | None = None
        self.lacking: Callable[[Sequence[VariantRequest]], list[VariantRequest]] | None = None
        self._dataset, self._config, self._ledger = dataset, config, ledger
        self._pool, self._budget = pool, budget
        self._token, self._tls = token, tls
        self._client: AsyncVariantClient | None = None
        self.generator: pb.GeneratorInfo | None = None
        self.image_size = 0
        self.announced = -1
        self._step = 0
        self._fallbacks = FallbackLog(log)
        self._relied: dict[Key, tuple[int, VariantRequest]] = {}  # left to the pool, and the last step that wants it
        self._queue = PrefetchQueue(
            self._fetch,
            rows_per_request=config.rows_per_request,
            max_in_flight=config.max_in_flight * len(targets),
            deadline_seconds=config.deadline_seconds,
            newest_first=config.late != "block",
            ledger=ledger,
            fetch_bulk=self._fetch_bulk,
            received=self._keep if pool is not None else None,
            dropped=budget.give_back if budget is not None else None,
            check=check,
            describe=self._state,
        )
        try:
            self._queue.run_first(self._connect())
            if pool is not None:
                pool.check(3 * self.image_size**2)
        except BaseException:
            self.close()
            raise

    def announce(self, requests: Sequence[VariantRequest], step: int | None = None) -> None:
        """Starts asking for the variants of a coming step that the pool does not have."""
        if step is not None:
            self.announced = step
            requests = self._rely_on_pool(requests, step)
            if self._budget is not None:
                requests = [request for request in requests if self._budget.allows(request)]
        self._queue.announce(requests, NO_STEP if step is None else step)

    def take(self, requests: Sequence[VariantRequest], step: int | None = None) -> Delivery:
        """Returns what a step gets: under `late: block` what was planned, waiting for it; else what there is.

        A variant that is late is replaced by another of the same source from the pool (`reused`), and by the source
        itself (`real`) where there is none or `late` is `real`.
        """
        if step is None or self._config.late == "block":
            images = self._queue.take(requests, NO_STEP if step is None else step)
            return self._delivery(
                [(request.index, image, origin) for request, (image, origin) in zip(requests, images, strict=True)]
            )
        self._step = step
        self._ask_for_lost()
        ready = self._queue.take_ready(requests, step)
        slots = [self._slot(request, image, step) for request, image in zip(requests, ready, strict=True)]
        self._tell_of_late([origin for _, _, origin in slots])
        for request in requests:
            key = (request.source_id, request.index)
            if key in self._relied and self._relied[key][0] <= step:
                del self._relied[key]
        return self._delivery(slots)

    @property
    def parameters(self) -> Parameters:
        """Every parameter of the variants that this source asks for."""
        assert self.generator is not None
        return merge(self.generator.default_parameters, self._parameters)

    @property
    def wants_refresh(self) -> bool:
        """Says whether there is a pool to fill and nothing of the plan, or ahead of it, waits to be sent."""
        return self._pool is not None and self._queue.idle

    def refresh(self, requests: Sequence[VariantRequest]) -> list[VariantRequest]:
        """Asks, at low priority, for those variants that the pool does not have; returns them."""
        wanted = self._not_in_pool(requests)
        if self.lacking is not None:
            wanted = self.lacking(wanted)
        self._queue.refresh(wanted)
        return wanted

    def close(self) -> None:
        """Cancels what is under way, closes the channels and the pool."""
        self._queue.close(self._disconnect())
        if self._pool is not None:
            self._pool.close()

    def _slot(self, request: VariantRequest, image: Image | None, step: int) -> tuple[int, UInt8Array | None, Origin]:
        if image is not None:
            if self._pool is not None:
                self._pool.used_fresh(request.source_id, request.index)
            return request.index, *image
        chosen = self._pool.choose(request.source_id, request.index, step) if self._pool is not None else None
        if chosen is None:
            return REAL, None, "real"
        index, pixels = chosen
        return index, pixels, "store" if index == request.index else "reused"

    def _tell_of_late(self, origins: Sequence[Origin]) -> None:
        """Logs, now and then, that a step goes on without a server; that one is slow is what the ledger tells."""
        late = sum(origin in ("real", "reused") for origin in origins)
        if late and self._client is not None and not self._client.reachable:
            self._fallbacks.fell_back(late, self._state())
        elif len(origins) > late:
            self._fallbacks.came()

    def _delivery(self, slots: Sequence[tuple[int, UInt8Array | None, Origin]]) -> Delivery:
        images = [image for _, image, _ in slots if image is not None]
        size = self.image_size
        return Delivery(
            images=np.stack(images) if images else np.zeros((0, 3, size, size), np.uint8),
            origins=[origin for _, _, origin in slots],
            indices=[index for index, _, _ in slots],
        )

    def _rely_on_pool(self, requests: Sequence[VariantRequest], step: int) -> list[VariantRequest]:
        """Returns what the pool does not hold; what it does becomes its newest, to be there when the step comes."""
        if self._pool is None:
            return list(requests)
        held = self._pool.keep([(request.source_id, request.index) for request in requests])
        for request, is_held in zip(requests, held, strict=True):
            if is_held:
                self._relied[request.source_id, request.index] = (step, request)
        return [request for request, is_held in zip(requests, held, strict=True) if not is_held]

    def _ask_for_lost(self) -> None:
        """Asks for what a coming step left to the pool and the pool, too small for all of them, has dropped."""
        for key in self._pool.lost() if self._pool is not None else []:
            step, request = self._relied.pop(key, (self._step, None))
            if request is not None and step > self._step:
                self._queue.announce([request], step)

    def _not_in_pool(self, requests: Sequence[VariantRequest]) -> list[VariantRequest]:
        if self._pool is None:
            return list(requests)
        return [request for request in requests if not self._pool.holds(request.source_id, request.index)]

    def _keep(self, requests: Sequence[VariantRequest], images: Sequence[Image]) -> None:
        assert self._pool is not None
        self._pool.add_many(
            [(request.source_id, request.index) for request in requests], [image for image, _ in images], self._step
        )

    def _state(self) -> str:
        return self._client.state() if self._client is not None else f"{', '.join(self._targets)} was never reached"

    async def _connect(self) -> None:
        self._client = AsyncVariantClient(
            self._targets,
            client_id=self._client_id,
            token=self._token,
            tls=self._tls,
            max_in_flight=self._config.max_in_flight + BULK_IN_FLIGHT,
            advice=RECIPE_ADVICE,
        )
        await self._client.connect()
        self.generator = await self._client.find_generator(self._generator_id)
        # A server refuses a parameter that its generator does not have; a recipe's block may have other numbers too.
        known = self.generator.default_parameters
        self._parameters = {name: value for name, value in self._parameters.items() if is_known(name, known)}
        self.image_size = int(self._parameters.get("output_size", self.generator.image_size))
        self._queue.rows_per_request = min(self._config.rows_per_request, self._client.most_rows(self.image_size))

    async def _disconnect(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def _fetch(self, requests: Sequence[VariantRequest], priority: Priority | None = None) -> list[Image]:
        assert self._client is not None
        assert self.generator is not None
        answer = await self._client.generate(
            self.generator, requests, self._dataset.stored, self._parameters, priority=priority or self._priority
        )
        self._ledger.calls += answer.calls
        self._ledger.retries += answer.retries
        if answer.refusals:
            self._ledger.retries_by_kind["full"] += answer.refusals
        if answer.retries > answer.refusals:
            self._ledger.retries_by_kind["away"] += answer.retries - answer.refusals
        self._ledger.variants_computed += sum(origin == "generated" for _, origin in answer.images)
        self._ledger.bytes_received += answer.bytes_received
        self._ledger.generator_seconds += answer.generator_seconds
        if self.received is not None:
            await asyncio.to_thread(self.received, requests, answer.images)
        return answer.images

    async def _fetch_bulk(self, requests: Sequence[VariantRequest]) -> list[Image]:
        return await self._fetch(requests, "bulk")
