"""The in-process source: generates in the trainer's process, when a step takes its variants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genssl.data.base import ImageDataset, UInt8Array
from genssl.data.decode import decode
from genssl.generators.parameters import Parameters
from genssl.variants.engine import EmbeddingCache, VariantEngine
from genssl.variants.ledger import Ledger
from genssl.variants.source import Delivery, VariantRequest


class InProcessSource:
    """Generates in the trainer's process when a step takes its variants; nothing happens ahead of time.

    Args:
        engine: makes the variants.
        dataset: has the sources.
        ledger: gets calls, variants and generator seconds.
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
        self._settings = engine.complete(parameters or {})
        self._embeddings = EmbeddingCache(cached_embeddings, engine.kept)

    def announce(self, requests: Sequence[VariantRequest], step: int | None = None) -> None:
        """Does nothing: the device that would generate is the one that trains."""

    def take(self, requests: Sequence[VariantRequest], step: int | None = None) -> Delivery:
        """Generates the variants now, in batches of the largest bucket."""
        known = {request.source_id: self._embeddings.get(request.source_id) for request in requests}
        missing = {request.source_id: request.row for request in requests if known[request.source_id] is None}
        preprocess = self._engine.generator.preprocess
        images = [preprocess(decode(self._dataset.stored(row))) for row in missing.values()]
        fresh, seconds = self._engine.embed(images, list(missing))
        self._ledger.generator_seconds += seconds
        for source_id, embedding in zip(missing, fresh, strict=True):
            known[source_id] = embedding
            self._embeddings.put(source_id, embedding)
        rows = []
        for request in requests:
            vector = known[request.source_id]
            assert vector is not None
            rows.append(self._engine.row(request.source_id, vector, request.index, self._settings))
        by_position: dict[int, UInt8Array] = {}
        redrawn = self._engine.redrawn
        for positions in self._engine.batches(rows):
            made, seconds = self._engine.generate([rows[position] for position in positions])
            self._ledger.generator_seconds += seconds
            self._ledger.calls += 1
            self._ledger.variants_computed += len(made)
            by_position.update(zip(positions, made, strict=True))
        self._ledger.variants_redrawn += self._engine.redrawn - redrawn
        indices = [request.index for request in requests]
        return Delivery(
            images=np.stack([by_position[position] for position in range(len(rows))]),
            origins=["generated"] * len(rows),
            indices=indices,
        )

    def close(self) -> None:
        """Nothing is held."""
