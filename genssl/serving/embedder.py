"""Source embeddings on a server: each computed once, those of all clients together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Executor

import torch

from genssl.data.base import UInt8Array
from genssl.variants.engine import EmbeddingCache, VariantEngine


class Embedder:
    """Computes and keeps embeddings of one generator. Lives on one event loop.

    Args:
        engine: has the conditioner.
        device: the one-thread executor that owns the device.
        capacity: how many embeddings are kept.
        on_embedded: told how many sources a batch had, and the device's seconds.
    """

    def __init__(
        self, engine: VariantEngine, device: Executor, capacity: int, on_embedded: Callable[[int, float], None]
    ) -> None:
        self._engine, self._device, self._on_embedded = engine, device, on_embedded
        self._cache = EmbeddingCache(capacity)
        self._waiting: dict[bytes, tuple[UInt8Array, asyncio.Future[torch.Tensor]]] = {}
        self._running: dict[bytes, asyncio.Future[torch.Tensor]] = {}
        self._worker: asyncio.Task[None] | None = None
        self._seconds_each = 0.0

    def get(self, source_id: bytes) -> torch.Tensor | None:
        """Returns the embedding float32 [D] if it is known."""
        return self._cache.get(source_id)

    async def embed(
        self, images: Mapping[bytes, UInt8Array]
    ) -> tuple[dict[bytes, torch.Tensor | BaseException], float]:
        """Returns the embedding of each preprocessed source uint8 [3, S, S], or the conditioner's exception.

        And the device's seconds for as many sources, at the rate of the last batch.
        """
        futures: dict[bytes, asyncio.Future[torch.Tensor]] = {}
        for source_id, image in images.items():
            under_way = self._waiting[source_id][1] if source_id in self._waiting else self._running.get(source_id)
            if under_way is None:
                under_way = asyncio.get_running_loop().create_future()
                self._waiting[source_id] = (image, under_way)
            futures[source_id] = under_way
        if self._waiting and self._worker is None:
            self._worker = asyncio.get_running_loop().create_task(self._work())
        # Shielded, since other requests may wait for the same futures when this one is cancelled.
        results = await asyncio.shield(asyncio.gather(*futures.values(), return_exceptions=True))
        return dict(zip(futures, results, strict=True)), self._seconds_each * len(futures)

    async def close(self) -> None:
        """Drops what waits."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        for _, future in self._waiting.values():
            future.cancel()
        for future in self._running.values():
            future.cancel()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                names = list(self._waiting)[: self._engine.buckets[-1]]
                images = [self._waiting[name][0] for name in names]
                self._running = {name: self._waiting.pop(name)[1] for name in names}
                try:
                    embeddings, seconds = await loop.run_in_executor(self._device, self._engine.embed, images)
                except Exception as error:
                    for future in self._running.values():
                        future.set_exception(error)
                        future.exception()  # read, so that nobody is told of it when every waiter has gone
                else:
                    self._on_embedded(len(names), seconds)
                    self._seconds_each = seconds / len(names)
                    for name, embedding in zip(names, embeddings, strict=True):
                        self._cache.put(name, embedding)
                        self._running[name].set_result(embedding)
                self._running = {}
        finally:
            self._worker = None
