"""The stored source: variants from a store, and, where another source lies behind it, what that one makes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Literal

import numpy as np

from genssl.data.base import ImageDataset, UInt8Array
from genssl.variants.ledger import Origin
from genssl.variants.source import REAL, Delivery, VariantRequest, VariantSource
from genssl.variants.store.facts import GeneratorFacts
from genssl.variants.store.manifest import StoreError
from genssl.variants.store.store import VariantStore

Slot = tuple[int, UInt8Array | None, Origin]


class StoredSource:
    """Takes variants from a store. What it lacks is made by the source behind it and stored, or left to a rule.

    Args:
        store: belongs to this source from now on; open for writing if there is a source behind.
        facts: the generator whose variants are meant.
        dataset: has the sources.
        missing: what a step gets in place of a variant that the store lacks, if nothing lies behind.
        behind: makes what the store lacks, with this generator; belongs to this source from now on.
        ahead: whether the source behind makes variants when they are planned; otherwise `take` is all it hears.
            Such a source hands what it makes to `keep` itself, as it comes.
        strict: whether a variant that cannot be stored is an error.
    """

    def __init__(
        self,
        store: VariantStore,
        facts: GeneratorFacts,
        dataset: ImageDataset,
        *,
        missing: Literal["fail", "real"] = "fail",
        behind: VariantSource | None = None,
        ahead: bool = False,
        strict: bool = False,
    ) -> None:
        self.store, self.facts = store, facts
        self._dataset, self._missing, self._strict = dataset, missing, strict
        self._behind, self._ahead = behind, ahead
        self._asked: dict[int, list[int]] = {}  # by step, the positions that were planned behind
        self._lock = threading.Lock()  # nothing is written while the store closes
        self._closed = False

    def announce(self, requests: Sequence[VariantRequest], step: int | None = None) -> None:
        """Announces to the source behind what the store lacks now."""
        if self._behind is None or not self._ahead:
            return
        absent = self._absent(requests)
        if step is not None:
            self._asked[step] = absent
        self._behind.announce([requests[position] for position in absent], step)

    def take(self, requests: Sequence[VariantRequest], step: int | None = None) -> Delivery:
        """Returns stored variants (origin "store"), and what the source behind has for the others.

        Raises:
            StoreError: if a variant is missing and nothing lies behind, under `missing="fail"`; or if one cannot be
                stored, under `strict`.
        """
        images = self.store.get_many(self._digests(requests))
        slots: list[Slot] = [(request.index, image, "store") for request, image in zip(requests, images, strict=True)]
        absent = [position for position, image in enumerate(images) if image is None]
        if self._behind is not None:
            # What was planned behind is taken there, though it may have been stored since, or it would wait for ever.
            asked = self._asked.pop(step, []) if step is not None else []
            for position, slot in self._from_behind(requests, sorted({*absent, *asked}), step):
                slots[position] = slot
        elif absent and self._missing == "fail":
            raise StoreError(
                f"{self.store.folder} lacks {len(absent)} of the {len(requests)} variants that are wanted now, such as "
                f"variant {requests[absent[0]].index} of image {requests[absent[0]].row}"
                + ("; some of its records are damaged" if self.store.damaged else "")
                + ". Make them with `genssl pregenerate`, or set variants.missing: generate or real"
            )
        else:
            for position in absent:
                slots[position] = (REAL, None, "real")
        return _delivery(slots)

    def look(self, request: VariantRequest) -> UInt8Array | None:
        """Returns a stored variant uint8 [3, h, w], or None if the store lacks it; nothing is made or counted."""
        return self.store.get_many(self._digests([request]))[0]

    def lacking(self, requests: Sequence[VariantRequest]) -> list[VariantRequest]:
        """Returns those requests whose variant the store does not have."""
        return [requests[position] for position in self._absent(requests)]

    def keep(self, requests: Sequence[VariantRequest], images: Sequence[tuple[UInt8Array, Origin]]) -> None:
        """Stores what has been made; on return it survives kill -9. From any thread; does nothing after `close`.

        Raises:
            StoreError: under `strict`, if it cannot be stored.
        """
        keys = self.facts.keys([request.source_id for request in requests], [request.index for request in requests])
        items = [(key, image) for key, (image, _) in zip(keys, images, strict=True)]
        with self._lock:
            if not self._closed:
                self.store.put_many(items, strict=self._strict)

    def close(self) -> None:
        """Closes the source behind and the store."""
        if self._behind is not None:
            self._behind.close()
        with self._lock:
            self._closed = True
            self.store.close()

    def _from_behind(
        self, requests: Sequence[VariantRequest], positions: Sequence[int], step: int | None
    ) -> list[tuple[int, Slot]]:
        assert self._behind is not None
        # A source that works ahead hears of every step, since what has not been sent for steps that passed is dropped.
        if not positions and not (self._ahead and step is not None):
            return []
        wanted = [requests[position] for position in positions]
        delivery = self._behind.take(wanted, step)
        images = iter(delivery.images)
        slots: list[Slot] = [
            (index, None if origin == "real" else next(images), origin)
            for index, origin in zip(delivery.indices, delivery.origins, strict=True)
        ]
        if not self._ahead:
            self.keep(wanted, [(image, origin) for _, image, origin in slots if image is not None])
        return list(zip(positions, slots, strict=True))

    def _absent(self, requests: Sequence[VariantRequest]) -> list[int]:
        images = self.store.get_many(self._digests(requests))
        return [position for position, image in enumerate(images) if image is None]

    def _digests(self, requests: Sequence[VariantRequest]) -> list[bytes]:
        keys = self.facts.keys([request.source_id for request in requests], [request.index for request in requests])
        return [key.digest() for key in keys]


def _delivery(slots: Sequence[Slot]) -> Delivery:
    images = [image for _, image, _ in slots if image is not None]
    return Delivery(
        images=np.stack(images) if images else np.zeros((0, 3, 1, 1), np.uint8),
        origins=[origin for _, _, origin in slots],
        indices=[index for index, _, _ in slots],
    )
