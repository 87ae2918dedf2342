"""Runs a study: every arm at every seed, each run once, however often the command is started."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from genssl.config.document import read_document
from genssl.config.dump import to_yaml
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.config.study import STORE_OF_STUDY, LoadedArm, LoadedStudy
from genssl.errors import ConfigError, UserError
from genssl.generators.safetensors_file import read_tensors
from genssl.studies.paper import look_up
from genssl.studies.report import write_report
from genssl.studies.stores import StudyStores
from genssl.studies.summarise import Finished, run_cost, summarise
from genssl.studies.summary import Summary
from genssl.training.checkpoint import LATEST
from genssl.training.files import write_atomically
from genssl.training.lock import provisional
from genssl.training.progress import Progress
from genssl.training.run import run

STUDY = "study.yaml"
RUNS = "runs"
ENCODER = "encoder.safetensors"


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
    with provisional(out, lambda: _holds_runs(out)):
        _claim(loaded, out)
        stores = StudyStores(out, loaded.arms, watcher.note)
        # Arms whose length follows from others come after them.
        ordered = sorted(loaded.arms, key=lambda item: (item.arm.wall_clock_of is not None, item.arm.control_of or ""))
        finished: dict[tuple[str, int], Finished] = {}
        for seed in loaded.seeds:
            for item in ordered:
                done = _once(item, seed, loaded, finished, stores, out, watcher)
                if done is not None:
                    finished[item.arm.name, seed] = done
        summary = summarise(loaded, finished, stores)
        text = summary.model_dump_json(indent=2) + "\n"
        write_atomically(out / "summary.json", lambda partial: partial.write_text(text))
        write_report(out, summary)
        return summary


def _holds_runs(out: Path) -> bool:
    """Says whether anything of a study has been made: files of a run, or a store."""
    return (out / "stores").exists() or any(path.is_file() for path in (out / RUNS).glob("*/*/*"))


def _claim(loaded: LoadedStudy, out: Path) -> None:
    """Writes down which study the folder holds, and refuses one that holds another.

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
    text = to_yaml(loaded.study)
    write_atomically(path, lambda partial: partial.write_text(text))


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
    folder = out / RUNS / arm.name / f"seed-{seed}"
    results = _results_of(folder, recipe)
    anew = results is None
    if results is None:
        if item.stored_variants:
            stores.fill(recipe)
        resume = _can_resume(folder, recipe)
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
    arm, recipe = item.arm, item.recipe.model_copy(update={"seed": seed})
    train = recipe.train
    if str(recipe.variants.store) == STORE_OF_STUDY:
        store = stores.folder(recipe) if recipe.generator is not None else None
        recipe = recipe.model_copy(update={"variants": recipe.variants.model_copy(update={"store": store})})
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


def _results_of(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Returns the results of a finished run, or None if there is none.

    Raises:
        UserError: if the folder holds a run of another recipe.
    """
    path = folder / "results.json"
    if not path.is_file() or not (folder / ENCODER).is_file():
        return None
    there = load(Recipe, folder / "recipe.yaml")
    if _without_places(there) != _without_places(recipe):
        raise UserError(
            f"{folder}: holds a finished run of other settings than the study now gives it; "
            "give another --out, or remove that run"
        )
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def _can_resume(folder: Path, recipe: Recipe) -> bool:
    """Says whether an interrupted run can go on and end as if it had not been; it cannot if it reuses variants."""
    if not (folder / LATEST).is_file() or recipe.variants.late == "reuse":
        return False
    return load(Recipe, folder / "recipe.yaml") == recipe


def _without_places(recipe: Recipe) -> Recipe:
    """Returns a recipe without the path of its store, which depends on where the command was typed."""
    return recipe.model_copy(update={"variants": recipe.variants.model_copy(update={"store": None, "source": "none"})})
