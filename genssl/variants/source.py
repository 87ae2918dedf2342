"""Where a training loop gets variants from: the contract. Imports no torch, since clients stand on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from genssl.data.base import UInt8Array
from genssl.variants.ledger import Origin


@dataclass(frozen=True)
class VariantRequest:
    """One variant that a step wants: variant `index` of the image in row `row` of the data set."""

    row: int
    source_id: bytes
    index: int


@dataclass
class Delivery:
    """What a step gets: uint8 [N, 3, h, w] in the order of the requests, and where each image came from."""

    images: UInt8Array
    origins: list[Origin]


class VariantSource(Protocol):
    """In-process, stored and remote sources are interchangeable: the same requests give the same images."""

    def plan(self, requests: Sequence[VariantRequest]) -> None:
        """Announces what a coming step will take; returns at once."""
        ...

    def take(self, requests: Sequence[VariantRequest]) -> Delivery:
        """Returns what an announced step wants, waiting for it if it must.

        Raises:
            ServerUnavailableError: if it cannot be had in time.
            RequestRefusedError: if the generator refuses.
        """
        ...

    def close(self) -> None:
        """Drops what was announced and not taken, and frees everything."""
        ...
