"""Where a training loop gets variants from: the contract. Imports no torch, since clients stand on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from genssl.data.base import UInt8Array
from genssl.variants.ledger import Origin

REAL = -1  # the index of a slot that shows the image itself


@dataclass(frozen=True)
class VariantRequest:
    """One variant that a step wants: variant `index` of the image in row `row` of the data set."""

    row: int
    source_id: bytes
    index: int


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
