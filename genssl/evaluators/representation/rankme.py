"""RankMe: the effective rank of a representation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from genssl.base.devices import stream
from genssl.data.base import ImageDataset
from genssl.errors import DataError
from genssl.evaluators.base import EvaluationData, EvaluatorBase, FrozenEncoder
from genssl.evaluators.configs import RankMeConfig

EPSILON = 1e-7


class RankMe(EvaluatorBase[RankMeConfig]):
    """The exponential of the entropy of the singular values of the features of train images, labelled or not."""

    Config = RankMeConfig

    def check(self, data: EvaluationData) -> None:
        """Raises DataError if there is one image only."""
        require_two(data.train, "evaluate.rankme")

    def run(self, encoder: FrozenEncoder, data: EvaluationData) -> Iterator[tuple[str, float]]:
        """Yields ("effective_rank", value), between 1 and the smaller of images and dimensions."""
        rows = drawn_rows(data.train, self._config.images, "rankme", self._config.seed)
        features = encoder.encode_rows(data.train, rows)
        self.protocol = {
            "of": "singular values of the uncentred features, without augmentation",
            "epsilon": EPSILON,
            "images": len(rows),
            "dimensions": features.shape[1],
            "split": "train",
            "seed": self._config.seed,
        }
        yield "effective_rank", rankme(features.to(encoder.device))


def rankme(features: torch.Tensor) -> float:
    """Returns exp(-sum p log p), p = s / |s|_1 + 1e-7, of the singular values s of features float [N, D].

    Equations 1 and 2 of Garrido et al. 2023 (arXiv 2210.02885). The values are those of the matrix itself, uncentred:
    not the eigenvalues of its covariance, which are their squares and give a smaller number. Of features that are all
    zero it is 0.
    """
    values = torch.linalg.svdvals(features.double())
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total + EPSILON
    return float(torch.exp(-(shares * shares.log()).sum()))


def drawn_rows(dataset: ImageDataset, count: int, *name: object) -> list[int]:
    """Returns `count` rows of a split, or all if there are fewer, drawn from the stream of that name, in order."""
    order: list[int] = torch.randperm(len(dataset), generator=stream(*name))[:count].sort().values.tolist()
    return order


def require_two(dataset: ImageDataset, setting: str) -> None:
    """Raises DataError, naming `setting`, if a split has one image only."""
    if len(dataset) < 2:
        raise DataError(f"{setting}: two images are needed and {dataset.name} has {len(dataset)} here; give more")
