"""Augmented views of rows of a data set, for what trains on labels: probes and fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from genssl.data.base import ImageDataset, pixels_of
from genssl.data.workers import read_images
from genssl.views.augment import Augment, draw_crops


def augmented(
    dataset: ImageDataset, rows: Sequence[int], augment: Augment, draws: torch.Generator, device: torch.device
) -> torch.Tensor:
    """Reads images and returns one view of each, cropped from the whole image where images have sizes of their own.

    Args:
        dataset: has the images.
        rows: B of them.
        augment: of the views.
        draws: a CPU generator; all parameters come from it.
        device: where the views are made.

    Returns:
        float [B, 3, size, size] in [0, 1].
    """
    crops = []
    if pixels_of(dataset) is not None:
        # Crops are the first that a view draws, so these are the ones that it will take for drawn.
        ahead = torch.Generator().set_state(draws.get_state())
        crops = [draw_crops(len(rows), augment.size, augment.config, ahead)]
    (images,) = read_images(dataset, rows, crops)
    shown = torch.from_numpy(np.ascontiguousarray(images)).to(device).float().div_(255)
    parameters = augment.draw(len(rows), shown.shape[2], shown.shape[3], draws)
    return augment.apply(shown, parameters, is_cropped=bool(crops))
