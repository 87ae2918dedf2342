"""Where a training loop gets variants from: the contracts. Imports no torch, since clients stand on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from genssl.data.base import UInt8Array
from genssl.variants.ledger import Origin

REAL = -1  # the index of a slot that shows the image itself

Image = tuple[UInt8Array, Origin]  # a variant uint8 [3, h, w], and where it came from
Slot = tuple[int, UInt8Array | None, Origin]  # what a request gets: index, pixels (None for the image itself), origin


@dataclass(frozen=True)
class VariantRequest:
    """One variant that a step wants: variant `index` of the image in row `row` of the data set."""

    row: int
    source_id: bytes
    index: int

    @property
    def key(self) -> tuple[bytes, int]:
        """What names the variant among those of one generator: equal images share theirs."""
        return self.source_id, self.index


@dataclass
class Delivery:
    """What a step gets for its N requests.

    Attributes:
        images: uint8 [M, 3, h, w], in the order of the requests, of those whose origin is not "real": M <= N.
        origins: N of them, where each image came from.
        indices: N of them, the index of the variant delivered, or `REAL` where the origin is "real".
    """

    images: UInt8Array
    origins: list[Origin]
    indices: list[int]

    @classmethod
    def of(cls, slots: Sequence[Slot]) -> Delivery:
        """Returns the delivery of N slots."""
        images = [image for _, image, _ in slots if image is not None]
        return cls(
            images=np.stack(images) if images else np.zeros((0, 3, 1, 1), np.uint8),
            origins=[origin for _, _, origin in slots],
            indices=[index for index, _, _ in slots],
        )


class VariantSource(Protocol):
    """In-process, stored and remote sources are interchangeable: the same requests give the same images."""

    def announce(self, requests: Sequence[VariantRequest], step: int | None = None) -> None:
        """Announces what a coming step will take; returns at once.

        Args:
            requests: the variants.
            step: number of the step within the run; None announces for a `take` without a step.
        """
        ...

    def take(self, requests: Sequence[VariantRequest], step: int | None = None) -> Delivery:
        """Returns what an announced step wants, waiting for it if it must and may.

        Args:
            requests: as announced.
            step: number of the step within the run; steps before it have passed. None waits for every variant, whatever
                the source does for a step whose variants are late.

        Raises:
            ServerUnavailableError: if it cannot be had in time.
            RequestRefusedError: if the generator refuses.
        """
        ...

    def close(self) -> None:
        """Drops what was announced and not taken, and frees everything."""
        ...


class Fetcher(Protocol):
    """How a source that works ahead gets variants. One may lie around another, as a store's around the servers'."""

    def look(self, requests: Sequence[VariantRequest]) -> list[Image | None]:
        """Returns what is at hand without anybody being asked, None for the rest."""
        ...

    async def fetch(self, requests: Sequence[VariantRequest], *, ahead: bool = False) -> list[Image]:
        """Fetches variants; raises if they cannot be had. `ahead` of the plan they are asked for at low priority."""
        ...

    def describe(self) -> str:
        """Says, for the error when nothing comes, what is wrong and what to do."""
        ...

    def check(self) -> None:
        """Raises if waiting is pointless, such as when the server process has died."""
        ...
