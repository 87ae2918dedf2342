"""Losses of the methods: pure functions, no modules, no state, no communication between ranks.

Rows of equal place belong to the same source. `weights` float [N] say how much each source's pair counts; they have
mean 1, so that equal weights are no weights. Inside autocast the losses compute in float32 all the same: logits divided
by a temperature of 0.1 need more than the 8 bits of bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F

P = ParamSpec("P")


def _in_full_precision(loss: Callable[P, torch.Tensor]) -> Callable[P, torch.Tensor]:
    """Switches autocast off and turns half-precision arguments into float32."""

    def widened(value: Any) -> Any:
        half = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if half else value

    @functools.wraps(loss)
    def full(*args: P.args, **kwargs: P.kwargs) -> torch.Tensor:
        device = next(value.device.type for value in args if isinstance(value, torch.Tensor))
        with torch.autocast(device, enabled=False):
            return loss(*map(widened, args), **{name: widened(value) for name, value in kwargs.items()})

    return full


def _average(losses: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return losses.mean() if weights is None else (losses * weights).mean()


@_in_full_precision
def nt_xent(
    z1: torch.Tensor, z2: torch.Tensor, temperature: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Normalised temperature-scaled cross entropy (SimCLR, equation 1), averaged over all 2 N anchors.

    google-research/simclr reports twice this value (it sums the two directions).

    Args:
        z1, z2: projections float [N, D] of the two views; row i of both is the same source. Any scale.
        temperature: above 0.
        weights: float [N] with mean 1; a source's weight applies to both of its anchors, and to no negative.

    Returns:
        The scalar loss.
    """
    n = len(z1)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(float("-inf"))
    positives = torch.arange(2 * n, device=z.device).roll(n)
    if weights is None:
        return F.cross_entropy(similarity, positives)
    return _average(F.cross_entropy(similarity, positives, reduction="none"), weights.repeat(2))


@_in_full_precision
def multi_positive_nt_xent(
    z: torch.Tensor,
    temperature: float,
    view_weights: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """NT-Xent whose anchors have all other views of their source as positives (StableRep, arXiv 2306.00984, eq. 2-3).

    The cross entropy between the distribution over the other rows that the similarities give, and one that is spread
    over the positives in proportion to their views' weights (uniformly in StableRep). With two views it is `nt_xent`.

    Args:
        z: projections float [V, N, D] of V >= 2 views. Any scale.
        temperature: above 0.
        view_weights: float [V], above 0; of a view as a positive, and as an anchor. None: all the same.
        weights: float [N] with mean 1.

    Returns:
        The scalar loss, averaged over the V N anchors with their weights.
    """
    v, n, _ = z.shape
    if view_weights is None:
        view_weights = z.new_ones(v)
    z = F.normalize(z.flatten(0, 1), dim=1)
    itself = torch.eye(v * n, dtype=torch.bool, device=z.device)
    log_p = (z @ z.T / temperature).masked_fill(itself, float("-inf")).log_softmax(dim=1).masked_fill(itself, 0)
    source = torch.arange(n, device=z.device).repeat(v)
    view_weight = view_weights.to(z.dtype).repeat_interleave(n)
    target = ((source[:, None] == source) & ~itself) * view_weight
    losses = -(target / target.sum(dim=1, keepdim=True) * log_p).sum(dim=1)
    return _average(losses * view_weight / view_weights.mean(), None if weights is None else weights.repeat(v))


@_in_full_precision
def negative_cosine(p: torch.Tensor, z: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Negative cosine similarity (SimSiam, equation 1), averaged over the rows; the caller stops z's gradient.

    Args:
        p: predictions float [N, D]. Any scale.
        z: projections float [N, D]. Any scale.
        weights: float [N] with mean 1.

    Returns:
        The scalar loss, in [-1, 1].
    """
    return _average(-(F.normalize(p, dim=1) * F.normalize(z, dim=1)).sum(dim=1), weights)


def byol(q: torch.Tensor, z: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Squared distance of unit vectors, 2 - 2 cosine (BYOL, equation 2), averaged over the rows.

    Arguments as those of `negative_cosine`. BYOL adds this loss of both directions.
    """
    return 2 + 2 * negative_cosine(q, z, weights)


@_in_full_precision
def barlow_twins(
    z1: torch.Tensor, z2: torch.Tensor, off_diagonal_weight: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Distance of the cross-correlation matrix from the identity (Barlow Twins, equations 1 and 2), summed.

    Each dimension is normalised over the batch as by batch norm (biased variance, epsilon 1e-5), as in the official
    code.

    Args:
        z1, z2: projections float [N, D] of the two views, of the global batch: the statistics are over its rows.
        off_diagonal_weight: the paper's lambda.
        weights: float [N] with mean 1. Statistics and correlations are weighted, so that a weight of 2 is a source that
            occurs twice.

    Returns:
        The scalar loss.
    """
    share = (z1.new_ones(len(z1)) if weights is None else weights).unsqueeze(1) / len(z1)

    def normalised(z: torch.Tensor) -> torch.Tensor:
        centred = z - (share * z).sum(dim=0)
        return centred / ((share * centred.square()).sum(dim=0) + 1e-5).sqrt()

    correlation = normalised(z1).T @ (share * normalised(z2))
    on_diagonal = (correlation.diagonal() - 1).square().sum()
    return on_diagonal + off_diagonal_weight * correlation.square().fill_diagonal_(0).sum()


@_in_full_precision
def info_nce(
    q: torch.Tensor,
    k: torch.Tensor,
    queue: torch.Tensor,
    temperature: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """InfoNCE of queries with their keys against a queue of negatives (MoCo, equation 1), averaged over the rows.

    Args:
        q: queries float [N, D]. Any scale.
        k: keys float [N, D]; the caller stops their gradient. Any scale.
        queue: float [K, D], rows of unit length.
        temperature: above 0.
        weights: float [N] with mean 1.

    Returns:
        The scalar loss.
    """
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / temperature
    return _average(F.cross_entropy(logits, logits.new_zeros(len(q), dtype=torch.int64), reduction="none"), weights)


@_in_full_precision
def vicreg(
    z1: torch.Tensor,
    z2: torch.Tensor,
    invariance_weight: float,
    variance_weight: float,
    covariance_weight: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Variance, invariance, covariance (VICReg, equation 6).

    As the official code and unlike equation 5, the invariance term is averaged over dimensions too, and the variance
    term is the mean of the two views'; variances are unbiased and epsilon is 1e-4.

    Args:
        z1, z2: embeddings float [N, D] of the two views, N >= 2, of the global batch: the statistics are over its rows.
        invariance_weight, variance_weight, covariance_weight: the paper's lambda, mu and nu.
        weights: float [N] with mean 1. They apply to the invariance term; the others are of the batch, not of pairs.

    Returns:
        The scalar loss.
    """
    n, d = z1.shape
    loss = invariance_weight * _average((z1 - z2).square().mean(dim=1), weights)
    for z in (z1, z2):
        centred = z - z.mean(dim=0)
        covariance = centred.T @ centred / (n - 1)
        deviation = (covariance.diagonal() + 1e-4).sqrt()
        loss = loss + variance_weight * F.relu(1 - deviation).mean() / 2
        loss = loss + covariance_weight * covariance.square().fill_diagonal_(0).sum() / d
    return loss


@_in_full_precision
def nnclr(
    neighbours: torch.Tensor, p: torch.Tensor, temperature: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """InfoNCE of nearest neighbours with predictions, the other rows being negatives (NNCLR, equation 4).

    Args:
        neighbours: float [N, D], the nearest neighbours of one view's embeddings; no gradient. Any scale.
        p: predictions float [N, D] of the other view, of the global batch: all rows are negatives. Any scale.
        temperature: above 0.
        weights: float [N] with mean 1.

    Returns:
        The scalar loss, averaged over the rows.
    """
    logits = F.normalize(neighbours, dim=1) @ F.normalize(p, dim=1).T / temperature
    own = torch.arange(len(p), device=p.device)
    return _average(F.cross_entropy(logits, own, reduction="none"), weights)


@_in_full_precision
def dino(
    teacher: torch.Tensor,
    student: torch.Tensor,
    centre: torch.Tensor,
    teacher_temperature: float | torch.Tensor,
    student_temperature: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy of the student's distribution with the centred, sharpened one of the teacher (DINO, equation 2).

    Args:
        teacher: logits float [N, K] of one view; the caller stops their gradient.
        student: logits float [N, K] of another view.
        centre: float [K].
        teacher_temperature, student_temperature: above 0.
        weights: float [N] with mean 1.

    Returns:
        The scalar loss, averaged over the rows.
    """
    target = ((teacher - centre) / teacher_temperature).softmax(dim=1)
    return _average(-(target * (student / student_temperature).log_softmax(dim=1)).sum(dim=1), weights)
