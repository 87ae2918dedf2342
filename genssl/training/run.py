"""One training run from a recipe to a run directory: a single loop, read from top to bottom."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from genssl.base.batch_norm import synchronise_batch_norm
from genssl.base.devices import pick_device, seeded_initialisation, set_threads
from genssl.base.files import write_json
from genssl.base.ranks import Ranks, ranks_now
from genssl.config.recipe import Recipe
from genssl.data.load import left_out_note
from genssl.errors import ConfigError, ServerUnavailableError, UserError
from genssl.evaluators.run import divided, evaluate
from genssl.evaluators.splits import load_splits
from genssl.generators.conditioner import save_encoder
from genssl.registry import BACKBONES, METHODS
from genssl.training.checkpoint import (
    LATEST,
    Position,
    RunCheckpoints,
    Trained,
    identity,
    require_same_step,
    restore,
    restore_ledger,
    resumption,
)
from genssl.training.loader import SourceLoader
from genssl.training.loggers import MetricsLog, check_loggers, open_loggers
from genssl.training.monitors import KNN, Monitor, warning_of
from genssl.training.progress import RunProgress
from genssl.training.provenance import device_in_words, provenance
from genssl.training.report import write_report
from genssl.training.run_directory import (
    as_begun,
    changed_length,
    hold,
    is_finished,
    read_results,
    recipe_begun,
    recipe_of,
    refuse_used,
)
from genssl.training.samples import draw_run_samples
from genssl.training.stopping import Stopped, StopSignals
from genssl.training.supply.open import open_source, open_stored_source, require_stored
from genssl.training.supply.server import server_threads, start_shared_server
from genssl.training.supply.steps import (
    announce_ahead,
    build_refresher,
    online_label,
    open_assignments,
    prefetch_depth,
    record_delivery,
    view_plan,
    wait_for_variants,
)
from genssl.training.update import Update, build_optimizer, lr_factor, peak_lr
from genssl.variants.ledger import Ledger
from genssl.variants.replay import Replay
from genssl.variants.store.manifest import StoreError
from genssl.variants.usage import PlannedUsage
from genssl.views.augmentations import Augmentations
from genssl.views.compose import compose_views
from genssl.views.pair_weights import PairWeights

LOADER_THREADS = 2
SOURCES_AHEAD = 4


def run(recipe: Recipe, out: Path, progress: RunProgress | None = None, *, resume: bool = False) -> dict[str, Any]:
    """Trains and evaluates, and writes the run directory.

    Args:
        recipe: what to do.
        out: the run directory; created, and refused if it holds a run already.
        progress: shows how far it is; by default nothing is shown.
        resume: goes on with the run that the directory holds, from its last checkpoint; begins one if it holds none.

    Returns:
        The content of results.json; nothing on ranks other than the first.

    Raises:
        UserError: for everything that the user can put right.
    """
    started = time.perf_counter()
    progress = progress or RunProgress(Console(quiet=True))
    # ---- Device and data: first, so that a mistake in the recipe leaves nothing behind ----
    ranks = ranks_now()
    begun = as_begun(recipe, out) if resume else recipe
    if resume:
        finished = is_finished(out) and recipe_of(out).train.epochs == recipe.train.epochs
        if ranks.gather(finished)[0]:  # other machines need not have the results
            progress.note(f"{out} is finished; there is nothing to resume")
            return read_results(out) if ranks.first else {}
    if ranks.first and not resume:
        refuse_used(out)
    device = ranks.device(pick_device(recipe.train.device))
    require_divisible(recipe, ranks)
    splits = load_splits(recipe)
    plan = view_plan(recipe, len(splits.train), ranks)
    total_steps = recipe.train.epochs * plan.steps_per_epoch
    augmentations = Augmentations(recipe.views, splits.train.image_size)
    judged = recipe.views.pair_weights
    weigh = PairWeights(judged, splits.train, device) if judged is not None else None
    monitor = Monitor(recipe, splits.train, splits.held_out, device)
    check_loggers(recipe)
    for note in [*splits.notes, left_out_note(splits.train)]:
        if note:
            progress.note(note)

    with ExitStack() as stack:
        # ---- Stored variants: that they are all there is known before anything is written ----
        ledger = Ledger(usage=plan.usage())
        opened = stack.enter_context(open_stored_source(recipe, splits.train, plan, ledger, device))

        # ---- Run directory, and the checkpoint to go on from ----
        directory = stack.enter_context(hold(out, resume=resume)) if ranks.first else None
        checkpoints = RunCheckpoints(
            out, recipe.train.keep_checkpoints, identity(recipe_begun(out, begun), splits.train)
        )
        state, notes = checkpoints.latest() if resume else (None, [])
        length = changed_length(recipe, out, state["step"] / plan.steps_per_epoch) if state is not None else {}
        require_same_step(ranks, out, 0 if state is None else state["step"])
        for note in notes:
            progress.note(note)
        begun_with = [state["identity"]["generator"]] if state and state["identity"].get("generator") else []

        # ---- Variants: the server loads its model while the trainer prepares ----
        server = stack.enter_context(start_shared_server(recipe, out, ranks, begun_with))
        if device.type == "cpu":
            shared_with = server_threads(recipe) if server else 0
            set_threads(recipe.train.threads, shared_with=shared_with, among=ranks.local_size)
        progress.announce(recipe, len(splits.train), plan.steps_per_epoch, device_in_words(device, ranks), out)

        # ---- Model ----
        with seeded_initialisation("model", recipe.seed):
            backbone = BACKBONES.get(recipe.backbone.name)(recipe.backbone)
            method: Any = METHODS.get(recipe.method.name)(recipe.method, backbone)
        if ranks.size > 1:
            method = synchronise_batch_norm(method, device)
        method.to(device).train()
        optimizer = build_optimizer(recipe.optimizer, method, recipe.train.batch_size)
        peak = peak_lr(recipe.optimizer, recipe.train.batch_size)
        if recipe.train.channels_last:
            method.to(memory_format=torch.channels_last)
        if recipe.train.compile:
            backbone.compile()  # in place, so that the names of its weights stay
        update = Update(method, optimizer, recipe.train, device, ranks)
        trained = Trained(method, optimizer, update.scaler)

        # ---- Position: the first step, or where the checkpoint was written ----
        position = Position()
        if state is not None:
            position = restore(state, out / LATEST, trained)
            restore_ledger(state, ledger)
            position.resumed.append(resumption(recipe, device, position.step) | length)
            progress.note(f"resumed after step {position.step} of {total_steps}")
        save = partial(checkpoints.save, position, trained, ledger)

        # ---- Variants and logs ----
        opened = opened or stack.enter_context(
            open_source(recipe, splits.train, ledger, device, server, out, begun_with)
        )
        source = opened.source if opened else None
        if opened and not recipe.unsuited() and (small := opened.smaller_than(splits.train.image_size)):
            progress.note(f"warning: {small}")
        checkpoints.identify(state, generator=opened.provenance["fingerprint"] if opened else "")
        followed, assignments = open_assignments(recipe, splits.train, plan, opened, out, position.step, ranks)
        if isinstance(followed, Replay):
            require_stored(recipe, splits.train, followed, opened)
            if isinstance(ledger.usage, PlannedUsage):
                ledger.usage.forgets = False  # a log may reuse what is of any epoch
        write = stack.enter_context(assignments).write if assignments else None
        depth = prefetch_depth(recipe, opened.remote if opened else None, ledger, ranks)
        if depth.note:
            progress.note(depth.note)
        # The loader reads ahead too, and what it has read has been announced.
        sources_ahead = min(SOURCES_AHEAD, depth.steps)
        loader = SourceLoader(
            splits.train,
            lambda step_plan: augmentations.crop_draws(step_plan, recipe.seed),
            threads=LOADER_THREADS,
            ahead=sources_ahead,
            workers=recipe.train.workers,
        )
        stack.callback(loader.close)
        refresher = build_refresher(recipe, splits.train, opened.remote if opened else None, ranks)
        loggers = open_loggers(recipe, out, resumed=position.step > 0) if ranks.first else []
        log = stack.enter_context(MetricsLog(out if ranks.first else None, loggers, position.step))
        collapse = warning_of(log.rows, recipe.optimizer.lr)

        # ---- Loop ----
        progress.start(recipe, plan.steps_per_epoch, position.step)
        plans = announce_ahead(
            followed, recipe.train.epochs, splits.train, source, lambda: depth.steps - sources_ahead, position.step
        )
        # What draws from torch's own streams, such as dropout, must not depend on, or disturb, what runs beside it.
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        signals = stack.enter_context(StopSignals(breaks=ranks.size == 1))
        saved_step, stop = position.step, False
        loop_started = time.perf_counter() - position.seconds
        for step, (step_plan, sources) in enumerate(loader.batches(plans), start=position.step):
            stalled = ledger.stall_seconds
            step_started = time.perf_counter()
            try:
                with signals.waiting():
                    delivery = wait_for_variants(step, step_plan, source, ledger)
            except Stopped:
                stop = True
                break
            record_delivery(step, followed, step_plan, delivery, ledger, write)
            views = compose_views(step_plan, sources, delivery, augmentations, recipe.seed, device)
            views = views if weigh is None else weigh(views)
            lr = peak * lr_factor(recipe.schedule, step, plan.steps_per_epoch, recipe.train.epochs)
            loss, extra = update(views, lr, recipe.seed, step)
            method.after_step((step + 1) / total_steps)

            loss, stop = ranks.agree(loss, signals.number is not None, device)
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss became {loss} at epoch {step_plan.epoch}, step {step_plan.step}; "
                    f"lower optimizer.lr (it is {lr:g} here)"
                )
            if directory is not None:
                directory.begin(recipe)  # not before: what fails until here leaves nothing behind
            if refresher is not None:
                refresher.step()
            now = time.perf_counter()
            depth.step_done(now - step_started - (ledger.stall_seconds - stalled))
            position.step, position.seconds = step + 1, now - loop_started
            ledger.trainer_seconds = position.seconds - ledger.stall_seconds
            progress.step(
                step_plan.epoch,
                loss,
                images=position.step * recipe.train.batch_size,
                seconds=position.seconds,
                ledger=ledger,
            )

            # ---- Between steps: measure, log, save ----
            epoch, steps_left = divmod(position.step, plan.steps_per_epoch)
            best = False
            seen = monitor.measure(method, epoch, ranks) if steps_left == 0 else {}
            if steps_left == 0 and ranks.first:
                best = KNN in seen and (position.best is None or seen[KNN] > position.best)
                position.best = seen[KNN] if best else position.best
                row = {"epoch": epoch, "step": position.step, "loss": loss, "lr": lr}
                row |= {"seconds": round(position.seconds, 3), **ledger.summary(), **extra, **seen}
                log.write(row)
                if KNN in seen:
                    progress.note(f"epoch {epoch}: online kNN {seen[KNN]:.1%}")
                before, collapse = collapse, warning_of(log.rows, recipe.optimizer.lr)
                if collapse and not before:
                    progress.note(collapse)
            if assignments is not None:
                assignments.flush()
            due = is_due(recipe, position.step, plan.steps_per_epoch, total_steps) or stop
            if (due or best) and ranks.first:
                save(epoch=epoch, is_best=best, due=due)
                saved_step = position.step if due else saved_step
            if stop:
                break
        signals.restore()
        if stop or signals.number is not None:
            if position.step > saved_step and ranks.first:
                save(epoch=position.step // plan.steps_per_epoch)
            done = f"{position.step} of {total_steps}"
            again = f"continue with: genssl run --resume {out}" if position.step else "nothing was written"
            progress.note(f"stopped after step {done}; {again}")
            ranks.end_together("stopped")
            signals.follow()
        # What the ledger says ends here; the pictures below cost a few more calls.
        if isinstance(ledger.usage, PlannedUsage):
            ledger.usage.settle(splits.train.source_id)
        counted = ledger.summary()
        mode = online_label(ledger, progress, recipe.variants)

        # ---- Results: of the first rank; the others do their share of some, and wait, since they would take shared
        # things with them ----
        if directory is not None:
            directory.begin(recipe)  # a run whose steps were all done before
            save_encoder(out / "encoder.safetensors", backbone, recipe.backbone, recipe=recipe.name)
        metrics: dict[str, float] = {}
        protocols: dict[str, dict[str, Any]] = {}
        together, alone = divided(splits.evaluators, ranks)
        if splits.evaluation is not None and together:
            metrics, protocols = evaluate(together, method, splits.evaluation, device, progress.evaluating, ranks)
        if not ranks.first:
            ranks.end_together("finished")
            return {}
        if splits.evaluation is not None and alone:
            more = evaluate(alone, method, splits.evaluation, device, progress.evaluating)
            metrics, protocols = metrics | more[0], protocols | more[1]
        progress.evaluated()
        results = {
            "name": recipe.name,
            "metrics": metrics,
            "ledger": counted,
            "protocol": protocols,
            "monitor": monitor.summary(log.rows, position.best, collapse),
            "provenance": provenance(recipe, splits.train, opened.provenance | mode if opened else None, device)
            | ranks.provenance(),
            "resumed": position.resumed,
            "seconds": round(time.perf_counter() - started + (state["seconds"] if state else 0.0), 3),
        }
        write_json(out / "results.json", results)
        try:
            draw_run_samples(out / "samples.png", recipe, splits.train, plan, source, augmentations)
        except (ServerUnavailableError, StoreError) as error:  # a finished training is not lost for a picture
            progress.note(f"samples.png shows no variants: {error}")
            draw_run_samples(out / "samples.png", recipe, splits.train, plan, None, augmentations)
        write_report(out, recipe, results)
        ranks.end_together("finished")
        return results


def is_due(recipe: Recipe, step: int, steps_per_epoch: int, total_steps: int) -> bool:
    """Says whether a checkpoint is to be written after so many steps."""
    if step == total_steps or step % (recipe.train.checkpoint_every_epochs * steps_per_epoch) == 0:
        return True
    every = recipe.train.checkpoint_every_steps
    return every is not None and step % every == 0


def require_divisible(recipe: Recipe, ranks: Ranks) -> None:
    """Raises ConfigError if the global batch does not divide into equal parts."""
    parts = ranks.size * recipe.train.accumulate
    size = recipe.train.batch_size
    if size % parts or size // parts < 2:
        among = f"{ranks.size} ranks"
        if recipe.train.accumulate > 1:
            among += f" with {recipe.train.accumulate} micro-batches each (train.accumulate)"
        raise ConfigError(
            [
                f"train.batch_size: {size} is the global batch and does not divide among {among} into equal parts of "
                f"at least 2; set it to a multiple of {parts}, or start another number of ranks"
            ]
        )
