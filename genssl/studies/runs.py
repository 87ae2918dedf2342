"""Finished runs, read from their directories, and means over their seeds; imports no torch."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genssl.config.comparable import baseline_of, deciding
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import UserError
from genssl.studies.model import Estimate


@dataclass
class RunGroup:
    """Runs of one recipe that differ in nothing but the seed; each seed counts once, in ascending order.

    The `baseline` is the runs of the same recipe without variants, if there are any and this group has variants.
    """

    name: str
    source: str  # of its variants
    seeds: list[int] = field(default_factory=list)
    by_seed: dict[str, dict[int, float]] = field(default_factory=dict)  # by metric
    seconds: list[float] = field(default_factory=list)
    baseline: RunGroup | None = None
    # For each seed with more than one run, the directory that counts, and those that are left out.
    repeats: dict[int, tuple[Path, list[Path]]] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, list[float]]:
        """For each metric, its values, one a seed that has it."""
        return {metric: list(values.values()) for metric, values in self.by_seed.items()}

    def differences(self, metric: str) -> list[float]:
        """Returns this group's value minus the baseline's, for each seed that both have."""
        assert self.baseline is not None
        other = self.baseline.by_seed.get(metric, {})
        return [value - other[seed] for seed, value in self.by_seed.get(metric, {}).items() if seed in other]


@dataclass(frozen=True)
class FinishedRun:
    """What a run directory holds."""

    folder: Path
    recipe: Recipe
    results: dict[str, Any]


def summarise_runs(folder: Path) -> list[RunGroup]:
    """Reads every finished run directly below a folder.

    Of runs of one recipe and seed, the one that finished last counts: a repeat tells nothing new about the seed, and
    counted twice it would make intervals too narrow.

    Raises:
        UserError: if there is none.
    """
    found = sorted(folder.glob("*/results.json"), key=lambda path: (path.stat().st_mtime_ns, path))
    if not found:
        raise UserError(
            f"{folder}: holds no finished run (no */results.json); give the folder that --out directories lie in"
        )
    by_recipe: dict[str, dict[int, list[FinishedRun]]] = {}
    for path in found:
        run = FinishedRun(path.parent, load(Recipe, path.with_name("recipe.yaml")), json.loads(path.read_text()))
        by_recipe.setdefault(_key(deciding(run.recipe)), {}).setdefault(run.recipe.seed, []).append(run)
    groups = [(next(iter(seeds.values()))[0].recipe, _group(seeds)) for seeds in by_recipe.values()]
    groups.sort(key=lambda pair: (pair[0].name, pair[0].variants.source, pair[1].seeds[0]))
    baselines: dict[str, RunGroup] = {}
    for recipe, group in groups:
        if not recipe.uses_variants():
            baselines.setdefault(_key(baseline_of(recipe)), group)
    for recipe, group in groups:
        if recipe.uses_variants():
            group.baseline = baselines.get(_key(baseline_of(recipe)))
    return [group for _, group in groups]


def _group(seeds: dict[int, list[FinishedRun]]) -> RunGroup:
    """Returns the group of runs of one recipe, by seed, each in the order in which they finished."""
    recipe = next(iter(seeds.values()))[0].recipe
    group = RunGroup(recipe.name, recipe.variants.source if recipe.uses_variants() else "none", sorted(seeds))
    for seed in group.seeds:
        *repeats, run = seeds[seed]
        group.seconds.append(run.results["seconds"])
        for metric, value in run.results["metrics"].items():
            group.by_seed.setdefault(metric, {})[seed] = value
        if repeats:
            group.repeats[seed] = run.folder, [repeat.folder for repeat in repeats]
    return group


def _key(settings: dict[str, Any]) -> str:
    """Returns one text for all runs that these settings decide, whatever their seed."""
    return json.dumps(settings | {"seed": None}, sort_keys=True)


# ---- Means over seeds ----
def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and the half-width of its two-sided 95 % t-interval (n - 1 degrees of freedom).

    The half-width is nan for a single value.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    from scipy.stats import t

    return mean, float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean with its 95 % t-interval; no interval for one value."""
    mean, half = mean_and_interval(values)
    if math.isnan(half):
        return Estimate(mean=mean, n=len(values))
    return Estimate(mean=mean, low=mean - half, high=mean + half, n=len(values))


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Returns the mean of ours - theirs over the seeds that both have, with its interval; None if no seed has both.

    Pairing by seed takes out what runs of one seed share: first weights, order of the images, augmentations.
    """
    differences = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    return estimate(differences) if differences else None
