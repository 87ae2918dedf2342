"""Runs a study: every arm at every seed, each run once, however often the command is started."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError

from genssl.base.files import provisional, write_atomically
from genssl.base.safetensors_file import read_tensors
from genssl.config.document import read_document
from genssl.config.dump import to_yaml
from genssl.config.recipe import Recipe
from genssl.config.study import STORE_OF_STUDY, LoadedArm, LoadedStudy
from genssl.errors import ConfigError, UserError
from genssl.studies.model import Summary
from genssl.studies.paper import look_up
from genssl.studies.report import write_report
from genssl.studies.stores import StudyStores
from genssl.studies.summarise import Finished, run_cost, summarise
from genssl.studies.takeover import (
    ENCODER,
    RUNS,
    Asked,
    can_resume,
    differing,
    is_finished,
    replaced,
    require_same_study,
    run_folder,
    set_aside,
)
from genssl.training.progress import Progress
from genssl.training.run import run
from genssl.training.run_directory import read_results

STUDY = "study.yaml"


class Watcher(Protocol):
    """Who is told how far a study is."""

    def note(self, text: str) -> None:
        """Takes a line for the user."""
        ...

    def running(self, arm: str, seed: int) -> AbstractContextManager[Progress]:
        """Hears that a run begins; returns what shows how far it is."""
        ...

    def skipped(self, arm: str, seed: int, why: str) -> None:
        """Hears that a run cannot be."""
        ...

    def finished(self, run: Finished, *, anew: bool) -> None:
        """Hears of a finished run; `anew` is false if it was there already."""
        ...


def compare(loaded: LoadedStudy, out: Path, watcher: Watcher) -> Summary:
    """Runs what is missing, and writes summary.json, the tables, the figures and the report.

    All arms run at one seed before the next begins, so that a machine that slows down slows them all.

    Args:
        loaded: the study.
        out: its folder; runs that are finished there are not repeated.
        watcher: is told how far it is.

    Raises:
        UserError: for everything that the user can put right; finished runs stay.
    """
    for item in loaded.arms:
        if item.arm.paper is not None:
            look_up(item.arm.paper)
    with provisional(out, lambda: _holds_runs(out), (STUDY, RUNS, f".{STUDY}.part")):
        _refuse_foreign(loaded, out)
        stores = StudyStores(out, loaded.arms, watcher.note)
        require_same_study(out, _asked(loaded, stores), stores)
        text = to_yaml(loaded.study)
        write_atomically(out / STUDY, lambda partial: partial.write_text(text))
        # Arms whose length follows from others come after them.
        ordered = sorted(loaded.arms, key=lambda item: (item.arm.wall_clock_of is not None, item.arm.control_of or ""))
        finished: dict[tuple[str, int], Finished] = {}
        for seed in loaded.seeds:
            for item in ordered:
                done = _once(item, seed, loaded, finished, stores, out, watcher)
                if done is not None:
                    finished[item.arm.name, seed] = done
        summary = summarise(loaded, finished, stores, replaced(out))
        text = summary.model_dump_json(indent=2) + "\n"
        write_atomically(out / "summary.json", lambda partial: partial.write_text(text))
        write_report(out, summary)
        return summary


def _holds_runs(out: Path) -> bool:
    """Says whether anything of a study has been made: files of a run, or a store."""
    return (out / "stores").exists() or any(path.is_file() for path in (out / RUNS).glob("*/*/*"))


def _refuse_foreign(loaded: LoadedStudy, out: Path) -> None:
    """Raises UserError if the folder holds another study, or something else.

    A study may gain arms and seeds: every run that is there is compared with the recipe that it should have.
    """
    path = out / STUDY
    if path.exists() and _holds_runs(out):  # what a start that failed has left is taken up
        name = read_document(path).data.get("name")
        if name != loaded.study.name:
            raise UserError(
                f"--out {out}: holds runs of the study {name!r}, not of {loaded.study.name!r}; give another folder"
            )
    elif any(entry.name not in (".lock", STUDY, RUNS) for entry in out.iterdir()):
        raise UserError(f"--out {out}: is not empty and holds no study; give another folder")


def _once(
    item: LoadedArm,
    seed: int,
    loaded: LoadedStudy,
    finished: dict[tuple[str, int], Finished],
    stores: StudyStores,
    out: Path,
    watcher: Watcher,
) -> Finished | None:
    """Returns the run of an arm at a seed; runs it if that has not been done.

    None: the time that it is given is too short.
    """
    arm = item.arm
    recipe = _recipe(item, seed, loaded, finished, stores)
    if recipe is None:
        watcher.skipped(arm.name, seed, f"{arm.wall_clock_of} is over before one epoch of it would be")
        return None
    folder = run_folder(out, arm.name, seed)
    if is_finished(folder) and (why := differing(folder, recipe, stores)):
        watcher.note(set_aside(out, arm.name, seed, why))
    anew = not is_finished(folder)
    if not anew:
        results = read_results(folder)
    else:
        if item.stored_variants:
            stores.fill(recipe)
        resume = can_resume(folder, recipe)
        if folder.exists() and not resume:
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with watcher.running(arm.name, seed) as progress:
                results = run(recipe, folder, progress, resume=resume)
        except ConfigError as error:
            raise ConfigError([f"arm {arm.name}, seed {seed}: {problem}" for problem in error.problems]) from None
        except UserError as error:
            raise UserError(f"arm {arm.name}, seed {seed}: {error}") from None
    share = stores.share(recipe, item.stored_variants) if item.stored_variants and not arm.control_of else None
    done = Finished(arm.name, seed, folder.relative_to(out), recipe, results, run_cost(results, share), _digest(folder))
    watcher.finished(done, anew=anew)
    return done


def _digest(folder: Path) -> str:
    """Returns a digest of a run's weights; the file's own bytes also depend on the order of its metadata."""
    data = hashlib.blake2b(digest_size=16)
    try:
        tensors, _ = read_tensors(folder / ENCODER)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / ENCODER}: cannot be read ({error}); remove {folder} to run it again") from None
    for name, tensor in sorted(tensors.items()):
        data.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data.update(tensor.numpy().tobytes())
    return data.hexdigest()


def _recipe(
    item: LoadedArm,
    seed: int,
    loaded: LoadedStudy,
    finished: dict[tuple[str, int], Finished],
    stores: StudyStores,
) -> Recipe | None:
    """Returns the recipe of an arm at a seed: its store, its threads and its length filled in.

    None: the time that it is given is too short.
    """
    arm, recipe = item.arm, _at(item, seed, stores)
    train = recipe.train
    if arm.control_of:
        # Sums of floating-point numbers depend on the number of threads, and a control must not differ in a bit.
        threads = finished[arm.control_of, seed].results["provenance"]["machine"]["threads"]
        train = train.model_copy(update={"threads": threads})
    if arm.wall_clock_of:
        epochs = _epochs_that_fit(item, seed, loaded, finished)
        if epochs < 1 or epochs <= recipe.schedule.warmup_epochs:
            return None
        train = train.model_copy(update={"epochs": epochs})
    return recipe.model_copy(update={"train": train})


def _at(item: LoadedArm, seed: int, stores: StudyStores) -> Recipe:
    """Returns the recipe of an arm at a seed with its store filled in."""
    recipe = item.recipe.model_copy(update={"seed": seed})
    if str(recipe.variants.store) != STORE_OF_STUDY:
        return recipe
    store = stores.folder(recipe) if recipe.generator is not None else None
    return recipe.model_copy(update={"variants": recipe.variants.model_copy(update={"store": store})})


def _asked(loaded: LoadedStudy, stores: StudyStores) -> Iterator[Asked]:
    """Yields every run of a study, as far as its recipe is known before the others have run."""
    for item in loaded.arms:
        unknown = ("epochs",) * bool(item.arm.wall_clock_of) + ("threads",) * bool(item.arm.control_of)
        for seed in loaded.seeds:
            yield Asked(item.arm.name, seed, _at(item, seed, stores), unknown)


def _epochs_that_fit(item: LoadedArm, seed: int, loaded: LoadedStudy, finished: dict[tuple[str, int], Finished]) -> int:
    """Returns how many epochs of an arm take as long as another arm's run took, made-ahead variants included."""
    arm = item.arm
    assert arm.wall_clock_of is not None
    given = finished[arm.wall_clock_of, seed].cost.wall_clock_seconds
    alike = loaded.as_fast_as(arm)
    assert alike is not None, "load_study has seen to it"
    own = finished[alike.arm.name, seed]
    a_epoch = (own.cost.trainer_seconds + own.cost.stall_seconds) / own.recipe.train.epochs
    return math.floor((given - own.cost.pregeneration_seconds) / a_epoch)
