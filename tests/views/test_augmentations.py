"""What is done to a row depends on its view and on whether it is a variant, and not on what happens to other rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genssl.config.views import CropsConfig, ViewsConfig
from genssl.errors import ConfigError
from genssl.variants.plan import StepPlan, ViewPlan
from genssl.views.augment import Augment
from genssl.views.augmentations import Augmentations
from genssl.views.compose import compose_views

BATCH, SIZE = 12, 24
PLAN = StepPlan(epoch=1, step=2, rows=np.arange(BATCH), indices=np.full((BATCH, 2), -1))
NONE = torch.zeros(BATCH, dtype=torch.bool)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    coarse = torch.rand((BATCH, 3, 6, 6), generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5)  # kernels are not bit-equal across batch shapes


def test_rows_get_the_preset_of_what_they_show(images):
    augmentations = Augmentations(ViewsConfig(augmentation="moco", generated_augmentation="none"), SIZE)
    mixed = torch.arange(BATCH) % 3 == 0
    views = augmentations.view(1, images, mixed, PLAN, 5)
    assert close(views[mixed], images[mixed]), "none leaves variants as they are"
    real = augmentations.view(1, images, NONE, PLAN, 5)
    assert close(views[~mixed], real[~mixed])
    assert not close(real[mixed], images[mixed])


@pytest.mark.parametrize("generated", ["crop_only", "weak", "byol"])
def test_a_row_does_not_depend_on_which_others_are_variants(images, generated):
    augmentations = Augmentations(ViewsConfig(generated_augmentation=generated), SIZE)
    all_real = augmentations.view(1, images, NONE, PLAN, 5)
    all_variants = augmentations.view(1, images, ~NONE, PLAN, 5)
    for divisor in (2, 5):
        mask = torch.arange(BATCH) % divisor == 1
        views = augmentations.view(1, images, mask, PLAN, 5)
        assert close(views, torch.where(mask.view(-1, 1, 1, 1), all_variants, all_real))


def test_equal_presets_are_one_pass_and_what_two_passes_would_give(images):
    """However they are written: `simclr` is what is said by default."""
    mask = torch.arange(BATCH) % 2 == 0
    alike = Augmentations(ViewsConfig(generated_augmentation="simclr"), SIZE)
    once = Augmentations(ViewsConfig(), SIZE).view(0, images, mask, PLAN, 5)
    assert torch.equal(alike.view(0, images, mask, PLAN, 5), once)
    # Solarization with probability 0 on paper, but at another threshold: two passes, with the same draws.
    twice = Augmentations(ViewsConfig(generated_augmentation={"solarize_threshold": 0.1}), SIZE)
    assert close(twice.view(0, images, mask, PLAN, 5), once)


def test_an_asymmetric_pair_has_two_augmentations_and_further_views_have_the_second(images):
    augmentations = Augmentations(ViewsConfig(augmentation="byol", policy="third"), SIZE)
    views = [augmentations.real(view).config for view in range(4)]
    assert [view.blur_probability for view in views] == [1.0, 0.1, 0.1, 0.1]
    assert [view.solarize_probability for view in views] == [0.0, 0.2, 0.2, 0.2]
    third = [augmentations.view(view, images, ~NONE, PLAN, 5) for view in (2, 3)]
    assert not close(*third), "each has draws of its own"


def test_ranks_draw_what_one_process_draws(images):
    settings = {"seed": 1, "num_sources": 50, "batch_size": BATCH, "policy": "none", "probability": 1.0}
    whole = ViewPlan(**settings, per_image=1).step(0, 1)
    augmentations = Augmentations(ViewsConfig(augmentation="byol", crops=CropsConfig(count=2, size=8)), SIZE)
    real = (images * 255).round().byte()
    device = torch.device("cpu")
    expected = compose_views(whole, real, None, augmentations, 7, device)
    parts = []
    for rank in range(3):
        plan = ViewPlan(**settings, per_image=1, rank=rank, world_size=3).step(0, 1)
        parts.append(compose_views(plan, real[4 * rank : 4 * rank + 4], None, augmentations, 7, device))
    for number in range(2):
        assert close(torch.cat([part.pair[number] for part in parts]), expected.pair[number])
        assert close(torch.cat([part.crops[number] for part in parts]), expected.crops[number])


def test_small_views_show_little_of_the_real_image(images):
    crops = CropsConfig(count=3, size=8, scale=(0.05, 0.2))
    augmentations = Augmentations(ViewsConfig(augmentation="byol", crops=crops), SIZE)
    small = augmentations.crops(images, NONE, PLAN, 5)
    assert [tuple(view.shape) for view in small] == [(BATCH, 3, 8, 8)] * 3
    assert len({view.numpy().tobytes() for view in small}) == 3
    drawn: list[Augment] = [augmentations._crop]  # type: ignore[list-item]
    assert drawn[0].config.crop_scale == (0.05, 0.2)
    assert drawn[0].config.blur_probability == 1.0, "otherwise as view 1"
    chosen = CropsConfig(size=8, augmentation="none")
    assert Augmentations(ViewsConfig(crops=chosen), SIZE)._crop.config.flip_probability == 0  # type: ignore[union-attr]
    again = augmentations.crops(images, NONE, PLAN, 5)
    assert all(torch.equal(one, other) for one, other in zip(small, again, strict=True))


def test_small_views_are_not_larger_than_the_image():
    with pytest.raises(ConfigError, match=r"views.crops.size: 25 is more than the 24 pixels"):
        Augmentations(ViewsConfig(crops=CropsConfig(size=25)), SIZE)
