"""The remote source: variants from a generation server, through the prefetch queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from genssl.config.recipe import VariantsConfig
from genssl.data.base import ImageDataset
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generators.base import Parameters
from genssl.serving.client import GenerationClient
from genssl.variants.ledger import Ledger
from genssl.variants.prefetch import Image, PrefetchQueue
from genssl.variants.source import Delivery, VariantRequest


class RemoteSource:
    """Asks a server for the variants of coming steps while the current one trains.

    Args:
        address: of the server.
        generator_id: what the server calls the generator.
        parameters: on top of the server's defaults.
        dataset: has the sources.
        config: how far ahead, how many at once, how patient.
        ledger: gets calls, retries, bytes and generator seconds.
        check: raises when the server is known to be gone for good.

    Raises:
        ServerUnavailableError: if the server cannot be reached.
        RequestRefusedError: if it does not have the generator.
    """

    def __init__(
        self,
        *,
        address: str,
        generator_id: str,
        parameters: Parameters,
        dataset: ImageDataset,
        config: VariantsConfig,
        ledger: Ledger,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._address, self._generator_id, self._parameters = address, generator_id, parameters
        self._dataset, self._config, self._ledger = dataset, config, ledger
        self._client: GenerationClient | None = None
        self.generator: pb.GeneratorInfo | None = None
        self._queue = PrefetchQueue(
            self._fetch,
            rows_per_request=config.rows_per_request,
            max_in_flight=config.max_in_flight,
            deadline_seconds=config.deadline_seconds,
            check=check,
            describe=self._state,
            teardown=self._disconnect,
        )
        self._queue.run_first(self._connect())

    def plan(self, requests: Sequence[VariantRequest]) -> None:
        """Starts asking for the variants of a coming step."""
        self._queue.plan(requests)

    def take(self, requests: Sequence[VariantRequest]) -> Delivery:
        """Returns announced variants, waiting for those still under way."""
        return self._queue.take(requests)

    def close(self) -> None:
        """Cancels what is under way and closes the channel."""
        self._queue.close()

    def _state(self) -> str:
        return self._client.state() if self._client is not None else f"{self._address} was never reached"

    async def _connect(self) -> None:
        self._client = GenerationClient(self._address, client_id="genssl run")
        await self._client.connect()
        self.generator = await self._client.find_generator(self._generator_id)
        # A server refuses a parameter that its generator does not have; a recipe's block may have other numbers too.
        known = self.generator.default_parameters
        self._parameters = {name: value for name, value in self._parameters.items() if name in known}
        size = int(self._parameters.get("output_size", self.generator.image_size))
        self._queue.rows_per_request = min(self._config.rows_per_request, self._client.most_rows(size))

    async def _disconnect(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def _fetch(self, requests: Sequence[VariantRequest]) -> list[Image]:
        assert self._client is not None
        assert self.generator is not None
        answer = await self._client.generate(self.generator, requests, self._dataset.stored, self._parameters)
        self._ledger.calls += answer.calls
        self._ledger.retries += answer.retries
        self._ledger.bytes_received += answer.bytes_received
        self._ledger.generator_seconds += answer.generator_seconds
        return answer.images
