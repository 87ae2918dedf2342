"""Source embeddings on a server: each computed once, those of all clients together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from genssl.data.base import UInt8Array
from genssl.generators.finite import NotFiniteError
from genssl.server.batching.jobs import GenerationFailedError
from genssl.server.batching.schedule import Schedule, Submitter, Waiting
from genssl.variants.engine import EmbeddingCache, VariantEngine

log = logging.getLogger(__name__)

ANY = "sources"  # the key of all sources: any of them can share a batch


@dataclass(slots=True, eq=False, kw_only=True)
class _Source(Waiting):
    """One source to embed, and how many calls want it."""

    source_id: bytes
    image: UInt8Array
    answer: asyncio.Future[torch.Tensor | GenerationFailedError]
    waiters: int = 0
    seconds: float = 0.0
    failed: bool = False  # with others, of which each is tried again
    reason: str = "the conditioner failed on this source; see the server's log"


class EmbedListener(Protocol):
    """Is told by an embedder, on its event loop, what happens."""

    def sources_embedded(self, sources: int, seconds: float) -> None:
        """Follows each batch, with the device's seconds."""
        ...

    def embedding_reused(self) -> None:
        """Says that an embedding was asked for that was known, or was about to be computed for another call."""
        ...


class Embedder:
    """Computes and keeps embeddings of one generator. Lives on one event loop.

    Args:
        engine: has the conditioner.
        device: the one-thread executor that owns the device.
        capacity: how many embeddings are kept.
        listener: is told what happens.
        ageing_seconds: a waiting source rises by one class each time this has passed.
    """

    def __init__(
        self,
        engine: VariantEngine,
        device: Executor,
        capacity: int,
        listener: EmbedListener,
        *,
        ageing_seconds: float = 10.0,
    ) -> None:
        self._engine, self._device, self._listener = engine, device, listener
        self._cache = EmbeddingCache(capacity, engine.kept)
        self._waiting: dict[bytes, _Source] = {}
        self._schedule: Schedule[_Source] = Schedule(ageing_seconds)
        self._taken: dict[bytes, _Source] = {}  # in the batch that runs, or in a part of one that failed
        self._retries: deque[list[_Source]] = deque()  # parts of batches that failed
        self._largest = engine.buckets[-1]  # less after the device ran out of memory
        self._worker: asyncio.Task[None] | None = None
        self._closed = False

    def get(self, source_id: bytes) -> torch.Tensor | None:
        """Returns the embedding float32 [D] if it is known."""
        known = self._cache.get(source_id)
        if known is not None:
            self._listener.embedding_reused()
        return known

    async def embed(
        self, images: Mapping[bytes, UInt8Array], submitter: Submitter
    ) -> tuple[dict[bytes, torch.Tensor | GenerationFailedError], float]:
        """Embeds preprocessed sources uint8 [3, S, S] by their ids, in the order of a `Schedule`.

        A source wanted by several takes the turn of the most urgent one. If the caller is cancelled, sources that
        nobody else waits for and that are not on the device yet are dropped.

        Returns:
            Of each source its embedding float32 [D], or why there is none. And the share of the device's seconds of
            those that this call was the first to ask for.
        """
        if self._closed:
            return dict.fromkeys(images, GenerationFailedError("the server is stopping")), 0.0
        loop = asyncio.get_running_loop()
        found: dict[bytes, torch.Tensor | GenerationFailedError] = {}
        sources: list[_Source] = []
        own: list[_Source] = []
        for source_id, image in images.items():
            known = self.get(source_id)  # it may have become known while the caller decoded its image
            if known is not None:
                found[source_id] = known
                continue
            source = self._waiting.get(source_id) or self._taken.get(source_id)
            if source is None:
                answer = loop.create_future()
                source = _Source(key=ANY, submitter=submitter, source_id=source_id, image=image, answer=answer)
                self._waiting[source_id] = source
                self._schedule.add(source, time.monotonic())
                own.append(source)
            else:
                self._listener.embedding_reused()
                if source.lane is not None and submitter.priority < source.submitter.priority:
                    self._schedule.pass_on(source, submitter, time.monotonic())
            source.waiters += 1
            sources.append(source)
        if self._waiting and self._worker is None:
            self._worker = loop.create_task(self._work())
        try:
            if sources:
                await asyncio.wait([source.answer for source in sources])  # which leaves them be when it is cancelled
        finally:
            for source in sources:
                source.waiters -= 1
                if source.waiters == 0 and self._waiting.get(source.source_id) is source:
                    del self._waiting[source.source_id]
                    self._schedule.discard(source)
        found.update((source.source_id, source.answer.result()) for source in sources)
        return found, sum(source.seconds for source in own)

    async def close(self) -> None:
        """Fails what waits."""
        self._closed = True
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        self._fail([*self._waiting.values(), *self._taken.values()], "the server is stopping")

    async def _work(self) -> None:
        try:
            while batch := self._next():
                await self._run(batch)
        except Exception:  # nobody reads this task's result: what ended here would leave its sources without an answer
            log.exception("the embedder failed")
            self._retries.clear()
            message = "the server failed on this source; see its log"
            self._fail([*self._waiting.values(), *self._taken.values()], message)
        finally:
            self._worker = None

    def _next(self) -> list[_Source]:
        """Takes out the sources that go next; none if nobody waits."""
        while self._retries:
            part = self._retries.popleft()
            for source in part:
                if not source.waiters:
                    del self._taken[source.source_id]
            if wanted := [source for source in part if source.waiters]:
                return wanted
        if self._schedule.next_key(time.monotonic()) is None:
            return []
        batch = self._schedule.take(ANY, self._largest)
        for source in batch:
            self._taken[source.source_id] = self._waiting.pop(source.source_id)
        return batch

    async def _run(self, batch: list[_Source]) -> None:
        loop = asyncio.get_running_loop()
        outcome = await loop.run_in_executor(self._device, self._compute, batch)
        if isinstance(outcome, tuple):
            embeddings, seconds = outcome
            for source, embedding in zip(batch, embeddings, strict=True):
                del self._taken[source.source_id]
                self._cache.put(source.source_id, embedding)
                source.seconds = seconds / len(batch)
                source.answer.set_result(embedding)
            self._schedule.charge(batch, seconds / len(batch))
            self._listener.sources_embedded(len(batch), seconds)
        elif outcome == "memory":
            self._shrink(batch)
        elif len(batch) > 1:
            # Halves, not single sources: a bad one among 64 is found in 12 small batches.
            self._split(batch, (len(batch) + 1) // 2)
        else:
            self._fail(batch, batch[0].reason)

    def _shrink(self, batch: list[_Source]) -> None:
        """Lowers the largest bucket after the device ran out of memory."""
        bucket = next(size for size in self._engine.buckets if size >= len(batch))
        smaller = [size for size in self._engine.buckets if size < bucket]
        if not smaller:
            self._fail(
                batch,
                f"the device ran out of memory on {bucket} sources at once, and deterministic batching cannot take "
                "fewer; lower the largest of `buckets` in the server's file"
                if self._engine.deterministic
                else f"the device ran out of memory on {bucket} sources at once, which is the least that it may take; "
                "lower the smallest of `buckets` in the server's file",
            )
            return
        self._largest = min(self._largest, smaller[-1])
        log.warning("at most %d sources are embedded at once from now on", self._largest)
        self._split(batch, self._largest)

    def _split(self, batch: list[_Source], most: int) -> None:
        self._retries.extendleft(reversed([batch[start : start + most] for start in range(0, len(batch), most)]))

    def _fail(self, sources: list[_Source], message: str) -> None:
        for source in sources:
            self._waiting.pop(source.source_id, None)
            if source.lane is not None:
                self._schedule.discard(source)
            self._taken.pop(source.source_id, None)
            source.answer.set_result(GenerationFailedError(message))

    def _compute(self, batch: list[_Source]) -> tuple[list[torch.Tensor], float] | Literal["memory", "failed"]:
        """Returns the embeddings and the device's seconds, or why there are none. On the device's thread."""
        images = [source.image for source in batch]
        try:
            embeddings, seconds = self._engine.embed(images, [source.source_id for source in batch])
            if len(embeddings) != len(images):
                raise RuntimeError(f"the conditioner made {len(embeddings)} embeddings of {len(images)} sources")
            return embeddings, seconds
        except torch.OutOfMemoryError as error:
            log.warning("%d sources at once do not fit into memory: %s", len(images), error)
        except Exception as error:
            # One traceback a batch, and of what it is split into a line each.
            again = batch[0].failed
            what = "again, embedding %d sources failed: %r" if again else "embedding %d sources failed: %r"
            log.error(what, len(images), error, exc_info=not again)
            for source in batch:
                source.failed = True
                if len(batch) == 1 and isinstance(error, NotFiniteError):  # others may name paths here
                    source.reason = str(error)
            return "failed"
        torch.cuda.empty_cache()  # outside of the handlers: the exception held on to the device's memory
        return "memory"
