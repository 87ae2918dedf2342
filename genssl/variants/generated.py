"""A recipe's generator in this process, and its variants of any images, for evaluators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from genssl.config.recipe import Recipe
from genssl.data.base import ImageDataset, UInt8Array
from genssl.data.decode import resize_and_crop
from genssl.generators.open import open_generator
from genssl.variants.engine import VariantEngine
from genssl.variants.in_process import InProcessSource
from genssl.variants.ledger import Ledger
from genssl.variants.source import VariantRequest
from genssl.variants.store.facts import known_fingerprints


def load_engine(recipe: Recipe, device: torch.device, known: Sequence[str] = ()) -> VariantEngine:
    """Loads the recipe's generator into this process; raises GeneratorError if it cannot be had.

    Args:
        recipe: has the generator.
        device: where it runs.
        known: fingerprints in hexadecimal, in place of those of the recipe's store; see `open_generator`.
    """
    assert recipe.generator is not None, "there is a generator where there are variants"
    generator = open_generator(recipe.generator, device, known or known_fingerprints(recipe))
    return VariantEngine(generator, recipe.variants.buckets, deterministic=recipe.variants.batching == "deterministic")


class GeneratedVariants:
    """Makes variants with a run's generator, which is loaded when the first are asked for.

    Args:
        recipe: of the run; has a generator.
        device: where it generates.
    """

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
