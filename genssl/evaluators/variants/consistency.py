"""Whether variants stay what their source is, in the eyes of the encoder."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from genssl.data.base import ImageDataset
from genssl.errors import DataError
from genssl.evaluators.base import EvaluationData, EvaluatorBase, FrozenEncoder
from genssl.evaluators.configs import SemanticConsistencyConfig
from genssl.evaluators.probes.knn import knn_predict
from genssl.evaluators.variants.compared import draw, encoded_variants, facts, require, split_of

CHUNK = 1024  # queries at a time


class SemanticConsistency(EvaluatorBase[SemanticConsistencyConfig]):
    """Cosine of variants and their source, retrieval of the source, and, with labels, agreement of a kNN vote."""

    Config = SemanticConsistencyConfig

    def check(self, data: EvaluationData) -> None:
        """Raises DataError without variants or a second image, or if the sources leave no labelled images to vote."""
        require(self._config, data, 2)
        if self._labelled(data):
            rows = draw(self._config, data, self._config.images)
            if not self._bank_rows(data, rows):
                raise DataError(
                    f"evaluate.semantic_consistency.images: all {len(rows)} labelled images of the train split are "
                    "sources, and none is left to vote on labels; lower it, or set split: test"
                )

    def run(self, encoder: FrozenEncoder, data: EvaluationData) -> Iterator[tuple[str, float]]:
        """Yields means over sources and their variants.

        Names: "cosine", of a variant and its source; "cosine_of_unrelated", of a variant and another source;
        "retrieval@1", how often the source is the nearest of all sources, 0..1. With labels also "label_agreement", how
        often the vote of train images gives a variant its source's label, and "label_agreement_of_real", how often it
        gives it the source itself, 0..1.
        """
        config = self._config
        rows = draw(config, data, config.images)
        split = split_of(config, data)
        sources = encoder.encode_rows(split, rows)
        variants = [encoded_variants(encoder, config, data, rows, index) for index in range(config.variants)]
        self.protocol = {
            "similarity": "cosine",
            "gallery": f"the {len(rows)} sources",
            "images": len(rows),
            "variants_of_a_source": config.variants,
            **facts(config, data),
        }
        unit = F.normalize(sources, dim=1)
        made = [F.normalize(one, dim=1) for one in variants]
        yield "cosine", _mean([(one * unit).sum(dim=1) for one in made])
        # The sources are in random order, so the next one is another at random.
        yield "cosine_of_unrelated", _mean([(one * unit.roll(-1, dims=0)).sum(dim=1) for one in made])
        yield "retrieval@1", _mean([retrieved(unit, one) for one in made])
        labels = torch.tensor([split.label(row) for row in rows])
        known = labels >= 0
        if not self._labelled(data) or not known.any():
            return
        bank_rows = self._bank_rows(data, rows)
        bank = encoder.encode_rows(data.train, bank_rows)
        bank_labels = torch.tensor([data.train.label(row) for row in bank_rows])
        k = min(config.k, len(bank_rows))
        self.protocol |= {"voters": len(bank_rows), "k": k, "temperature": config.temperature}
        agreements = [
            knn_predict(
                bank, bank_labels, one[known], k=k, temperature=config.temperature, num_classes=data.num_classes
            )
            == labels[known]
            for one in (sources, *variants)
        ]
        yield "label_agreement", _mean(agreements[1:])
        yield "label_agreement_of_real", _mean(agreements[:1])

    def _labelled(self, data: EvaluationData) -> bool:
        return _has_labels(data.train) and _has_labels(split_of(self._config, data))

    def _bank_rows(self, data: EvaluationData, sources: list[int]) -> list[int]:
        """Returns the labelled rows of train; without the sources, each of which would vote for its own variants."""
        taken = set(sources) if self._config.split == "train" else set()
        return [row for row in range(len(data.train)) if row not in taken and data.train.label(row) >= 0]


def retrieved(sources: torch.Tensor, variants: torch.Tensor) -> torch.Tensor:
    """Returns whether the nearest source of variant i is source i, bool [N]; both float [N, D] of unit length.

    A tie counts against it, so that an encoder that cannot tell images apart finds none.
    """
    found = []
    for start in range(0, len(variants), CHUNK):
        cosines = variants[start : start + CHUNK] @ sources.T
        own = torch.arange(len(cosines))
        mine = cosines[own, start + own].clone()
        cosines[own, start + own] = -torch.inf
        found.append(mine > cosines.max(dim=1).values)
    return torch.cat(found)


def _has_labels(split: ImageDataset) -> bool:
    return split.class_names is not None and any(split.label(row) >= 0 for row in range(len(split)))


def _mean(parts: list[torch.Tensor]) -> float:
    return float(torch.cat(parts).double().mean())
