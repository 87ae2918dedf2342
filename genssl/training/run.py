"""One training run from a recipe to a run directory: a single loop, read from top to bottom."""

from __future__ import annotations

import json
import math
import time
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
from genssl.serving.remote import RemoteSource
from genssl.training.deliveries import announced, enter, follow_log, how_online, take
from genssl.training.evaluate import check, evaluate
from genssl.training.files import save_checkpoint, save_encoder, write_atomically, write_json
from genssl.training.loader import SourceLoader
from genssl.training.optim import build_optimizer, lr_factor, peak_lr
from genssl.training.progress import Progress
from genssl.training.provenance import provenance
from genssl.training.refresh import Refresher
from genssl.training.report import write_report
from genssl.training.samples import draw_run_samples
from genssl.training.sources import open_source, open_stored_first, require_stored, server_threads, start_server
from genssl.variants.assignments import Replay
from genssl.variants.depth import PrefetchDepth, bytes_per_step
from genssl.variants.ledger import Ledger
from genssl.variants.plan import ViewPlan
from genssl.variants.store_manifest import StoreError
from genssl.views.augment import Augment
from genssl.views.compose import compose_views

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

    with ExitStack() as stack:
        # ---- Stored variants: that they are all there is known before anything is written ----
        ledger = Ledger()
        opened = stack.enter_context(open_stored_first(recipe, splits.train, plan, ledger, device))
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be created ({error.strerror})") from None

        # ---- Variants: the server loads its model while the trainer prepares ----
        server = stack.enter_context(start_server(recipe, out / "server.log"))
        if device.type == "cpu":
            set_threads(recipe.train.threads, shared_with=server_threads(recipe) if server else 0)
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
        opened = opened or stack.enter_context(open_source(recipe, splits.train, ledger, device, server, out))
        source = opened.source if opened else None
        followed, assignments = follow_log(recipe, splits.train, plan, opened, out)
        if isinstance(followed, Replay):
            require_stored(recipe, splits.train, followed, opened)
        write = stack.enter_context(assignments).write if assignments else None
        depth = prefetch_depth(recipe, opened.remote if opened else None, ledger)
        if depth.note:
            progress.note(depth.note)
        # The loader reads ahead too, and what it has read has been announced.
        sources_ahead = min(SOURCES_AHEAD, depth.steps)
        loader = SourceLoader(splits.train, threads=LOADER_THREADS, ahead=sources_ahead)
        stack.callback(loader.close)
        refresher = build_refresher(recipe, splits.train, opened.remote if opened else None)
        progress.start(recipe, plan.steps_per_epoch)
        log = stack.enter_context((out / "metrics.jsonl").open("w"))
        plans = announced(followed, recipe.train.epochs, splits.train, source, lambda: depth.steps - sources_ahead)
        loop_started = time.perf_counter()
        for step, (step_plan, sources) in enumerate(loader.batches(plans)):
            stalled = ledger.stall_seconds
            step_started = time.perf_counter()
            delivery = take(step, step_plan, splits.train, source, ledger)
            enter(step, followed, step_plan, splits.train, delivery, ledger, write)
            views = compose_views(step_plan, sources, delivery, augment, recipe.seed, device)
            lr = peak * lr_factor(recipe.schedule, step, plan.steps_per_epoch, recipe.train.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            output = method.step(views)
            optimizer.zero_grad(set_to_none=True)
            output.loss.backward()
            optimizer.step()
            method.after_step((step + 1) / (recipe.train.epochs * plan.steps_per_epoch))

            loss = output.loss.item()
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss became {loss} at epoch {step_plan.epoch}, step {step_plan.step}; "
                    f"lower optimizer.lr (it is {lr:g} here)"
                )
            if refresher is not None:
                refresher.step()
            now = time.perf_counter()
            depth.step_done(now - step_started - (ledger.stall_seconds - stalled))
            seconds = now - loop_started
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
        mode = how_online(ledger, progress, recipe.variants.source)

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
            "provenance": provenance(recipe, splits.train, opened.provenance | mode if opened else None, device),
            "seconds": round(time.perf_counter() - started, 3),
        }
        write_json(out / "results.json", results)
        try:
            draw_run_samples(out / "samples.png", recipe, splits.train, plan, source, augment)
        except (ServerUnavailableError, StoreError) as error:  # a finished training is not lost for a picture
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


def prefetch_depth(recipe: Recipe, remote: RemoteSource | None, ledger: Ledger) -> PrefetchDepth:
    """Returns how many steps ahead the run asks for variants."""
    size = remote.image_size if remote is not None else 0
    views = {"none": 0, "second": 1, "both": 2}[recipe.views.policy]
    return PrefetchDepth(
        recipe.variants.prefetch_steps,
        bytes_per_step=bytes_per_step(recipe.train.batch_size, views, recipe.views.probability, size),
        max_bytes=recipe.variants.prefetch_bytes,
        ledger=ledger,
    )


def build_refresher(recipe: Recipe, dataset: ImageDataset, remote: RemoteSource | None) -> Refresher | None:
    """Returns what generates ahead of the plan, if the recipe asks for it and there is a pool to put it."""
    if recipe.variants.refresh is None or remote is None:
        return None
    plan = view_plan(recipe, len(dataset))
    return Refresher(plan, recipe.train.epochs, dataset, remote, recipe.variants.refresh.budget)
