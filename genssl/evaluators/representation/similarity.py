"""How similar two representations of the same images are: linear CKA and orthogonal Procrustes distance.

Everything is float64, on the device of the features. Shapes: N images, P and Q features, R bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from genssl.errors import DataError

Matrix = torch.Tensor | npt.NDArray[Any]
Estimator = Literal["biased", "debiased"]
Centring = Literal["features", "legacy_paper"]

CONFIDENCE = 0.95
FEWEST_FOR_INTERVAL = 20
CONSTANT = 1e-6  # spread of features relative to their size, below which it is rounding of an encoder in float32
ROWS = 1024  # of the Gram matrices, in memory at a time
RESAMPLES = 256  # weighed at a time


@dataclass(frozen=True)
class Interval:
    """A statistic with its 95 % bootstrap interval over images."""

    value: float
    low: float
    high: float


def cka(x: Matrix, y: Matrix, *, estimator: Estimator = "debiased") -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414).

    The biased estimate lies in [0, 1] and, of unrelated features, far above 0 unless there are many more images than
    features. The debiased one divides the unbiased HSIC_1 (Song et al. 2007; Nguyen et al. 2020, arXiv 2010.15327,
    equation 3), is about 0 then, and may be slightly negative.

    Args:
        x, y: features [N, P] and [N, Q] of the same N images, in the same order; 4 images or more.

    Raises:
        DataError: if there are fewer images, or all have the same features in one of the two.
    """
    x, y = features_pair(x, y)
    return float(_cka(x, y, torch.ones((1, len(x)), dtype=x.dtype, device=x.device), estimator)[0])


def opd(x: Matrix, y: Matrix, *, centring: Centring = "features") -> float:
    """Orthogonal Procrustes distance (Ding, Denain and Steinhardt 2021, arXiv 2108.01661, section 2).

    Both matrices are centred and divided by their Frobenius norm; what is left of their squared Frobenius distance
    after the best rotation is 2 - 2 ||X'Y||_nuclear, in [0, 2]. Its square root is a metric. Widths may differ.

    Args:
        x, y: features [N, P] and [N, Q] of the same N images, in the same order.
        centring: "features" takes the mean over images from each feature, as Ding et al. do. "legacy_paper" takes the
            mean over features from each image, as the released code of arXiv 2403.05966 does: the mean image stays in,
            and of unrelated features that share one the distance is far too small.

    Raises:
        DataError: if there are fewer than 4 images, or all have the same features in one of the two.
    """
    x, y = features_pair(x, y)
    return _opd(_precentred(x, centring), _precentred(y, centring), centring)


def bootstrap_cka(
    x: Matrix, y: Matrix, *, estimator: Estimator = "debiased", resamples: int = 1000, seed: int = 0
) -> Interval:
    """Returns `cka` with the percentile interval over images drawn with replacement.

    An image drawn twice would meet itself in the Gram matrices, and bring back the bias that HSIC_1 takes out. So the
    debiased resamples are weighted U-statistics over distinct images, weights being how often each was drawn; their
    percentiles are taken as they are. The biased resamples have the bias of fewer images; the percentiles are moved by
    the difference between their mean and the estimate.

    Args:
        x, y: see `cka`; 20 images or more.
        resamples: how many; memory does not grow with them.
        seed: of the draws; equal seeds draw the same images for every statistic.
    """
    x, y = features_pair(x, y, fewest=FEWEST_FOR_INTERVAL)
    drawn = [
        _cka(x, y, torch.from_numpy(counts).to(x), estimator) for counts in _counts(len(x), resamples, seed, RESAMPLES)
    ]
    value = cka(x, y, estimator=estimator)
    return interval(value, torch.cat(drawn).cpu().numpy(), recentred=estimator == "biased", most=1.0)


def bootstrap_opd(
    x: Matrix, y: Matrix, *, centring: Centring = "features", resamples: int = 1000, seed: int = 0
) -> Interval:
    """Returns `opd` with the percentile interval over images drawn with replacement.

    Resamples have fewer distinct images than there are, which lowers the distance; the percentiles are moved by the
    difference between their mean and the estimate. One singular value decomposition a resample.

    Args:
        x, y: see `opd`; 20 images or more.
        resamples, seed: see `bootstrap_cka`.
    """
    x, y = features_pair(x, y, fewest=FEWEST_FOR_INTERVAL)
    x, y = narrowed(_precentred(x, centring)), narrowed(_precentred(y, centring))
    drawn = []
    for counts in _counts(len(x), resamples, seed, 1):
        rows = torch.from_numpy(np.repeat(np.arange(len(x)), counts[0])).to(x.device)
        drawn.append(_opd(x[rows], y[rows], centring))
    return interval(_opd(x, y, centring), np.array(drawn), recentred=True, least=0.0, most=2.0)


def interval(
    value: float, drawn: npt.NDArray[np.float64], *, recentred: bool, least: float = -np.inf, most: float = np.inf
) -> Interval:
    """Returns the 2.5th and 97.5th percentile of resampled values, within [least, most].

    Args:
        value: the statistic of the sample.
        drawn: that of the resamples.
        recentred: moves the percentiles by value - mean(drawn).

    Raises:
        DataError: if some of them are not defined, since too few images differ from the rest.
    """
    if undefined := int((~np.isfinite([value, *drawn])).sum()):
        raise DataError(
            f"similarity: {undefined} of {len(drawn)} resamples have no value, since an encoder gives nearly all of "
            "the images the same features; give more images, or another encoder"
        )
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    shift = value - float(drawn.mean()) if recentred else 0.0
    return Interval(value, max(least, float(low) + shift), min(most, float(high) + shift))


def features_pair(x: Matrix, y: Matrix, fewest: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns both as float64 [N, P] and [N, Q], scaled so that the mean variance of the features is 1.

    Raises:
        ValueError: if they are not two matrices of as many rows.
        DataError: if there are fewer than `fewest` rows, or one of them has constant features.
    """
    pair = [torch.as_tensor(one) for one in (x, y)]
    if any(one.ndim != 2 for one in pair) or len(pair[0]) != len(pair[1]):
        raise ValueError(f"features must be [N, P] and [N, Q], not {[tuple(one.shape) for one in pair]}")
    if len(pair[0]) < fewest:
        raise DataError(f"similarity: {len(pair[0])} images are too few; give {fewest} or more")
    scaled = []
    for name, one in zip(("first", "second"), pair, strict=True):
        wide = one.to(torch.float64)
        centred = wide - wide.mean(dim=0)
        scale = centred.square().mean().sqrt()
        if not scale > CONSTANT * wide.abs().max():
            raise DataError(
                f"similarity: the {name} encoder gives all {len(wide)} images the same features, so nothing can be "
                "compared with it; it may have collapsed in training"
            )
        scaled.append(wide / scale)
    return scaled[0], scaled[1]


def narrowed(x: torch.Tensor) -> torch.Tensor:
    """Returns x [N, P] rotated into [N, min(N, P)], which leaves every product of its rows as it is."""
    return x if x.shape[1] <= len(x) else torch.linalg.qr(x.T, mode="r")[1].T


# ---- Procrustes ----


def _precentred(x: torch.Tensor, centring: Centring) -> torch.Tensor:
    return x if centring == "features" else x - x.mean(dim=1, keepdim=True)


def _opd(x: torch.Tensor, y: torch.Tensor, centring: Centring) -> float:
    if centring == "features":
        x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    norms = torch.linalg.matrix_norm(x), torch.linalg.matrix_norm(y)
    if min(norms) == 0:
        return float("nan")
    x, y = narrowed(x / norms[0]), narrowed(y / norms[1])
    return max(0.0, 2 - 2 * float(torch.linalg.svdvals(x.T @ y).sum()))  # at least 0 but for rounding


# ---- CKA of weighted images ----


def _counts(n: int, resamples: int, seed: int, at_a_time: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yields how often each of n images is drawn, int64 [R, n] in parts; the parts do not change the draws."""
    random = np.random.default_rng((seed, 0xB007))
    for start in range(0, resamples, at_a_time):
        yield random.multinomial(n, np.full(n, 1 / n), size=min(at_a_time, resamples - start))


def _cka(x: torch.Tensor, y: torch.Tensor, weights_RN: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """Returns CKA [R] of images with weights."""
    hsic: Callable[..., torch.Tensor] = _biased_hsic if estimator == "biased" else _unbiased_hsic
    x = x - x.mean(dim=0)  # changes no HSIC; large means would cost digits
    y = y - y.mean(dim=0)
    return hsic(x, y, weights_RN) / (hsic(x, x, weights_RN) * hsic(y, y, weights_RN)).sqrt()


def _biased_hsic(x: torch.Tensor, y: torch.Tensor, weights_RN: torch.Tensor) -> torch.Tensor:
    """Returns ||X'WY||_F^2 [R] with weighted means taken out; constant factors, which cancel in CKA, are left out."""
    pair, row, total_x, total_y = (torch.zeros(()).to(x) for _ in range(4))
    for part, gram_x, gram_y in _gram_rows(x, y):
        w = weights_RN[:, part].T
        xw, yw = gram_x @ weights_RN.T, gram_y @ weights_RN.T
        pair = pair + (w * ((gram_x * gram_y) @ weights_RN.T)).sum(0)
        row = row + (w * xw * yw).sum(0)
        total_x, total_y = total_x + (w * xw).sum(0), total_y + (w * yw).sum(0)
    n = weights_RN.sum(dim=1)
    return pair - 2 * row / n + total_x * total_y / n**2


def _unbiased_hsic(x: torch.Tensor, y: torch.Tensor, weights_RN: torch.Tensor) -> torch.Tensor:
    """Returns the weighted U-statistic [R] of HSIC over distinct images; at weights 1 it is HSIC_1 of Song et al. 2007.

    HSIC = E k_ij l_ij + E k_ij l_qr - 2 E k_ij l_iq. Each mean runs over tuples of distinct images, weighted by the
    product of their weights. Sums over all i != j contain tuples with a shared index, which are taken out again.
    """
    pair, pair_2, pair_22, row, row_2, total_x, total_y = (torch.zeros(()).to(x) for _ in range(7))
    squared_RN = weights_RN.square()
    for part, gram_x, gram_y in _gram_rows(x, y):
        inside = torch.arange(len(gram_x), device=x.device)
        gram_x[inside, part.start + inside] = 0
        gram_y[inside, part.start + inside] = 0
        w, w2 = weights_RN[:, part].T, squared_RN[:, part].T
        xw, yw, product = gram_x @ weights_RN.T, gram_y @ weights_RN.T, gram_x * gram_y
        product_w2 = product @ squared_RN.T
        pair = pair + (w * (product @ weights_RN.T)).sum(0)  # of w_i w_j k_ij l_ij
        pair_2 = pair_2 + (w * product_w2).sum(0)  # of w_i w_j^2 k_ij l_ij
        pair_22 = pair_22 + (w2 * product_w2).sum(0)  # of w_i^2 w_j^2 k_ij l_ij
        row = row + (w * xw * yw).sum(0)  # of w_i w_j w_q k_ij l_iq
        row_2 = row_2 + (w2 * xw * yw).sum(0)  # of w_i^2 w_j w_q k_ij l_iq
        total_x, total_y = total_x + (w * xw).sum(0), total_y + (w * yw).sum(0)
    p1, p2, p3, p4 = (weights_RN.pow(power).sum(dim=1) for power in (1, 2, 3, 4))
    pairs = p1**2 - p2  # sums of products of the weights of 2, 3 and 4 distinct images
    triples = p1**3 - 3 * p1 * p2 + 2 * p3
    quadruples = p1**4 - 6 * p1**2 * p2 + 3 * p2**2 + 8 * p1 * p3 - 6 * p4
    disjoint = total_x * total_y - 4 * row_2 + 2 * pair_22
    return pair / pairs + disjoint / quadruples - 2 * (row - pair_2) / triples


def _gram_rows(x: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    for start in range(0, len(x), ROWS):
        part = slice(start, min(start + ROWS, len(x)))
        yield part, x[part] @ x.T, y[part] @ y.T
