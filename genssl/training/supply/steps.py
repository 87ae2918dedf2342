"""A run's steps: their plan, how far ahead their variants are announced, and what is noted of what they get."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from genssl.base.ranks import ALONE, Ranks
from genssl.base.wording import counted
from genssl.client.source import RemoteSource
from genssl.config.recipe import Recipe, VariantsConfig
from genssl.data.base import ImageDataset
from genssl.data.load import dataset_digest
from genssl.errors import UserError
from genssl.training.progress import RunProgress
from genssl.training.supply.open import OpenSource
from genssl.variants.ledger import Ledger, Origin
from genssl.variants.plan import StepPlan, ViewPlan
from genssl.variants.prefetch.depth import PrefetchDepth, bytes_per_step
from genssl.variants.prefetch.refresh import Refresher
from genssl.variants.replay import AssignmentLog, Replay
from genssl.variants.source import REAL, Delivery, VariantSource

ONLINE_FRACTION = 0.5  # of fresh variants, below which a run is not simply called online


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
    return Refresher(plan, recipe.train.epochs, dataset, remote, per_step=recipe.variants.refresh.budget)


def open_assignments(
    recipe: Recipe,
    dataset: ImageDataset,
    plan: ViewPlan,
    opened: OpenSource | None,
    out: Path,
    done: int = 0,
    ranks: Ranks = ALONE,
) -> tuple[ViewPlan | Replay, AssignmentLog | None]:
    """Returns the plan that the run follows, and the log that it writes where the plan alone does not tell all.

    `done` is how many steps a run which goes on has done. The log is that of one process, so several ranks write none;
    raises UserError if they are to follow one.
    """
    replay = recipe.variants.replay
    if opened is None or (recipe.variants.late == "block" and replay is None):
        return plan, None
    if ranks.size > 1:
        if replay is not None:
            raise UserError("variants.replay: a log is of one process; replay it without torchrun")
        return plan, None
    header = {
        "dataset": dataset.name,
        "dataset_digest": dataset_digest(dataset),
        "images": len(dataset),
        "seed": recipe.seed,
        "batch_size": recipe.train.batch_size,
        "policy": recipe.views.policy,
        "probability": recipe.variant_probability(),
        "per_image": recipe.variants.per_image,
        "fingerprint": opened.provenance["fingerprint"],
        "parameters": opened.provenance["parameters"],
    }
    if recipe.views.policy == "third":
        header["third_count"] = recipe.views.third_count
    followed = plan if replay is None else Replay(plan, replay, header, recipe.train.epochs * plan.steps_per_epoch)
    return followed, AssignmentLog(out / "assignments.jsonl", header, done)


def announce_ahead(
    plan: ViewPlan | Replay,
    epochs: int,
    dataset: ImageDataset,
    source: VariantSource | None,
    ahead: Callable[[], int],
    done: int = 0,
) -> Iterator[StepPlan]:
    """Yields every step but the first `done`, after its variants and those of `ahead()` more steps were announced."""
    coming: deque[StepPlan] = deque()
    for number in range(done, epochs * plan.steps_per_epoch):
        step_plan = plan.step(*divmod(number, plan.steps_per_epoch))
        if source is not None:
            step_plan = step_plan.with_requests(dataset)
            source.announce(step_plan.requests, number)
        coming.append(step_plan)
        while len(coming) > max(0, ahead()):
            yield coming.popleft()
    yield from coming


def wait_for_variants(step: int, step_plan: StepPlan, source: VariantSource | None, ledger: Ledger) -> Delivery | None:
    """Takes a step's variants and enters the time that it waited in the ledger."""
    if source is None or not step_plan.requests:
        return None
    started = time.perf_counter()
    delivery = source.take(step_plan.requests, step)
    ledger.stall_seconds += time.perf_counter() - started
    return delivery


def record_delivery(
    step: int,
    plan: ViewPlan | Replay,
    step_plan: StepPlan,
    delivery: Delivery | None,
    ledger: Ledger,
    write: Callable[[int, list[Origin], list[int]], None] | None,
) -> None:
    """Enters what every slot got in the ledger and in the assignment log."""
    origins: list[Origin] = delivery.origins if delivery is not None else []
    indices = delivery.indices if delivery is not None else []
    slots = (step_plan.indices != REAL).nonzero()[0]
    if isinstance(plan, Replay):
        slots = plan.slots(step)
        origins, indices = plan.relabelled(step, delivery)
    # A slot for which a log names the image itself has no request; its source id does not matter.
    source_ids = {request.row: request.source_id for request in step_plan.requests}
    for row, origin, index in zip(step_plan.rows[slots].tolist(), origins, indices, strict=True):
        ledger.deliver(source_ids.get(row, b""), index, origin, row)
    if write is not None:
        write(step, origins, indices)


def online_label(ledger: Ledger, progress: RunProgress, variants: VariantsConfig) -> dict[str, Any]:
    """Says, for results.json and the user, if most of the variants were not the planned ones."""
    fresh = ledger.fresh_fraction
    if not ledger.wanted or fresh >= ONLINE_FRACTION:
        return {}
    if variants.source == "stored":
        said = (
            f"only {fresh:.0%} of the wanted variants were in the store; the others were real images. "
            "Call this run by these numbers, not simply stored: genssl pregenerate makes what is missing"
        )
    else:
        most, why = variants.budget, "its generator was too slow for it"
        if most is not None:
            why = f"variants.budget allows {counted(most, 'variant')} an image"
        said = (
            f"only {fresh:.0%} of the wanted variants came as planned; {ledger.origins['reused'] / ledger.wanted:.0%} "
            f"were other variants of the same image, {ledger.origins['real'] / ledger.wanted:.0%} real images. Call "
            f"this run by these numbers, not simply online: {why}"
        )
    progress.note(said)
    mostly = "reused variants" if ledger.origins["reused"] >= ledger.origins["real"] else "real images"
    return {"source": f"{variants.source}, mostly {mostly}", "note": said}
