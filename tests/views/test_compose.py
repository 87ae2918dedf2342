"""Variants enter where the plan says, and nowhere else."""

from __future__ import annotations

import numpy as np
import torch

from genssl.config.recipe import AugmentationConfig
from genssl.variants.plan import REAL, StepPlan
from genssl.variants.source import Delivery
from genssl.views.augment import Augment
from genssl.views.compose import compose_views, requests_of

STILL = AugmentationConfig(
    crop_scale=(1, 1),
    crop_ratio=(1, 1),
    flip_probability=0,
    jitter_probability=0,
    grayscale_probability=0,
    blur_probability=0,
)
PLAN = StepPlan(epoch=0, step=0, rows=np.array([4, 2, 7]), indices=np.array([[REAL, 5], [REAL, REAL], [6, 8]]))


def test_requests_are_row_by_row(digits_train):
    wanted = [(request.row, request.index, request.source_id) for request in requests_of(PLAN, digits_train)]
    assert wanted == [(row, index, digits_train.source_id(row)) for row, index in [(4, 5), (7, 6), (7, 8)]]


def compose(variants: np.ndarray | None) -> list[torch.Tensor]:
    real = torch.full((3, 3, 8, 8), 10, dtype=torch.uint8)
    delivery = None if variants is None else Delivery(variants, ["generated"] * 3, [5, 6, 8])
    views = compose_views(PLAN, real, delivery, Augment(STILL, 8), 0, torch.device("cpu")).pair
    return [(view * 255).round().int() for view in views]


def test_variants_take_their_slots():
    variants = np.stack([np.full((3, 8, 8), value, np.uint8) for value in (100, 150, 200)])
    first, second = compose(variants)
    assert first[:, 0, 0, 0].tolist() == [10, 10, 150]
    assert second[:, 0, 0, 0].tolist() == [100, 10, 200]


def test_variants_of_another_size_are_resized():
    first, second = compose(np.full((3, 3, 32, 32), 77, np.uint8))
    assert second.shape == (3, 3, 8, 8)
    assert second[0].unique().tolist() == [77]
    assert first[2].unique().tolist() == [77]


def test_a_slot_whose_variant_is_replaced_by_the_real_image_shows_the_source():
    real = torch.full((3, 3, 8, 8), 10, dtype=torch.uint8)
    for origins, seen in (
        (["reused", "real", "store"], ([10, 10, 10], [100, 10, 200])),
        (["real", "real", "generated"], ([10, 10, 10], [10, 10, 100])),
        (["real", "real", "real"], ([10, 10, 10], [10, 10, 10])),
    ):
        images = np.stack([np.full((3, 8, 8), value, np.uint8) for value in (100, 200)])
        images = images[: 3 - origins.count("real")]
        delivery = Delivery(images, origins, [REAL if origin == "real" else 4 for origin in origins])
        views = compose_views(PLAN, real, delivery, Augment(STILL, 8), 0, torch.device("cpu")).pair
        assert tuple((view * 255).round().int()[:, 0, 0, 0].tolist() for view in views) == seen
