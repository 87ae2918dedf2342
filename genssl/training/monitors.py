"""What is watched while a run trains: whether the representation collapses, and how well its neighbours agree."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from genssl.base.devices import stream
from genssl.base.ranks import ALONE, Ranks
from genssl.config.recipe import MonitorConfig, Recipe
from genssl.data.base import ImageDataset
from genssl.errors import ConfigError
from genssl.evaluators.probes.knn import merge_nearest, nearest, vote

SPREAD, RANK, KNN = "representation_std", "effective_rank", "knn_top1"
LEAST_SPREAD, LEAST_RANK = 0.05, 2.0  # below either, no image or hardly any can be told from another
LASTING = 2  # epochs: in the first one the running statistics of batch norm may lag so far that a spread means nothing
BATCH = 256


class Monitor:
    """Measures the representation between epochs; changes nothing of the training.

    Queries of online kNN are from the part of train that is held out, if there is one.

    Raises:
        ConfigError: if online kNN is asked for and cannot be had.
    """

    def __init__(
        self, recipe: Recipe, train: ImageDataset, held_out: ImageDataset | None, device: torch.device
    ) -> None:
        self._config: MonitorConfig = recipe.monitor
        self._train, self._asked, self._device = train, held_out or train, device
        draws = stream("monitor", recipe.seed)
        self._images = torch.randperm(len(self._asked), generator=draws).tolist()[: self._config.images]
        self._bank: list[int] = []
        self._queries: list[int] = []
        if self._config.knn_every_epochs is not None:
            self._bank, self._queries = self._split(draws)
        self.protocol: dict[str, Any] = {
            "images": len(self._images),
            "of": "the held-out part of train" if held_out is not None else "train",
            **({"bank": len(self._bank), "queries": len(self._queries)} if self._queries else {}),
            **({"k": self._config.k, "temperature": self._config.temperature} if self._queries else {}),
        }

    def measure(self, method: Any, epoch: int, ranks: Ranks = ALONE) -> dict[str, float]:
        """Returns spread and effective rank, and kNN accuracy after every so many epochs.

        All ranks call this; each encodes its part of the bank, and what the first one gets is to be used. The method is
        in training mode before and afterwards.
        """
        measured = spread_and_rank(self._encode(method, self._asked, self._images)) if ranks.first else {}
        if not self._queries or epoch % (self._config.knn_every_epochs or 1):
            return measured
        # With fewer images in the bank than ranks some look at the same ones, and only the first of them counts.
        mine = self._bank[ranks.rank % len(self._bank) :: ranks.size]
        queries = self._encode(method, self._asked, self._queries)
        k = min(self._config.k, len(self._bank))
        similarity, rows = nearest(self._encode(method, self._train, mine), queries, min(k, len(mine)))
        shards = ranks.gather((similarity, _labels(self._train, mine)[rows]))[: len(self._bank)]
        if all(near.isfinite().all() for near, _ in shards):
            similarity, labels = merge_nearest(shards, k)
            classes = len(self._train.class_names or ())
            predicted = vote(similarity, labels, temperature=self._config.temperature, num_classes=classes)
            measured[KNN] = (predicted == _labels(self._asked, self._queries)).float().mean().item()
        return measured

    def summary(self, rows: Sequence[dict[str, Any]], best: float | None, collapse: str | None) -> dict[str, Any]:
        """Returns what results.json says of the last epoch, and of the best kNN if it was measured."""
        last = rows[-1] if rows else {}
        measured = {name: last[name] for name in (SPREAD, RANK) if name in last}
        if best is not None:
            measured |= {f"best_{KNN}": best, "best_epoch": next(row["epoch"] for row in rows if row.get(KNN) == best)}
        return {**measured, "collapse": collapse or "none", "protocol": self.protocol}

    @torch.no_grad()
    def _encode(self, method: Any, dataset: ImageDataset, rows: Sequence[int]) -> torch.Tensor:
        parts = []
        method.eval()
        try:
            for start in range(0, len(rows), BATCH):
                images = np.stack([dataset.image(row) for row in rows[start : start + BATCH]])
                parts.append(method.encode(torch.from_numpy(images).to(self._device).float() / 255).float().cpu())
        finally:
            method.train()
        return torch.cat(parts)

    def _split(self, draws: torch.Generator) -> tuple[list[int], list[int]]:
        """Returns the rows of the bank, in train, and of the queries; where both are in train, no row is in both."""
        if self._train.class_names is None:
            raise ConfigError(
                [f"monitor.knn_every_epochs: online kNN needs labels and {self._train.name} has none; remove it"]
            )
        bank = _labelled(self._train, draws)
        if self._asked is not self._train:
            queries = _labelled(self._asked, draws)
        else:
            # A third at most, so that a small data set keeps neighbours to ask.
            count = min(self._config.queries, len(bank) // 3)
            queries, bank = bank[:count], bank[count:]
        if not queries or not bank:
            raise ConfigError(
                [
                    f"monitor.knn_every_epochs: {self._train.name} has {len(bank)} labelled images for the bank and "
                    f"{len(queries)} for queries; give labels, or remove it"
                ]
            )
        return bank[: self._config.bank], queries[: self._config.queries]


def spread_and_rank(features: torch.Tensor) -> dict[str, float]:
    """Measures two kinds of collapse of a representation float [N, D].

    The spread is the standard deviation of a dimension of the features scaled to unit length, averaged over the
    dimensions, times sqrt(D) (Chen and He 2021, arXiv 2011.10566, section 4.1): 1 where they point everywhere, 0 where
    all images have one feature. The effective rank is the exponential of the entropy of the singular values
    (Roy and Vetterli 2007; RankMe, arXiv 2210.02885), of the centred features, since the mean of ReLU features would
    hide the rest: the number of dimensions that the images vary in.
    """
    if not features.isfinite().all():
        return {SPREAD: 0.0, RANK: 0.0}
    unit = F.normalize(features.double(), dim=1)
    spread = unit.std(dim=0, unbiased=False).mean().item() * features.shape[1] ** 0.5
    values = torch.linalg.svdvals(unit - unit.mean(dim=0))
    if values.sum() < 1e-9:
        return {SPREAD: spread, RANK: 0.0}
    shares = values / values.sum()
    rank = torch.special.entr(shares).sum().exp().item()
    return {SPREAD: spread, RANK: rank}


def collapse_of(row: dict[str, Any]) -> str | None:
    """Says in words how the representation of an epoch has collapsed; None if it has not."""
    spread, rank = row.get(SPREAD), row.get(RANK)
    if spread is None or rank is None:
        return None
    if spread < LEAST_SPREAD:
        return f"all images have nearly the same representation (spread {spread:.2g}; 1 is best, 0 is one point)"
    if rank < LEAST_RANK:
        return f"the images differ in hardly more than one direction (effective rank {rank:.2g})"
    return None


def warning_of(rows: Sequence[dict[str, Any]], lr: float) -> str | None:
    """Returns what to say of a run whose last epochs are collapsed, for the user and results.json; None if not."""
    collapsed = list(takewhile(lambda row: collapse_of(row) is not None, reversed(rows)))
    if len(collapsed) < LASTING:
        return None
    return (
        f"the representation has collapsed since epoch {collapsed[-1]['epoch']}: {collapse_of(rows[-1])}. "
        f"Lower optimizer.lr (it is {lr:g}), or look at the method's own settings against collapse"
    )


def _labelled(dataset: ImageDataset, draws: torch.Generator) -> list[int]:
    order: list[int] = torch.randperm(len(dataset), generator=draws).tolist()
    return [row for row in order if dataset.label(row) >= 0]


def _labels(dataset: ImageDataset, rows: Sequence[int]) -> torch.Tensor:
    return torch.tensor([dataset.label(row) for row in rows])
