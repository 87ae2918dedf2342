"""Pictures of sources beside their views and variants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from genssl.base.devices import stream
from genssl.config.recipe import Recipe
from genssl.data.base import ImageDataset
from genssl.quality.grid import Column, write_grid
from genssl.variants.plan import ViewPlan, fresh_indices, variant_columns
from genssl.variants.source import VariantRequest, VariantSource
from genssl.views.augmentations import Augmentations

ROWS, VIEW_COLUMNS, VARIANT_COLUMNS = 8, 3, 6


def draw_run_samples(
    path: Path,
    recipe: Recipe,
    dataset: ImageDataset,
    plan: ViewPlan,
    source: VariantSource | None,
    augmentations: Augmentations,
    count: int = ROWS,
) -> None:
    """Draws `count` sources of the first batch, standard views, and the first variants that a run of the recipe uses.

    Without a source of variants only views are drawn.
    """
    rows = [int(row) for row in plan.step(0, 0).rows[:count]]
    columns = sources_and_views(recipe, dataset, rows, augmentations, VIEW_COLUMNS)
    sources = columns[0][1]
    if source is not None:
        indices = variant_indices(recipe, VARIANT_COLUMNS)
        requests = [VariantRequest(row, dataset.source_id(row), index) for index in indices for row in rows]
        source.announce(requests)
        delivery = source.take(requests)
        taken = iter(delivery.images)
        images = [
            sources[slot % len(rows)] if origin == "real" else next(taken)
            for slot, origin in enumerate(delivery.origins)
        ]
        for number in range(len(indices)):
            columns.append((f"variant {number + 1}", images[number * len(rows) : (number + 1) * len(rows)]))
    if recipe.uses_variants() and recipe.generator is not None:
        made_by = f"{recipe.generator.name} {getattr(recipe.generator, 'model', '')}"
        title = f"{recipe.name}: sources, standard views, and variants by {made_by}"
    else:
        title = f"{recipe.name}: sources and their standard views (no variants)"
    write_grid(path, columns, title)


def sources_and_views(
    recipe: Recipe, dataset: ImageDataset, rows: Sequence[int], augmentations: Augmentations, views: int
) -> list[Column]:
    """Returns the columns of the sources, and of so many standard views of them."""
    sources = np.stack([dataset.image(row) for row in rows])
    pixels = torch.from_numpy(sources).float() / 255
    columns: list[Column] = [("source", list(sources))]
    for number in range(views):
        made = augmentations.real(number)(pixels, stream("samples", recipe.seed, number))
        columns.append((f"view {number + 1}", list((made * 255).round().to(torch.uint8).numpy())))
    return columns


def variant_indices(recipe: Recipe, count: int) -> list[int]:
    """Returns the first indices of a source that the recipe's runs use."""
    if recipe.variants.per_image != "fresh":
        return list(range(min(count, recipe.variants.per_image)))
    columns, variant = variant_columns(recipe.views.policy, recipe.views.third_count)
    last = variant[-1] if variant else columns - 1
    return [int(fresh_indices(recipe.seed, epoch, columns)[last]) for epoch in range(count)]
