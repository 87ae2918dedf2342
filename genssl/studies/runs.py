"""Summaries of finished runs, read from their directories; imports no torch."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genssl.config.comparable import baseline_of, deciding
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import UserError


@dataclass
class RunGroup:
    """Runs of one recipe that differ in nothing but the seed; each seed counts once.

    Attributes:
        name: of the recipe.
        source: of its variants.
        seeds: in ascending order.
        by_seed: for each metric, its values by seed, in ascending order.
        seconds: of each run.
        baseline: the runs of the same recipe without variants, if there are any and this group has variants.
        repeats: for each seed with more than one run, the directory that counts, and those that are left out.
    """

    name: str
    source: str
    seeds: list[int] = field(default_factory=list)
    by_seed: dict[str, dict[int, float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    baseline: RunGroup | None = None
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
    by_key: dict[str, dict[int, list[FinishedRun]]] = {}
    for path in found:
        run = FinishedRun(path.parent, load(Recipe, path.with_name("recipe.yaml")), json.loads(path.read_text()))
        by_key.setdefault(_key(deciding(run.recipe)), {}).setdefault(run.recipe.seed, []).append(run)
    groups: dict[str, RunGroup] = {}
    of_baseline: dict[str, RunGroup] = {}
    for seeds in sorted(by_key.values(), key=_place):
        group, recipe = _group(seeds), _any(seeds).recipe
        groups[_key(deciding(recipe))] = group
        if not recipe.uses_variants():
            of_baseline.setdefault(_key(baseline_of(recipe)), group)
    for key, seeds in by_key.items():
        recipe = _any(seeds).recipe
        if recipe.uses_variants():
            groups[key].baseline = of_baseline.get(_key(baseline_of(recipe)))
    return list(groups.values())


def _group(seeds: dict[int, list[FinishedRun]]) -> RunGroup:
    """Returns the group of runs of one recipe, by seed, each in the order in which they finished."""
    recipe = _any(seeds).recipe
    group = RunGroup(recipe.name, recipe.variants.source if recipe.uses_variants() else "none", sorted(seeds))
    for seed in group.seeds:
        *repeats, run = seeds[seed]
        group.seconds.append(run.results["seconds"])
        for metric, value in run.results["metrics"].items():
            group.by_seed.setdefault(metric, {})[seed] = value
        if repeats:
            group.repeats[seed] = run.folder, [one.folder for one in repeats]
    return group


def _any(seeds: dict[int, list[FinishedRun]]) -> FinishedRun:
    return next(iter(seeds.values()))[0]


def _place(seeds: dict[int, list[FinishedRun]]) -> tuple[str, str, int]:
    recipe = _any(seeds).recipe
    return recipe.name, recipe.variants.source, min(seeds)


def _key(settings: dict[str, Any]) -> str:
    """Returns one text for all runs that these settings decide, whatever their seed."""
    return json.dumps(settings | {"seed": None}, sort_keys=True)


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Returns the mean and the half-width of its 95 % t-interval; the latter is nan for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    from scipy.stats import t

    return mean, float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
