"""How the numbers of evaluators are written and which of them stand in overviews; light, for the command line."""

from __future__ import annotations

import re

# Parts of the images, by the names that evaluators give them: "knn/top1", "few_shot/top1@5_low".
_PARTS = re.compile(r"top\d|accuracy|label_agreement|retrieval@")


def is_accuracy(metric: str) -> bool:
    """Says whether a metric such as "few_shot/top1@5_low" is a part of the images, which people read in percent."""
    return _PARTS.search(metric.rpartition("/")[2]) is not None


def is_detail(metric: str) -> bool:
    """Says whether a metric belongs to another one: its spread over draws, or an end of its interval."""
    return metric.endswith(("_std", "_low", "_high"))


def scale(metric: str) -> float:
    """Returns what a value of a metric is multiplied by to be shown: 100 for accuracies."""
    return 100.0 if is_accuracy(metric) else 1.0


def shown(metric: str, value: float) -> str:
    """Returns a value for people: accuracies in percent, "61.94 %", everything else as it is, "19", "-0.7279"."""
    return f"{100 * value:.2f} %" if is_accuracy(metric) else f"{value:.4g}"
