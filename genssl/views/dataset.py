"""Generative views for other people's trainers: a data set whose items are views, some or all of them variants."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import Dataset

from genssl.client.blocking import VariantClient
from genssl.client.breaker import CircuitBreaker, FallbackLog
from genssl.client.images import array_pixels, read_picture, wanted_variants
from genssl.config.views import Policy
from genssl.data.base import UInt8Array
from genssl.errors import ServerUnavailableError, UserError
from genssl.generators.models import foreign_data, small_variants, trained_on
from genssl.variants.ledger import Ledger, Origin
from genssl.variants.plan import draw_indices, view_columns
from genssl.variants.prefetch.loop import FORK_ADVICE, was_forked_from_live
from genssl.variants.source import REAL
from genssl.views.counts import SharedCounts

log = logging.getLogger(__name__)

ORIGINS: tuple[Origin, ...] = ("generated", "store", "real")

Source = Callable[[Sequence[Any], Sequence[int]], UInt8Array]
Transform = Callable[[Image.Image], Any]


class GenerativeViews(Dataset[tuple[Any, ...]]):
    """Wraps a map-style data set; an item is (view 1, view 2) and whatever followed the image, such as a label.

    Policy "third" adds `third_count` views before what followed the image.

    Which views are variants, and of which index, is a pure function of seed, epoch and row, the one that `genssl run`
    uses. Call `set_epoch` before each epoch, or every epoch has the variants of the first. A DataLoader asks for a
    batch at a time, so a batch costs one call of the source. Workers must be started with
    `multiprocessing_context="forkserver"` once the client has been used in the main process. `origins` and `retries`
    count over all workers.

    A variant has the size that its generator makes, and the real view that of the image: give a `transform` that crops
    or resizes, unless the two are equal. What is wrong with the generator for these images, a built-in one or variants
    smaller than the views, is logged as one warning.

    Example:
        views = GenerativeViews(CIFAR10(root), "127.0.0.1:50051", transform=simclr_augmentation)
        loader = DataLoader(views, 256, shuffle=True, num_workers=8, multiprocessing_context="forkserver")
        for epoch in range(100):
            views.set_epoch(epoch)
            for view1, view2, label in loader: ...

    Args:
        dataset: its items are images, tuples that begin with one, or dicts that have one under `image_key`, as those of
            Hugging Face's datasets; what else such a dict has follows the views as one dict. An image is a PIL image,
            which is read as the data set `folder` reads its file (as opened, it is turned as its EXIF says; 16-bit grey
            is brought to 8), or a uint8 array or tensor ([3, H, W], [1, H, W], [H, W, 3], [H, W, 1] or [H, W]). For the
            server alone, one of more than 16 MiB of pixels is shrunk by the rule of `client.images.stored_image`; the
            real view has all of them. torchvision's ImageFolder turns 16-bit grey white by itself: give it
            `loader=PIL.Image.open`.
        source: the address of a server, several, a `VariantClient`, or a function (images, indices) -> uint8
            [N, 3, h, w] of the images as the data set gives them.
        policy: which views may be variants: "second", "both" (each by itself), "third" (views beside a real pair, each
            by itself), "added" (both views together, showing one and the same variant) or "none".
        probability: that such a view is one, drawn for each row and epoch. AdaInf is "added" with K / (K + w), for K
            variants of each image and real images replicated w times.
        per_image: "fresh": an index never comes twice; K: one of 0..K-1.
        third_count: how many views "third" adds.
        transform: applied to every view, as a PIL image in RGB; None: to a float tensor [3, H, W] in 0..1.
        seed: of the draws, 0 <= seed < 2**31.
        generator: its id on the server; None: the only one there is.
        parameters: on top of the generator's defaults.
        late: what happens to variants that are not there by the deadline: "block" raises ServerUnavailableError, "real"
            takes the images themselves, and counts them; after one such batch the servers are not waited for again, by
            this process, until a probe in the background has reached one.
        deadline_seconds: for the variants of a batch; None: 60, or what the given client has. Not for functions.
        image_key: of the image in items that are dicts.

    Attributes:
        ledger: the counts of this process alone; each worker has its own, which ends with it.

    Raises:
        UserError: if an address is wrong, or a setting that only servers know is given with a function.
        ValueError: if another setting is not one of those above.
    """

    def __init__(
        self,
        dataset: Any,
        source: str | Sequence[str] | VariantClient | Source,
        *,
        policy: Policy = "second",
        probability: float = 1.0,
        per_image: Literal["fresh"] | int = "fresh",
        third_count: int = 1,
        transform: Transform | None = None,
        seed: int = 0,
        generator: str | None = None,
        parameters: Mapping[str, float] | None = None,
        late: Literal["block", "real"] = "block",
        deadline_seconds: float | None = None,
        image_key: str = "image",
    ) -> None:
        policies = get_args(Policy)
        is_count = per_image == "fresh" or (isinstance(per_image, int) and per_image > 0)
        for good, name, found, allowed in (
            (policy in policies, "policy", policy, ", ".join(policies)),
            (late in ("block", "real"), "late", late, "block, real"),
            (0 <= probability <= 1, "probability", probability, "0 to 1"),
            (is_count, "per_image", per_image, "fresh, or 1 and more"),
            (isinstance(third_count, int) and third_count > 0, "third_count", third_count, "1 and more"),
            (0 <= seed < 2**31, "seed", seed, "0 to 2**31 - 1"),
        ):
            if not good:
                raise ValueError(f"GenerativeViews: {name} is {found!r}; allowed: {allowed}")
        self._source: VariantClient | Source
        if isinstance(source, VariantClient):
            self._source = source if deadline_seconds is None else source.with_deadline(deadline_seconds)
        elif callable(source):
            if generator is not None or parameters is not None or deadline_seconds is not None:
                raise UserError(
                    "source is a function, and generator, parameters and deadline_seconds are for servers; build them "
                    "into the function, or give the address of a server"
                )
            self._source = source
        else:
            self._source = VariantClient(
                source, deadline_seconds=60.0 if deadline_seconds is None else deadline_seconds
            )
        self._dataset, self._transform, self._image_key = dataset, transform or _to_tensor, image_key
        self._draw: dict[str, Any] = {
            "seed": seed,
            "num_sources": len(dataset),
            "policy": policy,
            "probability": probability,
            "per_image": per_image,
            "third_count": third_count,
        }
        self._generator, self._parameters, self._late = generator, dict(parameters or {}), late
        # In shared memory, since persistent workers hold a copy of this object made before the first epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._indices: tuple[int, npt.NDArray[np.int64]] | None = None
        self.ledger = Ledger()
        self._counts = SharedCounts([*ORIGINS, "retries", "warned"])
        self._model, self._looked = "", False
        # A function cannot be probed, so each batch asks it.
        client = self._source if isinstance(self._source, VariantClient) and late == "real" else None
        self._breaker = CircuitBreaker(client.reachable) if client is not None else None
        self._fallbacks, self._why = FallbackLog(log), ""

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch (from 0) the coming items belong to; reaches the workers of a DataLoader too."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """The epoch of the coming items."""
        return int(self._epoch)

    @property
    def origins(self) -> dict[Origin, int]:
        """Views delivered in place of variants, by origin: the sums over this process and all workers, past ones too.

        "generated" by the server for this call (or by the function), "store": it had them already, "real": the images
        themselves, since the variants were late.
        """
        return {origin: self._counts[origin] for origin in ORIGINS}

    @property
    def retries(self) -> int:
        """Calls repeated, because a server was away, full or late: the sum over this process and all workers."""
        return self._counts["retries"]

    def __len__(self) -> int:
        return int(self._draw["num_sources"])

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Any, ...]]:
        """Returns the items of a batch, whose variants are fetched in one call.

        Raises:
            ServerUnavailableError: if they are not there in time and `late` is "block".
            RequestRefusedError: if the server refuses.
            UserError: in a worker that was forked from a process with a live client.
            TypeError, ValueError, DataError: if an item has no image, or one that cannot be read; names the row.
        """
        indices = self._indices_of_epoch()
        rows = [range(len(self))[row] for row in rows]  # rows from the end become what they are
        slots = [
            (position, int(column))
            for position, row in enumerate(rows)
            for column in np.flatnonzero(indices[row] != REAL)
        ]
        # Before the images are read: a worker that cannot work should say so at once.
        refused = isinstance(self._source, VariantClient) and not self._source.allow_fork and was_forked_from_live()
        if slots and refused:
            raise UserError(f"GenerativeViews: {FORK_ADVICE}")
        items = [_parts(item, self._image_key) for item in self._read(rows)]
        variants = self._fetch(
            [items[position][0] for position, _ in slots],
            [rows[position] for position, _ in slots],
            [int(indices[rows[position], column]) for position, column in slots],
        )
        columns = [
            [_to_pil(item[0], f"row {row} of the data set")] * indices.shape[1]
            for row, item in zip(rows, items, strict=True)
        ]
        real = columns[0][0] if columns else None
        if variants is not None:
            for (position, column), pixels in zip(slots, variants, strict=True):
                columns[position][column] = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        views = view_columns(indices.shape[1])
        made = [
            (*(self._transform(images[column]) for column in views), *item[1:])
            for images, item in zip(columns, items, strict=True)
        ]
        if variants is not None and real is not None and not self._looked:
            self._looked = True
            self._look(real, variants, made[0][: len(views)])
        return made

    def close(self) -> None:
        """Closes the client of this process; the next item connects anew."""
        if isinstance(self._source, VariantClient):
            self._source.close()

    def _read(self, rows: Sequence[int]) -> Sequence[Any]:
        batched = getattr(self._dataset, "__getitems__", None)
        return batched(rows) if batched is not None else [self._dataset[row] for row in rows]

    def _indices_of_epoch(self) -> npt.NDArray[np.int64]:
        epoch = self.epoch
        if self._indices is None or self._indices[0] != epoch:
            self._indices = (epoch, draw_indices(epoch=epoch, **self._draw))
        return self._indices[1]

    def _fetch(self, images: list[Any], rows: list[int], indices: list[int]) -> UInt8Array | None:
        """Returns the variants; None if they are late and the images are to stand in for them."""
        if not images:
            return None
        names = [row.to_bytes(8, "little") for row in rows]
        variants: UInt8Array | None = None
        origins: list[Origin] = ["real"] * len(images)
        if self._breaker is None or self._breaker.allows():
            started, retries = time.monotonic(), 0
            try:
                if isinstance(self._source, VariantClient):
                    wanted = wanted_variants(images, indices, names=[f"row {row} of the data set" for row in rows])
                    batch = self._source.variants(wanted, generator=self._generator, parameters=self._parameters)
                    variants, origins, names = batch.images, batch.origins, batch.source_ids
                    retries, self._model = batch.retries, batch.model
                else:
                    variants = _checked(self._source(images, indices), len(images))
                    origins = ["generated"] * len(images)
            except ServerUnavailableError as error:
                retries = error.retries
                if self._late == "block":
                    raise
                self._why = str(error)
            finally:
                self.ledger.calls += 1
                self.ledger.stall_seconds += time.monotonic() - started
                self.ledger.retries += retries
                self._counts.add({"retries": retries})
            if variants is not None:
                self._fallbacks.came()
            if self._breaker is not None:
                (self._breaker.failed if variants is None else self._breaker.succeeded)()
        if variants is None:
            self._fallbacks.fell_back(len(images), self._why)
        for name, index, origin in zip(names, indices, origins, strict=True):
            self.ledger.deliver(name, index, origin)
        self._counts.add(Counter(origins))
        return variants

    def _look(self, image: Image.Image, variants: UInt8Array, views: Sequence[Any]) -> None:
        """Warns, once for all workers, of a generator that these images or views are not for."""
        height, width = variants.shape[2:]
        found = small_variants(min(height, width), max(map(_short_side, views)))
        if trained_on(self._model) is not None and image.width * image.height > width * height:
            sizes = f"images of {image.width} x {image.height} pixels, and its own have {width} x {height}"
            found = foreign_data(self._model, f"the data set has {sizes}")
        if found and self._counts.add({"warned": 1})["warned"] == 1:
            log.warning("GenerativeViews: %s", found)


def _checked(variants: Any, count: int) -> UInt8Array:
    pixels = np.asarray(variants)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:2] != (count, 3):
        raise ValueError(
            f"GenerativeViews: the source returned {pixels.dtype} {list(pixels.shape)} for {count} images; it must "
            f"return uint8 [{count}, 3, h, w]"
        )
    return pixels


def _parts(item: Any, image_key: str) -> Sequence[Any]:
    """Returns the image of an item, and what follows its views."""
    if isinstance(item, Mapping):
        if image_key not in item:
            raise ValueError(
                f"GenerativeViews: the items of the data set are dicts without the key {image_key!r}; they have "
                f"{', '.join(map(repr, item)) or 'none'}: name that of the image, image_key="
            )
        rest = {key: value for key, value in item.items() if key != image_key}
        return (item[image_key], rest) if rest else (item[image_key],)
    return item if isinstance(item, tuple | list) else (item,)


def _short_side(view: Any) -> int:
    """Returns the short side of what a transform made of an image, in pixels; 0 if it is no single image."""
    if isinstance(view, Image.Image):
        return min(view.size)
    if isinstance(view, torch.Tensor | np.ndarray) and view.ndim in (2, 3):
        sides = view.shape[:2] if isinstance(view, np.ndarray) and view.shape[-1] in (1, 3, 4) else view.shape[-2:]
        return int(min(sides))
    return 0


def _to_pil(image: Any, where: str) -> Image.Image:
    """Returns an item's image as PIL, RGB, as the source of its variants is read."""
    if isinstance(image, Image.Image):
        return read_picture(image, where).convert("RGB")
    pixels = array_pixels(image, where)
    picture = pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0]
    return Image.fromarray(np.ascontiguousarray(picture)).convert("RGB")


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
