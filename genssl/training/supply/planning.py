"""What the steps of a run hold, and how far ahead it asks for their variants."""

from __future__ import annotations

from genssl.base.ranks import ALONE, Ranks
from genssl.client.source import RemoteSource
from genssl.config.recipe import Recipe
from genssl.data.base import ImageDataset
from genssl.variants.ledger import Ledger
from genssl.variants.plan import ViewPlan
from genssl.variants.prefetch.depth import PrefetchDepth, bytes_per_step
from genssl.variants.prefetch.refresh import Refresher


def view_plan(recipe: Recipe, num_sources: int, ranks: Ranks = ALONE) -> ViewPlan:
    """Returns the plan of a run, or of one rank of it."""
    return ViewPlan(
        seed=recipe.seed,
        num_sources=num_sources,
        batch_size=recipe.train.batch_size,
        policy=recipe.views.policy if recipe.uses_variants() else "none",
        probability=recipe.variant_probability(),
        per_image=recipe.variants.per_image,
        third_count=recipe.views.third_count,
        rank=ranks.rank,
        world_size=ranks.size,
    )


def prefetch_depth(recipe: Recipe, remote: RemoteSource | None, ledger: Ledger, ranks: Ranks = ALONE) -> PrefetchDepth:
    """Returns how many steps ahead a rank asks for variants."""
    size = remote.image_size if remote is not None else 0
    views, probability = recipe.views.variant_slots, recipe.variant_probability()
    return PrefetchDepth(
        recipe.variants.prefetch_steps,
        bytes_per_step=bytes_per_step(recipe.train.batch_size // ranks.size, views, probability, size),
        max_bytes=recipe.variants.prefetch_bytes,
        ledger=ledger,
    )


def build_refresher(
    recipe: Recipe, dataset: ImageDataset, remote: RemoteSource | None, ranks: Ranks = ALONE
) -> Refresher | None:
    """Returns what generates ahead of the plan, if the recipe asks for it and there is a pool to put it."""
    if recipe.variants.refresh is None or remote is None:
        return None
    plan = view_plan(recipe, len(dataset), ranks)
    return Refresher(plan, recipe.train.epochs, dataset, remote, recipe.variants.refresh.budget)
