"""What a study found: the content of summary.json, from which the report is drawn."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from genssl.config.base import Section

Equal = Literal["steps", "wall_clock"]


class Estimate(Section):
    """A mean over `n` seeds with its 95 % t-interval, or a mean of paired differences with theirs.

    Accuracies are fractions; a single seed has no interval.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    n: int


class RunCost(Section):
    """What one run cost, or the mean over an arm's runs.

    A row that reads stored variants is charged with making those that it may draw (indices 0..K-1 of every image), as
    if it were the only one to use them; `StoreCost` says what was really spent.

    Attributes:
        generator_calls: variants that were generated for the row.
        generator_seconds: device time of these.
        trainer_seconds: the training loop without waiting.
        stall_seconds: what the training loop waited for variants.
        pregeneration_seconds: wall-clock that making the stored variants took before the training.
        wall_clock_seconds: pregeneration_seconds + trainer_seconds + stall_seconds; evaluation is left out.
        distinct_variants: that the run saw.
        views_from_variants: views in place of which a variant was delivered.
        reused: of these, how many stood in for another that was late or over the budget.
        real_instead: views that were to be variants and were real images.
        store_bytes: of the stored variants of the row, payload and overhead.
        bytes_received: of variants over the wire.
    """

    generator_calls: float = 0
    generator_seconds: float = 0
    trainer_seconds: float = 0
    stall_seconds: float = 0
    pregeneration_seconds: float = 0
    wall_clock_seconds: float = 0
    distinct_variants: float = 0
    views_from_variants: float = 0
    reused: float = 0
    real_instead: float = 0
    store_bytes: float = 0
    bytes_received: float = 0


class RunSummary(Section):
    """One run: an arm at a seed."""

    seed: int
    directory: str = Field(description="relative to the study's folder")
    epochs: int
    steps: int
    metrics: dict[str, float]
    cost: RunCost
    ledger: dict[str, float]
    seconds: float = Field(description="of the whole run, start-up and evaluation included")


class PaperCell(Section):
    """What the paper reports for an arm."""

    value: float = Field(description="per cent")
    differences: dict[str, float] = Field(default_factory=dict, description="by arm, in points, from absolute values")
    source: str


class ArmSummary(Section):
    """One arm over all seeds.

    Attributes:
        equal: what the arm has in common with the others: the optimiser steps, or the wall-clock of `matched`.
        control_of: the arm that this one must equal exactly, for an A/A control.
        against: arms that it is compared with.
        differences: by arm, by metric; paired by seed, this arm minus the other.
    """

    name: str
    label: str
    note: str = ""
    equal: Equal = "steps"
    matched: str | None = None
    control_of: str | None = None
    against: list[str] = Field(default_factory=list)
    runs: list[RunSummary]
    metrics: dict[str, Estimate]
    differences: dict[str, dict[str, Estimate]] = Field(default_factory=dict)
    cost: RunCost
    paper: PaperCell | None = None


class StoreCost(Section):
    """One store that the study filled, and what that took in all, however many arms read it."""

    directory: str
    generator: str
    variants_per_image: int
    variants: int
    seconds: float
    generator_seconds: float
    bytes: int


class Control(Section):
    """An A/A control: two arms that must not differ, since they see the same bytes.

    Attributes:
        max_abs_difference: over all metrics and seeds; must be 0.
        metric: that differs most.
        encoders_equal: whether the trained weights are the same bit for bit, at every seed.
    """

    arm: str
    of: str
    max_abs_difference: float
    metric: str = ""
    encoders_equal: bool


class Summary(Section):
    """A whole study.

    Attributes:
        quick: whether it was run in its short form, whose numbers mean little.
        metric: the primary one, such as "knn/top1"; the first of `metrics`, which every run has.
        reference: the arm without variants.
        equal_generator_calls: groups of arms whose numbers of generator calls agree within 10 %.
        controls: by name; "a_a" if the study has such an arm.
        verdict: sentences, the most important first, each with its uncertainty; `cautions` limit it.
        seconds: of all runs, and of making the stored variants.
        recipe: the base recipe, resolved.
        paper: what the paper's cells are, if arms have any.
    """

    format: Literal["genssl-study/1"] = "genssl-study/1"
    study: str
    title: str
    quick: bool
    metric: str
    metrics: list[str]
    seeds: list[int]
    reference: str
    arms: list[ArmSummary]
    equal_generator_calls: list[list[str]] = Field(default_factory=list)
    stores: list[StoreCost] = Field(default_factory=list)
    controls: dict[str, Control] = Field(default_factory=dict)
    verdict: list[str] = Field(default_factory=list)
    cautions: list[str] = Field(default_factory=list)
    seconds: float
    provenance: dict[str, Any]
    recipe: dict[str, Any]
    paper: str | None = None

    def arm(self, name: str) -> ArmSummary:
        """Returns the arm of a name, which must exist."""
        return next(arm for arm in self.arms if arm.name == name)
