"""A store as a source of variants: read alone, before a generator, or inside what fetches from servers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Literal

from genssl.data.base import UInt8Array
from genssl.variants.source import REAL, Delivery, Fetcher, Image, Slot, VariantRequest, VariantSource
from genssl.variants.store.facts import GeneratorFacts
from genssl.variants.store.manifest import StoreError
from genssl.variants.store.store import VariantStore


class StoredVariants:
    """The variants of one generator in a store.

    Args:
        store: belongs to this object from now on.
        facts: the generator whose variants are meant.
        strict: whether a variant that cannot be stored is an error.
    """

    def __init__(self, store: VariantStore, facts: GeneratorFacts, *, strict: bool = False) -> None:
        self.store, self.facts, self._strict = store, facts, strict
        self._lock = threading.Lock()  # nothing is written while the store closes
        self._closed = False

    def read(self, requests: Sequence[VariantRequest]) -> list[UInt8Array | None]:
        """Returns stored variants uint8 [3, h, w], None where the store lacks one."""
        keys = self.facts.keys([request.source_id for request in requests], [request.index for request in requests])
        return self.store.get_many([key.digest() for key in keys])

    def keep(self, requests: Sequence[VariantRequest], images: Sequence[UInt8Array]) -> None:
        """Stores what has been made; on return it survives kill -9. From any thread; does nothing after `close`.

        Raises:
            StoreError: under `strict`, if it cannot be stored.
        """
        keys = self.facts.keys([request.source_id for request in requests], [request.index for request in requests])
        with self._lock:
            if not self._closed:
                self.store.put_many(list(zip(keys, images, strict=True)), strict=self._strict)

    def close(self) -> None:
        """Closes the store."""
        with self._lock:
            self._closed = True
            self.store.close()


class StoreFetcher:
    """Lays a store inside the fetch: what it has is at hand; what another fetcher brings is stored as it comes."""

    def __init__(self, stored: StoredVariants, behind: Fetcher) -> None:
        self._stored, self._behind = stored, behind
        self.describe, self.check = behind.describe, behind.check

    def look(self, requests: Sequence[VariantRequest]) -> list[Image | None]:
        """Returns what is stored."""
        return [None if image is None else (image, "store") for image in self._stored.read(requests)]

    async def fetch(self, requests: Sequence[VariantRequest], *, ahead: bool = False) -> list[Image]:
        """Fetches what the store lacked when it was looked into, and stores it before anybody gets it."""
        images = await self._behind.fetch(requests, ahead=ahead)
        await asyncio.to_thread(self._stored.keep, requests, [image for image, _ in images])
        return images


class StoredSource:
    """Takes variants from a store. What it lacks is made by the source behind it and stored, or left to a rule.

    Args:
        stored: belongs to this source from now on; open for writing if there is a source behind.
        missing: what a step gets in place of a variant that the store lacks, if nothing lies behind.
        behind: makes what the store lacks, with this generator, when it is taken; belongs to this source from now on.
    """

    def __init__(
        self,
        stored: StoredVariants,
        *,
        missing: Literal["fail", "real"] = "fail",
        behind: VariantSource | None = None,
    ) -> None:
        self.stored, self._missing, self._behind = stored, missing, behind

    def announce(self, requests: Sequence[VariantRequest], step: int | None = None) -> None:
        """Does nothing: a store needs no time, and what lies behind works when its variants are taken."""

    def take(self, requests: Sequence[VariantRequest], step: int | None = None) -> Delivery:
        """Returns stored variants (origin "store"), and what the source behind has for the others.

        Raises:
            StoreError: if a variant is missing and nothing lies behind, under `missing="fail"`; or if one cannot be
                stored, under `strict`.
        """
        images = self.stored.read(requests)
        lacking = [request for request, image in zip(requests, images, strict=True) if image is None]
        others: list[Slot] = [(REAL, None, "real")] * len(lacking)
        if lacking and self._behind is not None:
            made = self._behind.take(lacking, step)
            self.stored.keep(lacking, list(made.images))
            others = list(zip(made.indices, made.images, made.origins, strict=True))
        elif lacking and self._missing == "fail":
            store, first = self.stored.store, lacking[0]
            raise StoreError(
                f"{store.folder} lacks {len(lacking)} of the {len(requests)} variants that are wanted now, such as "
                f"variant {first.index} of image {first.row}"
                + ("; some of its records are damaged" if store.damaged else "")
                + ". Make them with `genssl pregenerate`, or set variants.missing: generate or real"
            )
        filled = iter(others)
        return Delivery.of(
            [
                (request.index, image, "store") if image is not None else next(filled)
                for request, image in zip(requests, images, strict=True)
            ]
        )

    def close(self) -> None:
        """Closes the source behind and the store."""
        if self._behind is not None:
            self._behind.close()
        self.stored.close()
