"""Which standard augmentations a view gets: by its place in the pair, and by whether it shows a variant."""

from __future__ import annotations

import torch

from genssl.config.views import ViewsConfig
from genssl.errors import ConfigError
from genssl.runtime import stream
from genssl.variants.plan import VIEWS, StepPlan
from genssl.views.augment import Augment, Draws


class Augmentations:
    """The augmentations of a recipe.

    Parameters are drawn for the rows of the global batch by their position in it, whatever is applied to which: those
    of a row depend neither on which other rows are variants nor on the number of ranks. Rows of variants and of real
    images draw from streams of the same name, so that recipes that differ in one preset share what the other draws.

    Args:
        config: of the views.
        size: side of the views in pixels.

    Raises:
        ConfigError: if the small views of multi-crop are larger than `size`.
    """

    def __init__(self, config: ViewsConfig, size: int) -> None:
        generated = config.generated_augmentation or config.augmentation
        self._real = [Augment(config.augmentation.of_view(view), size) for view in range(VIEWS)]
        self._generated = [Augment(generated.of_view(view), size) for view in range(VIEWS)]
        self._crop: Augment | None = None
        self._crops = 0
        if (crops := config.crops) is not None:
            if crops.size > size:
                raise ConfigError(
                    [f"views.crops.size: {crops.size} is more than the {size} pixels of the images; lower it"]
                )
            small = crops.augmentation or config.augmentation.of_view(0)
            self._crop = Augment(small.model_copy(update={"crop_scale": crops.scale}), crops.size)
            self._crops = crops.count

    def real(self, view: int) -> Augment:
        """Returns what is done to a real image in view `view` (from 0); further views are made as the second."""
        return self._real[min(view, VIEWS - 1)]

    def generated(self, view: int) -> Augment:
        """Returns what is done to a variant in view `view`."""
        return self._generated[min(view, VIEWS - 1)]

    def view(
        self, view: int, images: torch.Tensor, is_variant: torch.Tensor, plan: StepPlan, seed: int
    ) -> torch.Tensor:
        """Returns one view of a batch.

        Args:
            view: its number; 0 and 1 are the pair.
            images: float [B, 3, S, S] in [0, 1], sources and variants.
            is_variant: bool [B] on the CPU; which of them are variants.
            plan: of the step.
            seed: of the run.

        Returns:
            float [B, 3, size, size] in [0, 1].
        """
        real, generated = self.real(view), self.generated(view)

        def draws_of(augment: Augment) -> Draws:
            return _draw(augment, images, plan, "augment", seed, plan.epoch, plan.step, view)

        if real.config.settings() == generated.config.settings() or not is_variant.any():
            return real.apply(images, draws_of(real))
        if is_variant.all():
            return generated.apply(images, draws_of(generated))
        views = images.new_empty((len(images), images.shape[1], real.size, real.size))
        for augment, mask in ((real, ~is_variant), (generated, is_variant)):
            rows = mask.nonzero()[:, 0]
            on_device = rows.to(images.device)
            views[on_device] = augment.apply(images[on_device], draws_of(augment).of(rows))
        return views

    def crops(self, images: torch.Tensor, plan: StepPlan, seed: int) -> tuple[torch.Tensor, ...]:
        """Returns the small views of multi-crop, float [B, 3, s, s], of real images float [B, 3, S, S]."""
        if self._crop is None:
            return ()
        return tuple(
            self._crop.apply(images, _draw(self._crop, images, plan, "crop", seed, plan.epoch, plan.step, number))
            for number in range(self._crops)
        )


def _draw(augment: Augment, images: torch.Tensor, plan: StepPlan, *name: object) -> Draws:
    """Draws the parameters of the global batch from the stream of that name, and returns those of this rank's rows."""
    height, width = images.shape[2:]
    draws = augment.draw(plan.batch_size or len(images), height, width, stream(*name))
    return draws.of(slice(plan.start, plan.start + len(images)))
