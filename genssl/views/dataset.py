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

from genssl.config.views import Policy
from genssl.data.base import UInt8Array
from genssl.errors import ServerUnavailableError, UserError
from genssl.serving.breaker import CircuitBreaker, FallbackLog
from genssl.serving.images import wanted_variants
from genssl.serving.sync_client import VariantClient
from genssl.variants.background import FORK_ADVICE, was_forked_from_live
from genssl.variants.ledger import Ledger, Origin
from genssl.variants.plan import REAL, draw_indices, view_columns
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
    or resizes, unless the two are equal.

    Example:
        views = GenerativeViews(CIFAR10(root), "127.0.0.1:50051", transform=simclr_augmentation)
        loader = DataLoader(views, 256, shuffle=True, num_workers=8, multiprocessing_context="forkserver")
        for epoch in range(100):
            views.set_epoch(epoch)
            for view1, view2, label in loader: ...

    Args:
        dataset: its items are images, or tuples that begin with one: a PIL image, or a uint8 array or tensor
            ([3, H, W], [1, H, W], [H, W, 3] or [H, W]). For the server alone, one of more than 16 MiB of pixels is
            shrunk by the rule of `serving.images.stored_image`; the real view has all of them.
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
    ) -> None:
        policies = get_args(Policy)
        _check(policy in policies, "policy", policy, ", ".join(policies))
        _check(late in ("block", "real"), "late", late, "block, real")
        _check(0 <= probability <= 1, "probability", probability, "0 to 1")
        _check(
            per_image == "fresh" or (isinstance(per_image, int) and per_image > 0),
            "per_image",
            per_image,
            "fresh, or 1 and more",
        )
        _check(isinstance(third_count, int) and third_count > 0, "third_count", third_count, "1 and more")
        _check(0 <= seed < 2**31, "seed", seed, "0 to 2**31 - 1")
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
        self._dataset, self._transform = dataset, transform or _to_tensor
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
        self._counts = SharedCounts([*ORIGINS, "retries"])
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
        items = [item if isinstance(item, tuple | list) else (item,) for item in self._read(rows)]
        variants = self._fetch(
            [items[position][0] for position, _ in slots],
            [rows[position] for position, _ in slots],
            [int(indices[rows[position], column]) for position, column in slots],
        )
        columns = [[_to_pil(image)] * indices.shape[1] for image, *_ in items]
        if variants is not None:
            for (position, column), pixels in zip(slots, variants, strict=True):
                columns[position][column] = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        views = view_columns(indices.shape[1])
        return [
            (*(self._transform(images[column]) for column in views), *item[1:])
            for images, item in zip(columns, items, strict=True)
        ]

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
                    retries = batch.retries
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
            self._note(came=variants is not None)
        if variants is None:
            self._fallbacks.fell_back(len(images), self._why)
        for name, index, origin in zip(names, indices, origins, strict=True):
            self.ledger.deliver(name, index, origin)
        self._counts.add(Counter(origins))
        return variants

    def _note(self, *, came: bool) -> None:
        """Notes whether a call brought its variants."""
        if came:
            self._fallbacks.came()
        if self._breaker is not None:
            (self._breaker.succeeded if came else self._breaker.failed)()


def _check(good: bool, name: str, found: object, allowed: str) -> None:
    if not good:
        raise ValueError(f"GenerativeViews: {name} is {found!r}; allowed: {allowed}")


def _checked(variants: Any, count: int) -> UInt8Array:
    pixels = np.asarray(variants)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:2] != (count, 3):
        raise ValueError(
            f"GenerativeViews: the source returned {pixels.dtype} {list(pixels.shape)} for {count} images; it must "
            f"return uint8 [{count}, 3, h, w]"
        )
    return pixels


def _to_pil(image: Any) -> Image.Image:
    """Returns an item's image as PIL, RGB."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    pixels = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if pixels.dtype != np.uint8:
        raise TypeError(
            f"GenerativeViews: the data set gives {type(image).__name__} images of dtype {pixels.dtype}; PIL images or "
            "uint8 in 0..255 are wanted: take the transforms off the data set and give them as `transform`"
        )
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[2] != 3):
        raise ValueError(
            f"GenerativeViews: the data set gives images of shape {list(np.shape(image))}; "
            "[3, H, W], [1, H, W], [H, W, 3] or [H, W] are wanted"
        )
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
