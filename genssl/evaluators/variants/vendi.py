"""Vendi score: how many different images there are (Friedman and Dieng 2023, arXiv 2210.02410)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from genssl.errors import DataError
from genssl.evaluators.base import EvaluationData, EvaluatorBase, FrozenEncoder
from genssl.evaluators.configs import VendiConfig
from genssl.evaluators.representation.similarity import Matrix
from genssl.evaluators.variants.compared import draw, encoded_variants, facts, require, split_of


class Vendi(EvaluatorBase[VendiConfig]):
    """Of all variants, beside that of their sources; and of the variants of one source, on average."""

    Config = VendiConfig

    def check(self, data: EvaluationData) -> None:
        """Raises DataError if there are no variants, or fewer images than variants of a source."""
        require(self._config, data, self._config.variants)

    def run(self, encoder: FrozenEncoder, data: EvaluationData) -> Iterator[tuple[str, float]]:
        """Yields the scores; of N images a score lies in 1..N.

        Names: "variants" and "sources", of one variant of each source and of the sources; "per_source", of the variants
        of a source, and "per_draw_of_real", of as many real images drawn at random: what no generator exceeds that
        keeps to its sources.
        """
        config = self._config
        rows = draw(config, data, config.images)
        sources = encoder.encode_rows(split_of(config, data), rows)
        variants = torch.stack(
            [encoded_variants(encoder, config, data, rows, index) for index in range(config.variants)]
        )
        # Sources in the rows' random order, each beside the next ones.
        unrelated = torch.stack([sources.roll(-shift, dims=0) for shift in range(config.variants)])
        self.protocol = {
            "kernel": "cosine",
            "order": config.order,
            "images": len(rows),
            "variants_of_a_source": config.variants,
            **facts(config, data),
        }
        yield "variants", vendi_score(variants[0], order=config.order)
        yield "sources", vendi_score(sources, order=config.order)
        for name, groups in (("per_source", variants), ("per_draw_of_real", unrelated)):
            scores = [vendi_score(group, order=config.order) for group in groups.transpose(0, 1)]
            yield name, sum(scores) / len(scores)


def vendi_score(features: Matrix, *, order: float = 1.0) -> float:
    """Returns the exponential of the Renyi entropy of the eigenvalues of K / N, K the cosines of all pairs.

    Args:
        features: [N, D]; computed in float64, from singular values, so that N x N cosines are never formed.
        order: q, above 0; 1 is Shannon's entropy (equation 4), infinity 1 over the largest eigenvalue.

    Returns:
        Between 1, if all have the same direction, and N.

    Raises:
        DataError: if features are all zero, which have no direction.
    """
    x = torch.as_tensor(features).to(torch.float64)
    norms = x.norm(dim=1, keepdim=True)
    if not (norms > 0).all():
        raise DataError(
            f"vendi: the features of {int((norms <= 0).sum())} of {len(x)} images are all zero, and cosines of them do "
            "not exist; take another encoder"
        )
    shares = torch.linalg.svdvals(x / norms).square() / len(x)
    shares = shares[shares > 0]
    if order == 1:
        return float(torch.exp(-(shares * shares.log()).sum()))
    if order == math.inf:
        return float(1 / shares.max())
    return float(torch.exp((order * shares.log()).logsumexp(dim=0) / (1 - order)))
