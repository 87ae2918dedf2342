"""Runs a study: every arm at every seed, each run once, however often the command is started."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from operator import methodcaller
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError

from genssl.base.files import provisional, write_atomically
from genssl.base.safetensors_file import read_tensors
from genssl.config.documents.document import read_document
from genssl.config.documents.dump import to_yaml
from genssl.config.recipe import Recipe
from genssl.config.study import STORE_OF_STUDY, LoadedArm, LoadedStudy
from genssl.errors import ConfigError, UserError
from genssl.studies.model import Summary
from genssl.studies.paper import look_up
from genssl.studies.report import write_report
from genssl.studies.stores import StudyStores
from genssl.studies.summarise import StudyRun, run_cost, summarise
from genssl.studies.takeover import (
    ENCODER,
    RUNS,
    RequestedRun,
    can_resume,
    differing,
    is_finished,
    replaced,
    require_same_study,
    run_folder,
    set_aside,
)
from genssl.training.progress import RunProgress
from genssl.training.run import run
from genssl.training.run_directory import read_results

STUDY = "study.yaml"


class StudyWatcher(Protocol):
    """Who is told how far a study is."""

    def note(self, text: str) -> None:
        """Takes a line for the user."""

    def running(self, arm: str, seed: int) -> AbstractContextManager[RunProgress]:
        """Hears that a run begins; returns what shows how far it is."""

    def skipped(self, arm: str, seed: int, why: str) -> None:
        """Hears that a run cannot be."""

    def finished(self, run: StudyRun, *, anew: bool) -> None:
        """Hears of a finished run; `anew` is false if it was there already."""


def compare(loaded: LoadedStudy, out: Path, watcher: StudyWatcher) -> Summary:
    """Runs what is missing, and writes summary.json, the tables, the figures and the report.

    All arms run at one seed before the next begins, so that a machine that slows down slows them all. Runs that are
    finished in the study's folder are not repeated.

    Raises:
        UserError: for everything that the user can put right; finished runs stay.
    """
    for item in loaded.arms:
        if item.arm.paper is not None:
            look_up(item.arm.paper)
    with provisional(out, lambda: _holds_runs(out), (STUDY, RUNS, f".{STUDY}.part")):
        _refuse_foreign(loaded, out)
        runner = _Runner(loaded, out, watcher)
        require_same_study(out, runner.requested(), runner.stores)
        write_atomically(out / STUDY, methodcaller("write_text", to_yaml(loaded.study)))
        # Arms whose length follows from others come after them.
        ordered = sorted(loaded.arms, key=lambda item: (item.arm.wall_clock_of is not None, item.arm.control_of or ""))
        for seed in loaded.seeds:
            for item in ordered:
                runner.run(item, seed)
        summary = summarise(loaded, runner.finished, runner.stores, replaced(out))
        write_atomically(out / "summary.json", methodcaller("write_text", summary.model_dump_json(indent=2) + "\n"))
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


class _Runner:
    """Runs the arms of a study, and keeps what has finished by arm and seed."""

    def __init__(self, loaded: LoadedStudy, out: Path, watcher: StudyWatcher) -> None:
        self._loaded, self._out, self._watcher = loaded, out, watcher
        self.stores = StudyStores(out, loaded.arms, watcher.note)
        self.finished: dict[tuple[str, int], StudyRun] = {}

    def requested(self) -> Iterator[RequestedRun]:
        """Yields every run of the study, as far as its recipe is known before the others have run."""
        for item in self._loaded.arms:
            unknown = ("epochs",) * bool(item.arm.wall_clock_of) + ("threads",) * bool(item.arm.control_of)
            for seed in self._loaded.seeds:
                yield RequestedRun(item.arm.name, seed, self._with_store(item, seed), unknown)

    def run(self, item: LoadedArm, seed: int) -> None:
        """Runs an arm at a seed if that has not been done; leaves it out if the time that it is given is too short."""
        arm, stores = item.arm, self.stores
        recipe = self._recipe(item, seed)
        if recipe is None:
            self._watcher.skipped(arm.name, seed, f"{arm.wall_clock_of} is over before one epoch of it would be")
            return
        folder = run_folder(self._out, arm.name, seed)
        if is_finished(folder) and (why := differing(folder, recipe, stores)):
            self._watcher.note(set_aside(self._out, arm.name, seed, why))
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
                with self._watcher.running(arm.name, seed) as progress:
                    results = run(recipe, folder, progress, resume=resume)
            except ConfigError as error:
                raise ConfigError([f"arm {arm.name}, seed {seed}: {problem}" for problem in error.problems]) from None
            except UserError as error:
                raise UserError(f"arm {arm.name}, seed {seed}: {error}") from None
        share = stores.share(recipe, item.stored_variants) if item.stored_variants and not arm.control_of else None
        directory, cost = folder.relative_to(self._out), run_cost(results, share)
        done = StudyRun(arm.name, seed, directory, recipe, results, cost, _weights_digest(folder))
        self._watcher.finished(done, anew=anew)
        self.finished[arm.name, seed] = done

    def _recipe(self, item: LoadedArm, seed: int) -> Recipe | None:
        """Returns the recipe of an arm at a seed: its store, its threads and its length filled in.

        None: the time that it is given is too short.
        """
        arm, recipe = item.arm, self._with_store(item, seed)
        train = recipe.train
        if arm.control_of:
            # Sums of floating-point numbers depend on the number of threads, and a control must not differ in a bit.
            threads = self.finished[arm.control_of, seed].results["provenance"]["machine"]["threads"]
            train = train.model_copy(update={"threads": threads})
        if arm.wall_clock_of:
            epochs = self._epochs_that_fit(item, seed)
            if epochs < 1 or epochs <= recipe.schedule.warmup_epochs:
                return None
            train = train.model_copy(update={"epochs": epochs})
        return recipe.model_copy(update={"train": train})

    def _with_store(self, item: LoadedArm, seed: int) -> Recipe:
        recipe = item.recipe.model_copy(update={"seed": seed})
        if str(recipe.variants.store) != STORE_OF_STUDY:
            return recipe
        store = self.stores.folder(recipe) if recipe.generator is not None else None
        return recipe.model_copy(update={"variants": recipe.variants.model_copy(update={"store": store})})

    def _epochs_that_fit(self, item: LoadedArm, seed: int) -> int:
        """Returns how many epochs of an arm take as long as another's run took, making its stored variants included."""
        arm = item.arm
        assert arm.wall_clock_of is not None
        given = self.finished[arm.wall_clock_of, seed].cost.wall_clock_seconds
        alike = self._loaded.as_fast_as(arm)
        assert alike is not None, "load_study has seen to it"
        own = self.finished[alike.arm.name, seed]
        epoch_seconds = (own.cost.trainer_seconds + own.cost.stall_seconds) / own.recipe.train.epochs
        return math.floor((given - own.cost.pregeneration_seconds) / epoch_seconds)


def _weights_digest(folder: Path) -> str:
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
