"""Where a training loop gets variants from: the contract, and the in-process source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from genssl.data.base import ImageDataset, UInt8Array
from genssl.data.decode import decode
from genssl.generators.base import Parameters
from genssl.variants.engine import EmbeddingCache, Row, VariantEngine
from genssl.variants.ledger import Ledger, Origin


@dataclass(frozen=True)
class VariantRequest:
    """One variant that a step wants: variant `index` of the image in row `row` of the data set."""

    row: int
    source_id: bytes
    index: int


@dataclass
class Delivery:
    """What a step gets: uint8 [N, 3, h, w] in the order of the requests, and where each image came from."""

    images: UInt8Array
    origins: list[Origin]


class VariantSource(Protocol):
    """In-process, stored and remote sources are interchangeable: the same requests give the same images."""

    def plan(self, requests: Sequence[VariantRequest]) -> None:
        """Announces what a coming step will take; returns at once."""
        ...

    def take(self, requests: Sequence[VariantRequest]) -> Delivery:
        """Returns what an announced step wants, waiting for it if it must.

        Raises:
            ServerUnavailableError: if it cannot be had in time.
            RequestRefusedError: if the generator refuses.
        """
        ...

    def close(self) -> None:
        """Drops what was announced and not taken, and frees everything."""
        ...


class InProcessSource:
    """Generates in the trainer's process when a step takes its variants; nothing happens ahead of time.

    Args:
        engine: makes the variants.
        dataset: has the sources.
        ledger: gets calls and generator seconds.
        parameters: on top of the generator's defaults.
        cached_embeddings: source embeddings kept in memory.
    """

    def __init__(
        self,
        engine: VariantEngine,
        dataset: ImageDataset,
        ledger: Ledger,
        parameters: Parameters | None = None,
        cached_embeddings: int = 100_000,
    ) -> None:
        self._engine, self._dataset, self._ledger = engine, dataset, ledger
        self._parameters = engine.complete(parameters or {})
        self._embeddings = EmbeddingCache(cached_embeddings)

    def plan(self, requests: Sequence[VariantRequest]) -> None:
        """Does nothing: the device that would generate is the one that trains."""

    def take(self, requests: Sequence[VariantRequest]) -> Delivery:
        """Generates the variants now, in batches of the largest bucket."""
        known = {request.source_id: self._embeddings.get(request.source_id) for request in requests}
        missing = {request.source_id: request.row for request in requests if known[request.source_id] is None}
        preprocess = self._engine.generator.preprocess
        fresh, seconds = self._engine.embed([preprocess(decode(self._dataset.stored(row))) for row in missing.values()])
        self._ledger.generator_seconds += seconds
        for source_id, embedding in zip(missing, fresh, strict=True):
            known[source_id] = embedding
            self._embeddings.put(source_id, embedding)
        rows = []
        for request in requests:
            vector = known[request.source_id]
            assert vector is not None
            rows.append(Row(request.source_id, vector, request.index, self._parameters))
        parts = []
        for start in range(0, len(rows), self._engine.buckets[-1]):
            images, seconds = self._engine.generate(rows[start : start + self._engine.buckets[-1]])
            self._ledger.generator_seconds += seconds
            self._ledger.calls += 1
            parts.append(images)
        return Delivery(images=np.concatenate(parts), origins=["generated"] * len(rows))

    def close(self) -> None:
        """Nothing is held."""
