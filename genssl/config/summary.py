"""Summaries of finished runs, read from their directories; imports no torch."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import UserError


@dataclass
class RunGroup:
    """Runs of one recipe that differ in nothing but the seed.

    Attributes:
        name: of the recipe.
        source: of its variants.
        seeds: in ascending order.
        metrics: for each metric, its values in the order of the seeds.
        seconds: of each run.
        baseline: the runs of the same recipe without variants, if there are any and this group has variants.
    """

    name: str
    source: str
    seeds: list[int] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    baseline: RunGroup | None = None

    def differences(self, metric: str) -> list[float]:
        """Returns this group's value minus the baseline's, for each seed that both have."""
        assert self.baseline is not None
        other = dict(zip(self.baseline.seeds, self.baseline.metrics.get(metric, []), strict=False))
        own = zip(self.seeds, self.metrics.get(metric, []), strict=False)
        return [value - other[seed] for seed, value in own if seed in other]


def summarise_runs(folder: Path) -> list[RunGroup]:
    """Reads every finished run directly below a folder.

    Raises:
        UserError: if there is none.
    """
    found = sorted(folder.glob("*/results.json"))
    if not found:
        raise UserError(
            f"{folder}: holds no finished run (no */results.json); give the folder that --out directories lie in"
        )
    runs: list[tuple[Recipe, dict[str, Any]]] = [
        (load(Recipe, path.with_name("recipe.yaml")), json.loads(path.read_text())) for path in found
    ]
    groups: dict[str, RunGroup] = {}
    baselines: dict[str, str] = {}
    for recipe, results in sorted(runs, key=lambda run: (run[0].name, run[0].variants.source, run[0].seed)):
        key = recipe.model_copy(update={"seed": 0}).model_dump_json()
        group = groups.setdefault(
            key, RunGroup(recipe.name, recipe.variants.source if recipe.uses_variants() else "none")
        )
        group.seeds.append(recipe.seed)
        group.seconds.append(results["seconds"])
        for metric, value in results["metrics"].items():
            group.metrics.setdefault(metric, []).append(value)
        baselines[key] = _without_variants(recipe)
    for key, group in groups.items():
        if baselines[key] != key:
            group.baseline = groups.get(baselines[key])
    return list(groups.values())


def _without_variants(recipe: Recipe) -> str:
    """Returns the key of the group that differs from this recipe's in `variants.source: none` alone."""
    variants = recipe.variants.model_copy(update={"source": "none"})
    return recipe.model_copy(update={"seed": 0, "variants": variants}).model_dump_json()


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Returns the mean and the half-width of its 95 % t-interval; the latter is nan for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    from scipy.stats import t

    return mean, float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
