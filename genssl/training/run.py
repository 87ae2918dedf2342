"""One training run from a recipe to a run directory: a single loop, read from top to bottom."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genssl.config.dump import to_yaml
from genssl.config.recipe import Recipe
from genssl.data.base import ImageDataset
from genssl.data.load import hold_out, load_dataset
from genssl.errors import ConfigError, ServerUnavailableError, UserError
from genssl.evaluators.base import EvaluationData
from genssl.registry import BACKBONES, METHODS
from genssl.runtime import pick_device, seeded_initialisation, set_threads
from genssl.training.evaluate import check, evaluate
from genssl.training.files import save_checkpoint, save_encoder, write_atomically, write_json
from genssl.training.loader import SourceLoader
from genssl.training.optim import build_optimizer, lr_factor, peak_lr
from genssl.training.progress import Progress
from genssl.training.provenance import provenance
from genssl.training.report import write_report
from genssl.training.samples import draw_run_samples
from genssl.training.sources import open_source, server_threads, start_server
from genssl.variants.ledger import Ledger
from genssl.variants.plan import StepPlan, ViewPlan
from genssl.variants.source import Delivery, VariantRequest, VariantSource
from genssl.views.augment import Augment
from genssl.views.compose import compose_views, requests_of

LOADER_THREADS = 2
SOURCES_AHEAD = 4


@dataclass
class Splits:
    """What a run trains on and is judged on."""

    train: ImageDataset
    evaluation: EvaluationData | None


def run(recipe: Recipe, out: Path, progress: Progress) -> dict[str, Any]:
    """Trains and evaluates, and writes the run directory.

    Args:
        recipe: what to do.
        out: the run directory; created, and refused if it holds a run already.
        progress: shows how far it is.

    Returns:
        The content of results.json.

    Raises:
        UserError: for everything that the user can put right.
    """
    started = time.perf_counter()
    # ---- Device and data: first, so that a mistake in the recipe leaves nothing behind ----
    refuse_used(out)
    device = pick_device(recipe.train.device)
    splits = load_splits(recipe)
    plan = view_plan(recipe, len(splits.train))
    if splits.train.skipped:
        progress.note(f"{len(splits.train.skipped)} corrupt images are left out, such as {splits.train.skipped[0]}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be created ({error.strerror})") from None

    with ExitStack() as stack:
        # ---- Variants: the server loads its model while the trainer prepares ----
        server = stack.enter_context(start_server(recipe, out / "server.log"))
        if device.type == "cpu":
            set_threads(recipe.train.threads, shared_with=server_threads() if server else 0)
        write_atomically(out / "recipe.yaml", lambda partial: partial.write_text(to_yaml(recipe)))

        # ---- Model ----
        with seeded_initialisation("model", recipe.seed):
            backbone = BACKBONES.get(recipe.backbone.name)(recipe.backbone)
            method: Any = METHODS.get(recipe.method.name)(recipe.method, backbone)
        method.to(device).train()
        optimizer = build_optimizer(recipe.optimizer, method, recipe.train.batch_size)
        peak = peak_lr(recipe.optimizer, recipe.train.batch_size)
        augment = Augment(recipe.views.augmentation, splits.train.image_size)

        # ---- Loop ----
        ledger = Ledger()
        opened = stack.enter_context(open_source(recipe, splits.train, ledger, device, server))
        # The loader reads ahead too, and what it has read has been announced.
        ahead = 8 if recipe.variants.prefetch_steps == "auto" else recipe.variants.prefetch_steps
        sources_ahead = min(SOURCES_AHEAD, ahead)
        loader = SourceLoader(splits.train, threads=LOADER_THREADS, ahead=sources_ahead)
        stack.callback(loader.close)
        progress.start(recipe, plan.steps_per_epoch)
        log = stack.enter_context((out / "metrics.jsonl").open("w"))
        source = opened.source if opened else None
        plans = announced(plan, recipe.train.epochs, splits.train, source, ahead - sources_ahead)
        loop_started = time.perf_counter()
        for step, (step_plan, sources) in enumerate(loader.batches(plans)):
            delivery = take(requests_of(step_plan, splits.train), source, ledger)
            views = compose_views(step_plan, sources, delivery, augment, recipe.seed, device)
            lr = peak * lr_factor(recipe.schedule, step, plan.steps_per_epoch, recipe.train.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            output = method.step(views)
            optimizer.zero_grad(set_to_none=True)
            output.loss.backward()
            optimizer.step()
            method.after_step()

            loss = output.loss.item()
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss became {loss} at epoch {step_plan.epoch}, step {step_plan.step}; "
                    f"lower optimizer.lr (it is {lr:g} here)"
                )
            seconds = time.perf_counter() - loop_started
            ledger.trainer_seconds = seconds - ledger.stall_seconds
            progress.step(
                step_plan.epoch, loss, images=(step + 1) * recipe.train.batch_size, seconds=seconds, ledger=ledger
            )
            if step_plan.step == plan.steps_per_epoch - 1:
                row = {
                    "epoch": step_plan.epoch + 1,
                    "step": step + 1,
                    "loss": loss,
                    "lr": lr,
                    "seconds": round(seconds, 3),
                    **ledger.summary(),
                }
                log.write(json.dumps(row | output.metrics) + "\n")
                log.flush()
                save_checkpoint(out / "checkpoint.pt", method, optimizer, epoch=step_plan.epoch + 1, ledger=ledger)
        # What the ledger says ends here; the pictures below cost a few more calls.
        counted = ledger.summary()

        # ---- Results ----
        save_encoder(out / "encoder.safetensors", backbone, recipe)
        metrics: dict[str, float] = {}
        protocols: dict[str, dict[str, Any]] = {}
        if splits.evaluation is not None:
            metrics, protocols = evaluate(recipe.evaluate, method, splits.evaluation, device, progress.evaluating)
        results = {
            "name": recipe.name,
            "metrics": metrics,
            "ledger": counted,
            "protocol": protocols,
            "provenance": provenance(recipe, splits.train, opened.provenance if opened else None, device),
            "seconds": round(time.perf_counter() - started, 3),
        }
        write_json(out / "results.json", results)
        try:
            draw_run_samples(out / "samples.png", recipe, splits.train, plan, source, augment)
        except ServerUnavailableError as error:  # a finished training is not lost for a picture
            progress.note(f"samples.png shows no variants: {error}")
            draw_run_samples(out / "samples.png", recipe, splits.train, plan, None, augment)
        write_report(out, recipe, results)
        return results


def refuse_used(out: Path) -> None:
    """Raises UserError if `out` holds a run already, or is no directory."""
    if (out / "results.json").exists() or (out / "metrics.jsonl").exists():
        raise UserError(f"{out} holds a run already; give another directory with --out, or remove it")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a directory with --out")


def load_splits(recipe: Recipe) -> Splits:
    """Loads the train split, and what the evaluators need if there are any."""
    train = load_dataset(recipe.dataset, "train")
    test_name = "test"
    test: ImageDataset | None = None
    if recipe.train.validation_fraction > 0:
        train, test = hold_out(train, recipe.train.validation_fraction)
        test_name = f"validation ({recipe.train.validation_fraction:g} of train)"
    if recipe.train.batch_size > len(train):
        raise ConfigError(
            [f"train.batch_size: {recipe.train.batch_size} is more than the {len(train)} training images; lower it"]
        )
    if not recipe.evaluate:
        return Splits(train, None)
    evaluation = EvaluationData(train, test or load_dataset(recipe.dataset, "test"), test_name)
    check(recipe.evaluate, evaluation)
    return Splits(train, evaluation)


def view_plan(recipe: Recipe, num_sources: int) -> ViewPlan:
    """Returns the plan of a run."""
    return ViewPlan(
        seed=recipe.seed,
        num_sources=num_sources,
        batch_size=recipe.train.batch_size,
        policy=recipe.views.policy if recipe.uses_variants() else "none",
        probability=recipe.views.probability,
        per_image=recipe.variants.per_image,
    )


def announced(
    plan: ViewPlan, epochs: int, dataset: ImageDataset, source: VariantSource | None, ahead: int
) -> Iterator[StepPlan]:
    """Yields every step of the run, after its variants and those of the `ahead` steps after it have been announced."""
    coming: deque[StepPlan] = deque()
    for epoch in range(epochs):
        for step in range(plan.steps_per_epoch):
            step_plan = plan.step(epoch, step)
            if source is not None:
                source.plan(requests_of(step_plan, dataset))
            coming.append(step_plan)
            if len(coming) > ahead:
                yield coming.popleft()
    yield from coming


def take(requests: list[VariantRequest], source: VariantSource | None, ledger: Ledger) -> Delivery | None:
    """Takes a step's variants and enters them, and the time it waited, in the ledger."""
    if source is None or not requests:
        return None
    started = time.perf_counter()
    delivery = source.take(requests)
    ledger.stall_seconds += time.perf_counter() - started
    for request, origin in zip(requests, delivery.origins, strict=True):
        ledger.deliver(request.source_id, request.index, origin)
    return delivery
