"""Makes variants by key with one generator on one device: derived seeds and padded batches.

The server and the in-process source both stand on this, which is why they give the same images.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from genssl.data.base import UInt8Array
from genssl.errors import RequestRefusedError, suggest
from genssl.generators.base import Generator, Parameters
from genssl.variants.key import VariantKey, parameters_digest


@dataclass(frozen=True, eq=False)
class Row:
    """One variant to make.

    Attributes:
        source_id: names the source.
        embedding: of the source, float32 [D].
        index: of the variant.
        parameters: complete, see `VariantEngine.complete`.
        seed: replaces the derived seed when it is not None.
    """

    source_id: bytes
    embedding: torch.Tensor
    index: int
    parameters: Parameters
    seed: int | None = None


class VariantEngine:
    """Not thread-safe: `embed` and `generate` are called from the one thread that owns the device.

    Args:
        generator: conditioner and decoder.
        buckets: ascending batch sizes; a batch is padded up to the next one, so that few shapes are ever computed.
    """

    def __init__(self, generator: Generator, buckets: Sequence[int]) -> None:
        self.generator = generator
        self.buckets = list(buckets)

    def complete(self, given: Parameters) -> Parameters:
        """Returns `given` on top of the generator's defaults, each with its default's type.

        Raises:
            RequestRefusedError: for a parameter that this generator does not have, or for a fraction where a whole
                number is due.
        """
        defaults = self.generator.spec.defaults
        complete = dict(defaults)
        for name, value in given.items():
            if name not in defaults:
                raise RequestRefusedError(
                    f"{self.generator.spec.name} has no parameter {name!r}{suggest(name, defaults)}"
                )
            kind = type(defaults[name])
            if kind(value) != value:
                raise RequestRefusedError(
                    f"{self.generator.spec.name}: parameter {name} is a whole number, not {value!r}"
                )
            complete[name] = kind(value)
        self.generator.check(complete)
        return complete

    def embed(self, images: Sequence[UInt8Array]) -> tuple[list[torch.Tensor], float]:
        """Embeds preprocessed sources uint8 [3, S, S]; returns float32 [D] each (CPU), and the device's seconds."""
        started = time.perf_counter()
        embeddings: list[torch.Tensor] = []
        for start in range(0, len(images), self.buckets[-1]):
            part = torch.from_numpy(np.stack(images[start : start + self.buckets[-1]]))
            padded = _pad(part, self._bucket(len(part)))
            embeddings += [row.clone() for row in self.generator.embed(padded)[: len(part)]]
        return embeddings, time.perf_counter() - started

    def generate(self, rows: Sequence[Row]) -> tuple[UInt8Array, float]:
        """Makes variants in one batch.

        Args:
            rows: at most buckets[-1] of them, with equal `batch_key`.

        Returns:
            uint8 [len(rows), 3, image_size, image_size], and the seconds the device took.
        """
        assert 0 < len(rows) <= self.buckets[-1], "a batch has at least one row and at most the largest bucket"
        started = time.perf_counter()
        fingerprint = self.generator.spec.fingerprint
        seeds = [
            VariantKey(row.source_id, fingerprint, parameters_digest(row.parameters), row.index).seed()
            if row.seed is None
            else row.seed
            for row in rows
        ]
        bucket = self._bucket(len(rows))
        filler = bucket - len(rows)
        images = self.generator.generate(
            _pad(torch.stack([row.embedding for row in rows]), bucket),
            seeds + [0] * filler,
            [row.parameters for row in rows] + [rows[-1].parameters] * filler,
        )
        result: UInt8Array = images[: len(rows)].numpy()
        return result, time.perf_counter() - started

    def _bucket(self, count: int) -> int:
        return next(size for size in self.buckets if size >= count)


class EmbeddingCache:
    """Embeddings by source id, least recently used dropped first. Belongs to one thread.

    Args:
        capacity: how many are kept.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def get(self, source_id: bytes) -> torch.Tensor | None:
        """Returns the embedding float32 [D], or None."""
        if source_id not in self._items:
            return None
        self._items.move_to_end(source_id)
        return self._items[source_id]

    def put(self, source_id: bytes, embedding: torch.Tensor) -> None:
        """Keeps an embedding."""
        self._items[source_id] = embedding
        self._items.move_to_end(source_id)
        while len(self._items) > self._capacity:
            self._items.popitem(last=False)


def _pad(batch: torch.Tensor, size: int) -> torch.Tensor:
    """Repeats the last row until the batch has `size` rows."""
    if len(batch) == size:
        return batch
    return torch.cat([batch, batch[-1:].expand(size - len(batch), *batch.shape[1:])])
