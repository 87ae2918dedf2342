"""Variants enter where the plan says, and nowhere else."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from genssl.base.devices import stream
from genssl.config.views import ViewsConfig
from genssl.variants.plan import StepPlan, ViewPlan
from genssl.variants.source import REAL, Delivery
from genssl.views.augment import Augment
from genssl.views.augmentations import Augmentations
from genssl.views.compose import compose_views

STILL = Augmentations(ViewsConfig(augmentation="none"), 8)
PLAN = StepPlan(epoch=0, step=0, rows=np.array([4, 2, 7]), indices=np.array([[REAL, 5], [REAL, REAL], [6, 8]]))


def test_requests_are_row_by_row(digits_train):
    wanted = [(request.row, request.index, request.source_id) for request in PLAN.with_requests(digits_train).requests]
    assert wanted == [(row, index, digits_train.source_id(row)) for row, index in [(4, 5), (7, 6), (7, 8)]]


def compose(variants: np.ndarray | None) -> list[torch.Tensor]:
    real = torch.full((3, 3, 8, 8), 10, dtype=torch.uint8)
    delivery = None if variants is None else Delivery(variants, ["generated"] * 3, [5, 6, 8])
    views = compose_views(PLAN, real, delivery, STILL, 0, torch.device("cpu")).pair
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
        views = compose_views(PLAN, real, delivery, STILL, 0, torch.device("cpu")).pair
        assert tuple((view * 255).round().int()[:, 0, 0, 0].tolist() for view in views) == seen


def grey(*values: int) -> np.ndarray:
    return np.stack([np.full((3, 8, 8), value, np.uint8) for value in values])


def shown(view: torch.Tensor) -> list[int]:
    return (view * 255).round().int()[:, 0, 0, 0].tolist()


def test_third_views_are_variants_beside_a_real_pair():
    """Where a third view is not a variant, by the plan or since it came too late, it shows the source."""
    indices = np.array([[REAL, REAL, 5, 6], [REAL, REAL, REAL, 7], [REAL, REAL, 8, REAL]])
    plan = StepPlan(epoch=0, step=0, rows=np.array([4, 2, 7]), indices=indices)
    real = torch.from_numpy(grey(10, 20, 30))
    delivery = Delivery(grey(100, 120), ["generated", "real", "store", "real"], [5, REAL, 7, REAL])
    views = compose_views(plan, real, delivery, STILL, 0, torch.device("cpu"))
    assert [shown(view) for view in views.pair] == [[10, 20, 30], [10, 20, 30]]
    assert [shown(view) for view in views.generated] == [[100, 20, 30], [10, 120, 30]]
    assert views.crops == ()


def test_added_shows_one_variant_in_both_views(digits_train):
    plan = StepPlan(epoch=0, step=0, rows=np.array([4, 2, 7]), indices=np.array([[5], [REAL], [6]]))
    assert [(request.row, request.index) for request in plan.with_requests(digits_train).requests] == [(4, 5), (7, 6)]
    real = torch.from_numpy(grey(10, 20, 30))
    views = compose_views(plan, real, Delivery(grey(100, 110), ["store"] * 2, [5, 6]), STILL, 0, torch.device("cpu"))
    assert [shown(view) for view in views.pair] == [[100, 20, 110]] * 2
    small = Augmentations(ViewsConfig(augmentation="none", crops={"count": 1, "size": 4}), 8)
    views = compose_views(plan, real, Delivery(grey(100, 110), ["store"] * 2, [5, 6]), small, 0, torch.device("cpu"))
    assert shown(views.crops[0]) == [100, 20, 110], "and in small views"
    moving = Augmentations(ViewsConfig(), 8)
    noise = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    first, second = compose_views(
        plan, noise, Delivery(noise[:2].numpy(), ["store"] * 2, [5, 6]), moving, 0, torch.device("cpu")
    ).pair
    assert ((first - second).abs().amax(dim=(1, 2, 3)) > 0.05).all(), "each view is augmented by itself"


def test_views_are_bit_for_bit_those_of_the_first_version():
    """As `compose_views` of the first version made them: one augmentation, one stream a view."""
    draws = torch.Generator().manual_seed(1)
    real = torch.randint(0, 256, (16, 3, 24, 24), generator=draws, dtype=torch.uint8)
    plan = ViewPlan(seed=3, num_sources=64, batch_size=16, policy="both", probability=0.5, per_image="fresh").step(1, 2)
    wanted = int((plan.indices != REAL).sum())
    images = torch.randint(0, 256, (wanted, 3, 16, 16), generator=draws, dtype=torch.uint8)
    late = torch.arange(wanted) % 5 == 0
    delivery = Delivery(
        images[~late].numpy(), ["real" if one else "generated" for one in late], [REAL if one else 1 for one in late]
    )
    config = ViewsConfig()
    views = compose_views(plan, real, delivery, Augmentations(config, 24), 3, torch.device("cpu"))

    chosen = torch.from_numpy(plan.indices != REAL)
    chosen[chosen.clone()] = ~late
    expected = real.float().div_(255).unsqueeze(1).repeat(1, 2, 1, 1, 1)
    variants = torch.from_numpy(delivery.images).float() / 255
    expected[chosen] = F.interpolate(variants, size=(24, 24), mode="bicubic", antialias=True).clamp(0, 1)
    augment = Augment(config.augmentation, 24)
    for view in range(2):
        assert torch.equal(views.pair[view], augment(expected[:, view], stream("augment", 3, 1, 2, view)))
    assert views.generated == views.crops == ()
    assert views.pair_weights is None
