"""Compares the representations of two encoders on the same images: CKA and Procrustes distance, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from genssl.data.base import ImageDataset, StoredImage, UInt8Array
from genssl.evaluators.base import FrozenEncoder
from genssl.evaluators.representation.similarity import Interval, bootstrap_cka, bootstrap_opd, opd

MOST_DECOMPOSITIONS = 200  # of 2,048 features each takes seconds


@dataclass(frozen=True)
class Similarity:
    """How similar two representations of the same images are.

    Attributes:
        cka_biased, cka_debiased: linear CKA, 1 for equal representations; what arXiv 2403.05966 prints is 1 - biased.
        opd: orthogonal Procrustes distance of Ding et al. 2021, 0 for equal representations, at most 2.
        opd_legacy: the same with the centring of the released code of arXiv 2403.05966.
        images: how many were compared.
        dimensions: widths of both representations.
        resamples: of the bootstrap of CKA.
        opd_resamples: of that of the distance.
        seed: of both.
    """

    cka_biased: Interval
    cka_debiased: Interval
    opd: Interval
    opd_legacy: float
    images: int
    dimensions: tuple[int, int]
    resamples: int
    opd_resamples: int
    seed: int


def compare_encoders(
    first: FrozenEncoder,
    second: FrozenEncoder,
    dataset: ImageDataset,
    second_dataset: ImageDataset | None = None,
    *,
    rows: Sequence[int] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Similarity:
    """Encodes images by both and compares them.

    Args:
        first, second: the encoders; may be the same.
        dataset: what they see; labels play no part.
        second_dataset: the same images at the size of the second encoder, if that is another.
        rows: of the data set; by default all.
        resamples: of the bootstrap; at most 200 of the distance, each of which takes a singular value decomposition.
        seed: of the bootstrap.

    Raises:
        DataError: if there are fewer than 20 images, or an encoder gives all of them the same features.
    """
    rows = range(len(dataset)) if rows is None else rows
    # The work is done in float64 where the first encoder is: Gram matrices of thousands of images are slow on a CPU.
    x = first.encode_rows(dataset, rows).to(first.device)
    y = second.encode_rows(second_dataset or dataset, rows).to(first.device)
    few = min(resamples, MOST_DECOMPOSITIONS)
    return Similarity(
        cka_biased=bootstrap_cka(x, y, estimator="biased", resamples=resamples, seed=seed),
        cka_debiased=bootstrap_cka(x, y, estimator="debiased", resamples=resamples, seed=seed),
        opd=bootstrap_opd(x, y, resamples=few, seed=seed),
        opd_legacy=opd(x, y, centring="legacy_paper"),
        images=len(x),
        dimensions=(x.shape[1], y.shape[1]),
        resamples=resamples,
        opd_resamples=few,
        seed=seed,
    )


class Resized:
    """A data set of one size only, such as the digits, at the size that an encoder was made for (bilinear)."""

    def __init__(self, dataset: ImageDataset, image_size: int) -> None:
        self._dataset, self.image_size = dataset, image_size
        self.name, self.class_names, self.skipped = dataset.name, dataset.class_names, dataset.skipped

    def __len__(self) -> int:
        return len(self._dataset)

    def image(self, row: int) -> UInt8Array:
        """Returns the image uint8 [3, image_size, image_size]."""
        size = (self.image_size, self.image_size)
        image = torch.from_numpy(np.ascontiguousarray(self._dataset.image(row)))[None].float()
        resized = F.interpolate(image, size=size, mode="bilinear", antialias=True)
        pixels: UInt8Array = resized[0].round().clamp(0, 255).to(torch.uint8).numpy()
        return pixels

    def label(self, row: int) -> int:
        """See ImageDataset."""
        return self._dataset.label(row)

    def stored(self, row: int) -> StoredImage:
        """See ImageDataset."""
        return self._dataset.stored(row)

    def source_id(self, row: int) -> bytes:
        """See ImageDataset."""
        return self._dataset.source_id(row)
