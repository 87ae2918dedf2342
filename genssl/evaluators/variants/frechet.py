"""Frechet distance between the features of real images and of variants."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from genssl.errors import DataError
from genssl.evaluators.base import EvaluationData, EvaluatorBase, FrozenEncoder
from genssl.evaluators.configs import FrechetConfig
from genssl.evaluators.representation.similarity import Matrix, narrowed
from genssl.evaluators.variants.compared import compared, facts, require

log = logging.getLogger(__name__)


class Frechet(EvaluatorBase[FrechetConfig]):
    """The distance of variants to other real images, beside that of their real sources to the same images."""

    Config = FrechetConfig

    def check(self, data: EvaluationData) -> None:
        """Raises DataError if there are no variants, or fewer than four images."""
        require(self._config, data, 4)

    def run(self, encoder: FrozenEncoder, data: EvaluationData) -> Iterator[tuple[str, float]]:
        """Yields ("distance", of variants) and ("distance_of_real", of their sources), at least 0, lower is better."""
        found = compared(encoder, self._config, data, self._config.variant_index)
        count, dimensions = found.variants.shape
        self.protocol = {
            "of": "Gaussians fitted to features; variants, or their sources, against other real images",
            "images": count,
            "dimensions": dimensions,
            "variant_index": self._config.variant_index,
            **facts(self._config, data),
        }
        if warning := too_few(count, dimensions):
            log.warning("evaluate.frechet: %s", warning)
            self.protocol["warning"] = warning
        yield "distance", frechet_distance(found.variants, found.others)
        yield "distance_of_real", frechet_distance(found.sources, found.others)


def frechet_distance(x: Matrix, y: Matrix) -> float:
    """Squared Frechet (Wasserstein-2) distance of Gaussians fitted to two sets of features.

    |m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^1/2) with means m and covariances S, unbiased by n - 1 (Heusel et al.
    2017, arXiv 1706.08500, equation 6). With S = A'A of the centred, scaled features A, the eigenvalues of S_x S_y are
    the squared singular values of A_x A_y'. So the trace of the root is their sum: no matrix root, nothing complex or
    negative, also with fewer images than dimensions, and without the digits that covariances lose by squaring.

    Args:
        x, y: features [N, D] of two sets of N images each, 2 or more; computed in float64.

    Raises:
        DataError: if the sets are not equally large: the estimate falls with the number of images, so distances of
            different numbers cannot be compared.
    """
    x, y = (torch.as_tensor(one).to(torch.float64) for one in (x, y))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features must be [N, D] and [N, D], not {tuple(x.shape)} and {tuple(y.shape)}")
    if len(x) != len(y) or len(x) < 2:
        raise DataError(
            f"frechet: {len(x)} images against {len(y)}; the distance depends on their number, so give two sets of "
            "equally many images, at least two"
        )
    means = x.mean(dim=0), y.mean(dim=0)
    a, b = (_rooted(one - mean) for one, mean in zip((x, y), means, strict=True))
    shared = torch.linalg.svdvals(a @ b.T).sum()
    squared = (means[0] - means[1]).square().sum() + a.square().sum() + b.square().sum() - 2 * shared
    return max(0.0, float(squared))  # below 0 by rounding alone


def too_few(images: int, dimensions: int) -> str | None:
    """Returns what to say of a distance from so few images, or None."""
    if images > dimensions:
        return None
    return (
        f"{images} images a set are no more than the {dimensions} dimensions of the features: the covariances are "
        "singular and the distance is far too large; compare it with distances of as many images only, or give more"
    )


def _rooted(centred: torch.Tensor) -> torch.Tensor:
    """Returns A [min(N, D), D] with A'A the covariance of centred features [N, D]."""
    root: torch.Tensor = narrowed(centred.T).T / (len(centred) - 1) ** 0.5
    return root
