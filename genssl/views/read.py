"""Augmented views of rows of a data set, for what trains on labels: probes and fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from genssl.base.cores import usable_cores
from genssl.data.base import ImageDataset, UInt8Array, pixels_of
from genssl.data.crops import CropDraws
from genssl.data.workers import read_images
from genssl.views.augment import Augment, draw_crops


def augmented(
    dataset: ImageDataset, rows: Sequence[int], augment: Augment, draws: torch.Generator, device: torch.device
) -> torch.Tensor:
    """Reads images and returns one view of each, float [B, 3, size, size] in [0, 1], on `device`.

    Images with sizes of their own are cropped from the whole image; they are files, and are decoded by a thread a core.
    All parameters come from the CPU generator `draws`.
    """
    if pixels_of(dataset) is None:
        (images,) = read_images(dataset, rows)
    else:
        # Crops are the first that a view draws, so these are the ones that it will take for drawn.
        ahead = torch.Generator().set_state(draws.get_state())
        images = _cropped(dataset, rows, draw_crops(len(rows), augment.size, augment.config, ahead))
    shown = torch.from_numpy(np.ascontiguousarray(images)).to(device).float().div_(255)
    parameters = augment.draw(len(rows), shown.shape[2], shown.shape[3], draws)
    return augment.apply(shown, parameters, is_cropped=pixels_of(dataset) is not None)


def _cropped(dataset: ImageDataset, rows: Sequence[int], crops: CropDraws) -> UInt8Array:
    def read(i: int) -> UInt8Array:
        return read_images(dataset, rows[i : i + 1], [crops.of(slice(i, i + 1))])[0]

    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="genssl-views") as pool:
        return np.concatenate(list(pool.map(read, range(len(rows)))))
