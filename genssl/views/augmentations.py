"""Which standard augmentations a view gets: by its place in the pair, and by whether it shows a variant."""

from __future__ import annotations

import torch

from genssl.base.devices import stream
from genssl.config.views import ViewsConfig
from genssl.data.crops import CropDraws
from genssl.errors import ConfigError
from genssl.variants.plan import VIEWS, StepPlan, view_columns
from genssl.views.augment import Augment, Draws, draw_crops


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

    def crop_draws(self, plan: StepPlan, seed: int) -> list[CropDraws]:
        """Returns the crops of every view and every small view of a step's real images, in the order of `Crops.images`.

        They are those that `view` and `crops` draw, for images of any size.
        """
        views = len(view_columns(plan.indices.shape[1]))
        named = [(self.real(view), ("augment", seed, plan.epoch, plan.step, view)) for view in range(views)]
        if self._crop is not None:
            named += [(self._crop, ("crop", seed, plan.epoch, plan.step, number)) for number in range(self._crops)]
        return [
            draw_crops(plan.batch_size or len(plan.rows), augment.size, augment.config, stream(*name)).of(_part(plan))
            for augment, name in named
        ]

    def view(
        self,
        view: int,
        images: torch.Tensor,
        is_variant: torch.Tensor,
        plan: StepPlan,
        seed: int,
        cropped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns one view of a batch, float [B, 3, size, size] in [0, 1].

        Args:
            view: its number; 0 and 1 are the pair.
            images: float [B, 3, S, S] in [0, 1], sources and variants.
            is_variant: bool [B] on the CPU; which of them are variants.
            plan, seed: of the step and of the run.
            cropped: float [B, 3, size, size]; crops of the sources, which take the place of those in `images`.
        """
        name = ("augment", seed, plan.epoch, plan.step, view)
        return self._mixed(self.real(view), self.generated(view), images, is_variant, plan, name, cropped)

    def crops(
        self,
        images: torch.Tensor,
        is_variant: torch.Tensor,
        plan: StepPlan,
        seed: int,
        cropped: tuple[torch.Tensor, ...] = (),
    ) -> tuple[torch.Tensor, ...]:
        """Returns the small views of multi-crop, float [B, 3, s, s]; the arguments are those of `view`."""
        if self._crop is None:
            return ()
        made = []
        for number in range(self._crops):
            name = ("crop", seed, plan.epoch, plan.step, number)
            own = cropped[number] if cropped else None
            made.append(self._mixed(self._crop, self._crop, images, is_variant, plan, name, own))
        return tuple(made)

    def _mixed(
        self,
        real: Augment,
        generated: Augment,
        images: torch.Tensor,
        is_variant: torch.Tensor,
        plan: StepPlan,
        name: tuple[object, ...],
        cropped: torch.Tensor | None,
    ) -> torch.Tensor:
        """Augments sources by `real` and variants by `generated`, with draws of one name."""

        def draws_of(augment: Augment) -> Draws:
            height, width = images.shape[2:]
            return augment.draw(plan.batch_size or len(images), height, width, stream(*name)).of(_part(plan))

        if cropped is None and real.config.settings() == generated.config.settings():
            return real.apply(images, draws_of(real))
        shown = images if cropped is None else cropped
        if not is_variant.any():
            return real.apply(shown, draws_of(real), is_cropped=cropped is not None)
        if is_variant.all():
            return generated.apply(images, draws_of(generated))
        views = images.new_empty((len(images), images.shape[1], real.size, real.size))
        parts = ((real, ~is_variant, shown, cropped is not None), (generated, is_variant, images, False))
        for augment, mask, seen, is_cropped in parts:
            rows = mask.nonzero()[:, 0]
            on_device = rows.to(images.device)
            views[on_device] = augment.apply(seen[on_device], draws_of(augment).of(rows), is_cropped=is_cropped)
        return views


def _part(plan: StepPlan) -> slice:
    """Returns this rank's rows of the global batch."""
    return slice(plan.start, plan.start + len(plan.rows))
