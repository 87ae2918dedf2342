"""What generators are trained on: images and latents by row, an endless order of rows, a random stream of all ranks.

Every rank draws for the whole batch and keeps its own rows, so that several ranks train what one process would.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from genssl.base.cores import usable_cores
from genssl.base.devices import stream
from genssl.base.ranks import ALONE, Ranks
from genssl.data.base import ImageDataset, UInt8Array
from genssl.generators.flow import noise_embeddings
from genssl.views.augment import Augment

IN_MEMORY_BYTES = 4 * 2**30
CLEAN_PART = 1 / 3  # of the rows sees embeddings without noise, which most users ask for


class Images:
    """The images of a split, of side `size`: on the training device if all fit into `in_memory_bytes`.

    Otherwise they are decoded by threads when they are asked for.
    """

    def __init__(self, dataset: ImageDataset, device: torch.device, in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        self._dataset, self.device, self.size = dataset, device, dataset.image_size
        self._pool = ThreadPoolExecutor(usable_cores(), thread_name_prefix="genssl-images")
        self._ahead: dict[int, Future[UInt8Array]] = {}
        self._all: torch.Tensor | None = None
        if len(dataset) * 3 * self.size**2 <= in_memory_bytes:
            self._all = torch.from_numpy(np.stack(list(self._pool.map(dataset.image, range(len(dataset)))))).to(device)

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def in_memory(self) -> bool:
        """Says whether all are kept."""
        return self._all is not None

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns uint8 [B, 3, S, S] of the rows int64 [B]; raises DataError naming the file if one is corrupt."""
        if self._all is not None:
            return self._all[rows.to(self.device)]
        self.read_ahead(rows)
        numbers = rows.tolist()
        found = {row: self._ahead.pop(row) for row in dict.fromkeys(numbers)}
        return torch.from_numpy(np.stack([found[row].result() for row in numbers])).to(self.device)

    def read_ahead(self, rows: torch.Tensor) -> None:
        """Begins to decode what will be asked for next."""
        if self._all is None:
            for row in rows.tolist():
                if row not in self._ahead:
                    self._ahead[row] = self._pool.submit(self._dataset.image, row)

    def parts(self, rows: range, size: int = 512) -> Iterator[torch.Tensor]:
        """Yields the images of some rows in order, uint8 [<= size, 3, S, S]."""
        for start in range(0, len(rows), size):
            yield self[torch.tensor(rows[start : start + size])]


class Latents:
    """The latents of images, scaled as a frozen AutoencoderKL says.

    They are computed once if the images are in memory, else when they are asked for.
    """

    def __init__(self, autoencoder: Any, images: Images) -> None:
        self._autoencoder, self._images = autoencoder, images
        self._scale: float = autoencoder.config["scaling_factor"]
        self._all: torch.Tensor | None = None
        if images.in_memory:
            with torch.inference_mode():
                parts = [mean_latents(autoencoder, part) for part in images.parts(range(len(images)))]
            self._all = torch.cat(parts).clone() * self._scale

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns float32 [B, C, h, w] of the rows int64 [B], on the device."""
        if self._all is not None:
            return self._all[rows.to(self._images.device)]
        # In the precision of those that are kept, whatever that of the training: they are its target.
        with torch.no_grad(), torch.autocast(self._images.device.type, enabled=False):
            return mean_latents(self._autoencoder, self._images[rows]) * self._scale


def mean_latents(autoencoder: Any, images: torch.Tensor) -> torch.Tensor:
    """Returns the mean latents float32 [B, C, h, w], not scaled, of images uint8 [B, 3, S, S]."""
    mean: torch.Tensor = autoencoder.encode(images.float() / 127.5 - 1).latent_dist.mean
    return mean


class Batches(Iterator[torch.Tensor]):
    """Row numbers int64 [batch_size] for ever, each epoch in a new order, incomplete batches left out.

    A batch is that of all ranks together. The stage's loss may draw from `draws` as well; they are part of the state.
    """

    def __init__(self, count: int, batch_size: int, draws: Draws) -> None:
        self._count, self._batch_size, self._draws = count, batch_size, draws
        self._order, self._start = torch.empty(0, dtype=torch.int64), 0

    def __next__(self) -> torch.Tensor:
        if self._start + self._batch_size > len(self._order):
            self._order, self._start = torch.randperm(self._count, generator=self._draws.generator), 0
        self._start += self._batch_size
        return self._order[self._start - self._batch_size : self._start]

    def following(self) -> torch.Tensor:
        """Returns the next batch without taking it; empty at the end of an epoch, where it is not known yet."""
        following = self._order[self._start : self._start + self._batch_size]
        return following if len(following) == self._batch_size else following[:0]

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` needs to go on with the next batch and the next draw."""
        return {"order": self._order, "start": self._start, **self._draws.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self._order, self._start = state["order"], state["start"]
        self._draws.load_state_dict(state)


class Draws:
    """The random stream of a stage; its state is the same on all ranks, its rows are each rank's own."""

    def __init__(self, *names: object, ranks: Ranks = ALONE) -> None:
        self.generator = stream(*names)
        self._ranks = ranks

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` needs to go on with the next draw."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self.generator.set_state(state["generator"])

    def normal(self, rows: int, *shape: int) -> torch.Tensor:
        """Returns float32 [rows, *shape] of standard normal numbers."""
        return self.own(torch.randn((rows * self._ranks.size, *shape), generator=self.generator))

    def uniform(self, rows: int) -> torch.Tensor:
        """Returns float32 [rows] in [0, 1)."""
        return self.own(torch.rand(rows * self._ranks.size, generator=self.generator))

    def integers(self, low: int, high: int, rows: int) -> torch.Tensor:
        """Returns int64 [rows] in low..high - 1."""
        return self.own(torch.randint(low, high, (rows * self._ranks.size,), generator=self.generator))

    def integer_columns(self, count: int, low: int, high: int, rows: int, groups: int) -> list[torch.Tensor]:
        """Returns so many columns int64 [rows] in low..high - 1; `groups` as in `own`."""
        drawn = torch.randint(low, high, (count, rows * self._ranks.size), generator=self.generator)
        return [self.own(column, groups) for column in drawn]

    def view(self, augment: Augment, images: torch.Tensor) -> torch.Tensor:
        """Returns a view of each of this rank's images, float [B, 3, H, W] in [0, 1]."""
        drawn = augment.draw(len(images) * self._ranks.size, images.shape[2], images.shape[3], self.generator)
        return augment.apply(images, drawn.of(self.own(torch.arange(len(images) * self._ranks.size))))

    def own(self, values: torch.Tensor, groups: int = 1) -> torch.Tensor:
        """Returns this rank's part of values [W * B, ...] drawn for all ranks.

        Args:
            values: of the ranks in their order; with several groups, each has all of the ranks.
            groups: so many batches stand one after the other.
        """
        if self._ranks.size == 1:
            return values
        by_rank = values.view(groups, self._ranks.size, -1, *values.shape[1:])
        return by_rank[:, self._ranks.rank].flatten(0, 1)


@dataclass(frozen=True)
class Material:
    """Images and their embeddings.

    Attributes:
        images: of the train split.
        embeddings: float32 [N, D] on the CPU, as `Conditioner.embed` gives them.
        latents: of the images, for a flow of latents.
    """

    images: Images
    embeddings: torch.Tensor
    latents: Latents | None = None

    def clean(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns what the flow ends in, float32 [B, C, h, w] on the device: images in [-1, 1], or latents."""
        return self.images[rows].float() / 127.5 - 1 if self.latents is None else self.latents[rows]

    def condition(self, rows: torch.Tensor, max_noise: float, draws: Draws) -> torch.Tensor:
        """Returns conditions float32 [B, D + 1] (CPU): embeddings with noise of 0..max_noise, on part of them none."""
        levels = max_noise * draws.uniform(len(rows))
        levels[draws.uniform(len(rows)) < CLEAN_PART] = 0
        chosen = self.embeddings[rows]
        return noise_embeddings(chosen, draws.normal(*chosen.shape), levels)
