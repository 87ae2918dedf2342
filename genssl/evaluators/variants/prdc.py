"""Precision, recall, density and coverage of variants (Naeem et al. 2020, arXiv 2002.09797)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from genssl.errors import DataError
from genssl.evaluators.base import EvaluationData, EvaluatorBase, FrozenEncoder
from genssl.evaluators.configs import PRDCConfig
from genssl.evaluators.representation.similarity import Matrix
from genssl.evaluators.variants.compared import compared, facts, require

ELEMENTS = 4_000_000  # of the matrix of distances, in memory at a time


class PRDC(EvaluatorBase[PRDCConfig]):
    """Variants against other real images, beside their real sources against the same images."""

    Config = PRDCConfig

    def check(self, data: EvaluationData) -> None:
        """Raises DataError if there are no variants, or too few images for k neighbours."""
        require(self._config, data, 2 * (self._config.k + 1))

    def run(self, encoder: FrozenEncoder, data: EvaluationData) -> Iterator[tuple[str, float]]:
        """Yields the four, of variants and ("..._of_real") of their sources; higher is better."""
        found = compared(encoder, self._config, data, self._config.variant_index)
        count = len(found.variants)
        self.protocol = {
            "of": "variants, or their sources, against other real images; strictly inside the balls",
            "images": count,
            "k": self._config.k,
            "coverage_if_equally_distributed": round(expected_coverage(count, count, self._config.k), 4),
            "variant_index": self._config.variant_index,
            **facts(self._config, data),
        }
        for suffix, features in (("", found.variants), ("_of_real", found.sources)):
            for name, value in asdict(prdc(found.others, features, k=self._config.k)).items():
                yield f"{name}{suffix}", value


@dataclass(frozen=True)
class Scores:
    """How generated images lie among real ones.

    Attributes:
        precision: part of the generated images that lie in the ball of a real one, 0..1.
        recall: part of the real images that lie in the ball of a generated one, 0..1.
        density: balls of real images that a generated one lies in, over k; about 1 if equally distributed, may be more.
        coverage: part of the real images with a generated one in their ball, 0..1.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: Matrix, generated: Matrix, k: int = 5) -> Scores:
    """Compares two sets of features; the ball of an image reaches to its k-th nearest neighbour in its own set.

    "In" is strict, as in the authors' code. Distances are Euclidean, in float64, by differences: the shortcut over
    inner products would tell an image from its copy. Memory is bounded; time grows with N M D.

    Args:
        real, generated: features [N, D] and [M, D].
        k: below N and M.

    Raises:
        DataError: if k is not below both.
    """
    x, y = (torch.as_tensor(one).to(torch.float64) for one in (real, generated))
    if min(len(x), len(y)) <= k:
        raise DataError(f"prdc: k is {k}, but there are {len(x)} real and {len(y)} generated images; lower k")
    radii_x, radii_y = _radii(x, k), _radii(y, k)
    precise = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    recalled = covered = inside = 0
    for rows, distances in _distances(x, y):
        within = distances < radii_x[rows, None]
        precise |= within.any(dim=0)
        inside += int(within.sum())
        covered += int(within.any(dim=1).sum())
        recalled += int((distances < radii_y).any(dim=1).sum())
    return Scores(
        precision=float(precise.double().mean()),
        recall=recalled / len(x),
        density=inside / (k * len(y)),
        coverage=covered / len(x),
    )


def expected_coverage(real: int, generated: int, k: int) -> float:
    """Returns the coverage to be expected of equal distributions, 1 - prod (N - t) / (N + M - t) over t = 1..k.

    It is that none of an image's k nearest neighbours among all others is generated (Naeem et al. 2020, section 3.4),
    about 1 - 2^-k for equally large sets.

    Args:
        real, generated: N and M, the sizes of the sets.
        k: of the neighbours.
    """
    return 1 - math.prod((real - t) / (real + generated - t) for t in range(1, k + 1))


def _radii(x: torch.Tensor, k: int) -> torch.Tensor:
    """Returns the distance [N] to the k-th nearest other row; the nearest of all is the row itself."""
    return torch.cat([distances.kthvalue(k + 1, dim=1).values for _, distances in _distances(x, x)])


def _distances(x: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    step = max(1, ELEMENTS // len(y))
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        yield rows, torch.cdist(x[rows], y, compute_mode="donot_use_mm_for_euclid_dist")
