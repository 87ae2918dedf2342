"""The remote source: variants from generation servers, through the prefetch queue that it owns."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from genssl.client.aio import AsyncVariantClient
from genssl.client.breaker import FallbackLog
from genssl.client.messages import Priority
from genssl.client.server_state import RECIPE_ADVICE
from genssl.config.recipe import ClientTLSConfig, VariantsConfig
from genssl.data.base import ImageDataset
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generators.parameters import Parameters, is_known, merge
from genssl.variants.ledger import Ledger
from genssl.variants.prefetch.lateness import Lateness, VariantLimit
from genssl.variants.prefetch.pool import VariantPool
from genssl.variants.prefetch.queue import BULK_IN_FLIGHT, PrefetchQueue
from genssl.variants.source import Delivery, Image, Slot, VariantRequest
from genssl.variants.store.source import StoredVariants, StoreFetcher

log = logging.getLogger(__name__)

NO_STEP = sys.maxsize  # what is taken without a step is announced for a time that never passes


class ServerFetcher:
    """Fetches variants from servers and enters what that costs in the ledger; the arguments are `RemoteSource`'s."""

    def __init__(
        self,
        open_client: Callable[[], AsyncVariantClient],
        *,
        targets: Sequence[str],
        parameters: Parameters,
        dataset: ImageDataset,
        ledger: Ledger,
        check: Callable[[], None],
        priority: Priority,
    ) -> None:
        self.check, self.parameters = check, parameters
        self._open_client, self._targets = open_client, targets
        self._dataset, self._ledger, self._priority = dataset, ledger, priority
        self._client: AsyncVariantClient | None = None
        self.generator: pb.GeneratorInfo | None = None

    async def connect(self, generator_id: str) -> None:
        """Opens the client and finds the generator."""
        self._client = self._open_client()
        await self._client.connect()
        self.generator = await self._client.find_generator(generator_id)
        # A server refuses a parameter that its generator does not have; a recipe's block may have other numbers too.
        known = self.generator.default_parameters
        self.parameters = {name: value for name, value in self.parameters.items() if is_known(name, known)}

    async def close(self) -> None:
        """Closes the channels."""
        if self._client is not None:
            await self._client.close()

    def look(self, requests: Sequence[VariantRequest]) -> list[Image | None]:
        """Returns that nothing is at hand."""
        return [None] * len(requests)

    async def fetch(self, requests: Sequence[VariantRequest], *, ahead: bool = False) -> list[Image]:
        """Fetches variants; `ahead` of the plan with the priority "bulk"."""
        assert self._client is not None
        assert self.generator is not None
        answer = await self._client.generate(
            self.generator,
            requests,
            self._dataset.stored,
            self.parameters,
            priority="bulk" if ahead else self._priority,
        )
        ledger = self._ledger
        ledger.calls += answer.calls
        ledger.retries += answer.retries
        if answer.refusals:
            ledger.retries_by_kind["full"] += answer.refusals
        if answer.retries > answer.refusals:
            ledger.retries_by_kind["away"] += answer.retries - answer.refusals
        ledger.variants_computed += sum(origin == "generated" for _, origin in answer.images)
        ledger.bytes_received += answer.bytes_received
        ledger.generator_seconds += answer.generator_seconds
        return answer.images

    def describe(self) -> str:
        """Says how the servers are doing and what to do about it."""
        return self._client.state() if self._client is not None else f"{', '.join(self._targets)} was never reached"

    def most_rows(self, image_size: int) -> int:
        """Returns how many variants of this size (pixels) one request can bring."""
        assert self._client is not None
        return self._client.most_rows(image_size)

    @property
    def reachable(self) -> bool:
        """Says, without waiting, whether a request may be answered now."""
        return self._client is None or self._client.reachable


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
        limit: which of the planned variants are asked for; None: all that the pool lacks.
        token: the bearer token that the servers want.
        tls: how the servers are checked.
        check: raises when the server is known to be gone for good.
        client_id: names this source in the servers' logs and fair shares.
        priority: of what is planned.

    Attributes:
        image_size: side of its variants in pixels.
        announced: the last step that was announced; -1 before the first.

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
        limit: VariantLimit | None = None,
        token: str | None = None,
        tls: ClientTLSConfig | None = None,
        check: Callable[[], None] = lambda: None,
        client_id: str = "genssl run",
        priority: Priority = "training",
    ) -> None:
        def open_client() -> AsyncVariantClient:
            most = config.max_in_flight + BULK_IN_FLIGHT
            return AsyncVariantClient(
                targets, client_id=client_id, token=token, tls=tls, max_in_flight=most, advice=RECIPE_ADVICE
            )

        self._servers = ServerFetcher(
            open_client,
            targets=targets,
            parameters=parameters,
            dataset=dataset,
            ledger=ledger,
            check=check,
            priority=priority,
        )
        self._lateness = Lateness(config.late, pool, limit)
        self._queue = PrefetchQueue(
            self._servers,
            rows_per_request=config.rows_per_request,
            max_in_flight=config.max_in_flight * len(targets),
            deadline_seconds=config.deadline_seconds,
            newest_first=not self._lateness.waits,
            ledger=ledger,
            pool=pool,
        )
        self.announced, self.image_size = -1, 0
        self._at_hand: dict[int, list[Image | None]] = {}  # by announced step, what needed no fetching
        self._stored: StoredVariants | None = None
        self._fallbacks = FallbackLog(log)
        try:
            self._queue.run_first(self._servers.connect(generator_id))
            self.image_size = int(self.parameters.get("output_size", self.generator.image_size))
            self._queue.rows_per_request = min(config.rows_per_request, self._servers.most_rows(self.image_size))
            if pool is not None:
                pool.check(3 * self.image_size**2)
        except BaseException:
            self.close()
            raise

    @property
    def generator(self) -> pb.GeneratorInfo:
        """The generator as the servers describe it."""
        assert self._servers.generator is not None
        return self._servers.generator

    @property
    def parameters(self) -> Parameters:
        """Every parameter of the variants that this source asks for."""
        return merge(self.generator.default_parameters, self._servers.parameters)

    def with_store(self, stored: StoredVariants) -> None:
        """Lays a store inside the fetch, before anything is announced; it belongs to this source from now on."""
        self._stored = stored
        self._queue.fetcher = StoreFetcher(stored, self._servers)

    def announce(self, requests: Sequence[VariantRequest], step: int | None = None) -> None:
        """Starts asking for the variants of a coming step that are not at hand, and that the pool does not have."""
        if step is None:
            self._queue.announce(_absent(requests, self._queue.fetcher.look(requests)), NO_STEP)
            return
        self.announced = step
        if not requests:
            return
        self._at_hand[step] = self._queue.fetcher.look(requests)
        self._queue.announce(self._lateness.to_ask(_absent(requests, self._at_hand[step]), step), step)

    def take(self, requests: Sequence[VariantRequest], step: int | None = None) -> Delivery:
        """Returns what a step gets: under `late: block` what was planned, waiting for it; else what there is.

        A variant that is late is replaced by another of the same source from the pool (`reused`), and by the source
        itself (`real`) where there is none or `late` is `real`.
        """
        at_hand = self._at_hand.pop(step, None) if step is not None else None
        if at_hand is None:
            at_hand = self._queue.fetcher.look(requests)
        wanted = _absent(requests, at_hand)
        if step is None or self._lateness.waits:
            fetched = self._queue.take(wanted, NO_STEP if step is None else step)
            slots: list[Slot] = [(request.index, *image) for request, image in zip(wanted, fetched, strict=True)]
        else:
            self._queue.step = step
            for later, request in self._lateness.lost(step):
                self._queue.announce([request], later)
            ready, dropped = self._queue.take_ready(wanted, step)
            self._lateness.never_asked(dropped)
            slots = self._lateness.fill(wanted, ready, step)
            self._tell_of_late(slots)
        others = iter(slots)
        return Delivery.of(
            [
                (request.index, *image) if image is not None else next(others)
                for request, image in zip(requests, at_hand, strict=True)
            ]
        )

    @property
    def wants_refresh(self) -> bool:
        """Says whether there is a pool to fill and nothing of the plan, or ahead of it, waits to be sent."""
        return self._lateness.pool is not None and self._queue.idle

    def refresh(self, requests: Sequence[VariantRequest]) -> list[VariantRequest]:
        """Asks, at low priority, for those variants that neither the pool has nor are at hand; returns them."""
        wanted = [request for request in requests if self._lateness.lacks(request)]
        wanted = _absent(wanted, self._queue.fetcher.look(wanted))
        self._queue.refresh(wanted)
        return wanted

    def close(self) -> None:
        """Cancels what is under way, closes the channels, the pool and the store."""
        self._at_hand.clear()
        self._queue.close(self._servers.close())
        if self._lateness.pool is not None:
            self._lateness.pool.close()
        if self._stored is not None:
            self._stored.close()

    def _tell_of_late(self, slots: Sequence[Slot]) -> None:
        """Logs, now and then, that a step goes on without a server; that one is slow is what the ledger tells."""
        late = sum(origin in ("real", "reused") for _, _, origin in slots)
        if late and not self._servers.reachable:
            self._fallbacks.fell_back(late, self._servers.describe())
        elif len(slots) > late:
            self._fallbacks.came()


def _absent(requests: Sequence[VariantRequest], images: Sequence[Image | None]) -> list[VariantRequest]:
    return [request for request, image in zip(requests, images, strict=True) if image is None]
