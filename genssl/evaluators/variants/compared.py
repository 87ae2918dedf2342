"""Draws real images and variants of them, and encodes both: what every judgement of variants begins with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from genssl.base.devices import stream
from genssl.data.base import ImageDataset, UInt8Array
from genssl.errors import DataError
from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.configs import VariantMetricConfig

IMAGES = 256  # asked of the generator at a time


@dataclass(frozen=True)
class Compared:
    """Features float32 [N, D] of equally many images.

    Attributes:
        variants: of one variant of each source.
        sources: of the sources.
        others: of real images that are no sources.
    """

    variants: torch.Tensor
    sources: torch.Tensor
    others: torch.Tensor


def split_of(config: VariantMetricConfig, data: EvaluationData) -> ImageDataset:
    """Returns the split that the sources are drawn from."""
    return data.test if config.split == "test" else data.train


def require(config: VariantMetricConfig, data: EvaluationData, images: int) -> None:
    """Raises DataError unless there are variants, and this many images to draw from."""
    setting = f"evaluate.{config.name}"
    data.require_variants(setting)
    if (found := len(split_of(config, data))) < images:
        raise DataError(f"{setting}: {images} images are needed and the {config.split} split has {found}; give more")


def draw(config: VariantMetricConfig, data: EvaluationData, count: int) -> list[int]:
    """Returns `count` different rows of the split in a random order, or all if there are fewer."""
    order = torch.randperm(len(split_of(config, data)), generator=stream("evaluate", config.name, config.seed))
    rows: list[int] = order[:count].tolist()
    return rows


def compared(encoder: FrozenEncoder, config: VariantMetricConfig, data: EvaluationData, index: int) -> Compared:
    """Encodes variant `index` of sources, the sources, and as many other real images.

    The others, not the sources, are what variants are measured against: a generator that copies its sources would be
    perfect by them. What the sources themselves reach against the others is what can be reached.
    """
    dataset = split_of(config, data)
    rows = draw(config, data, 2 * config.images)
    half = len(rows) // 2
    sources, others = rows[:half], rows[half : 2 * half]
    return Compared(
        variants=encoded_variants(encoder, config, data, sources, index),
        sources=encoder.encode_rows(dataset, sources),
        others=encoder.encode_rows(dataset, others),
    )


def encoded_variants(
    encoder: FrozenEncoder, config: VariantMetricConfig, data: EvaluationData, rows: Sequence[int], index: int
) -> torch.Tensor:
    """Returns the features float32 [n, D] of variant `index` of rows of the split."""
    return torch.cat([encoder.encode(images) for images in made(config, data, rows, index)])


def made(config: VariantMetricConfig, data: EvaluationData, rows: Sequence[int], index: int) -> Iterator[UInt8Array]:
    """Yields variant `index` of rows of the split, uint8 [n, 3, S, S], some at a time."""
    variants = data.require_variants(f"evaluate.{config.name}")
    for start in range(0, len(rows), IMAGES):
        yield variants(split_of(config, data), rows[start : start + IMAGES], index)


def facts(config: VariantMetricConfig, data: EvaluationData) -> dict[str, Any]:
    """Returns what belongs into every protocol."""
    return {"split": data.test_name if config.split == "test" else "train", "seed": config.seed}
