"""In what unit the numbers of evaluators are, how they are written, and which way is better; light, for the CLI."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower"] | None


@dataclass(frozen=True)
class Unit:
    """How values of a metric are read.

    Attributes:
        symbol: behind a value: "%", or nothing for a number without a unit.
        points: what a difference of two values is counted in: "points", or nothing.
        factor: that a value is multiplied by to be in this unit.
        better: which of two values is the better one; None where neither is, such as of a number that others are
            compared with.
    """

    symbol: str = ""
    points: str = ""
    factor: float = 1.0
    better: Better = None

    def number(self, value: float) -> str:
        """Returns a value without the symbol: two decimals of a percentage, else four digits: "61.94", "-0.7279"."""
        value *= self.factor
        if self.factor != 1.0:
            return f"{value:,.2f}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    def difference(self, value: float) -> str:
        """Returns a difference with its sign, without its unit: "+0.13"."""
        text = self.number(abs(value))
        if text == "0":
            return text
        return f"-{text}" if value < 0 and text.strip("0.,") else f"+{text}"


def _part(better: Better = None) -> Unit:
    """Returns the unit of parts of the images, which people read in percent."""
    return Unit("%", "points", 100.0, better)


# By the names that evaluators give their metrics: "knn/top1", "few_shot/top1@5_low".
UNITS: dict[str, Unit] = {
    r"(knn|linear_probe|finetune)/top\d+": _part("higher"),
    r"few_shot/top1@\d+": _part("higher"),
    r"few_shot/top1@\d+_(std|low|high)": _part(),
    r"robustness/\w+_top1": _part("higher"),
    r"semantic_consistency/(retrieval@1|label_agreement)": _part("higher"),
    r"semantic_consistency/label_agreement_of_real": _part(),
    r"semantic_consistency/cosine(_of_unrelated)?": Unit(),
    r"rankme/effective_rank": Unit(),  # a number of dimensions; more of them are not always better
    r"alignment_uniformity/(alignment|uniformity)_\w+": Unit(better="lower"),  # both are losses
    r"frechet/distance": Unit(better="lower"),
    r"frechet/distance_of_real": Unit(),
    r"prdc/(precision|recall|density|coverage)": Unit(better="higher"),
    r"prdc/(precision|recall|density|coverage)_of_real": Unit(),
    r"vendi/\w+": Unit(),  # a number of images
    r"lpips_diversity/\w+": Unit(),
}
# Of evaluators that others add.
_PARTS = re.compile(r"top\d|accuracy|label_agreement|retrieval@")


def declared(metric: str) -> Unit | None:
    """Returns the unit of a metric that an evaluator of genssl gives, or None for any other name."""
    return next((unit for pattern, unit in UNITS.items() if re.fullmatch(pattern, metric)), None)


def unit_of(metric: str) -> Unit:
    """Returns the unit of a metric such as "knn/top1".

    What another package's evaluator gives is a part of the images if its name says so ("top1", "accuracy",
    "label_agreement", "retrieval@"), and else a number without a unit.
    """
    found = declared(metric)
    if found is not None:
        return found
    return _part("higher") if _PARTS.search(metric.rpartition("/")[2]) else Unit()


def is_accuracy(metric: str) -> bool:
    """Says whether a metric such as "few_shot/top1@5_low" is a part of the images, which people read in percent."""
    return unit_of(metric).symbol == "%"


def is_detail(metric: str) -> bool:
    """Says whether a metric belongs to another one: its spread over draws, or an end of its interval."""
    return metric.endswith(("_std", "_low", "_high"))


def scale(metric: str) -> float:
    """Returns what a value of a metric is multiplied by to be shown: 100 for accuracies."""
    return unit_of(metric).factor


def shown(metric: str, value: float) -> str:
    """Returns a value for people: accuracies in percent, "61.94 %", everything else as it is, "19", "-0.7279"."""
    unit = unit_of(metric)
    return f"{unit.number(value)} {unit.symbol}".rstrip()


def difference_shown(metric: str, value: float) -> str:
    """Returns a difference of two values for people: "+0.13 points", or "+3.2 in rankme/effective_rank"."""
    unit = unit_of(metric)
    return f"{unit.difference(value)} {unit.points or f'in {metric}'}"
