"""Variants made in this process: by a run's steps when they take them, and of any images for evaluators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from genssl.config.recipe import Recipe
from genssl.data.base import ImageDataset, UInt8Array
from genssl.data.decode import decode, resize_and_crop
from genssl.generators.open import open_generator
from genssl.generators.parameters import Parameters
from genssl.variants.engine import EmbeddingCache, VariantEngine
from genssl.variants.ledger import Ledger
from genssl.variants.source import Delivery, VariantRequest
from genssl.variants.store.facts import known_fingerprints


class InProcessSource:
    """Generates in the trainer's process when a step takes its variants; nothing happens ahead of time.

    `parameters` come on top of the generator's defaults; the ledger gets calls, variants and generator seconds.
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


def load_engine(recipe: Recipe, device: torch.device, known: Sequence[str] = ()) -> VariantEngine:
    """Loads the recipe's generator into this process; raises GeneratorError if it cannot be had.

    `known` are fingerprints in hexadecimal, in place of those of the recipe's store; see `open_generator`.
    """
    assert recipe.generator is not None, "there is a generator where there are variants"
    generator = open_generator(recipe.generator, device, known or known_fingerprints(recipe))
    return VariantEngine(generator, recipe.variants.buckets, deterministic=recipe.variants.batching == "deterministic")


class GeneratedVariants:
    """Makes variants with a run's generator, which is loaded when the first are asked for."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._recipe, self._device = recipe, device
        self._engine: VariantEngine | None = None
        # By id, with the split beside its source: an id of one that is gone may be another's.
        self._sources: dict[int, tuple[ImageDataset, InProcessSource]] = {}

    def __call__(self, split: ImageDataset, rows: Sequence[int], index: int) -> UInt8Array:
        """Returns variant `index` of rows of a split, uint8 [n, 3, S, S] with the split's S."""
        if id(split) not in self._sources:
            self._sources[id(split)] = split, InProcessSource(self._loaded(), split, Ledger())
        source = self._sources[id(split)][1]
        requests = [VariantRequest(row, split.source_id(row), index) for row in rows]
        return np.stack([resize_and_crop(image, split.image_size) for image in source.take(requests).images])

    def _loaded(self) -> VariantEngine:
        if self._engine is None:
            self._engine = load_engine(self._recipe, self._device)
        return self._engine
