"""Makes variants by key with one generator on one device: derived seeds and padded batches.

The server and the in-process source both stand on this, which is why they give the same images.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from genssl.data.base import UInt8Array
from genssl.errors import RequestRefusedError, suggest
from genssl.generators.base import Alive, Generator, Parameters
from genssl.variants.key import VariantKey, parameters_digest


@dataclass(frozen=True, eq=False)
class Settings:
    """A complete parameter mapping and what follows from it, worked out once for all rows that share it.

    Attributes:
        parameters: every parameter of the generator.
        digest: 16 bytes, see `parameters_digest`.
        batch_key: rows whose keys are equal can share a batch.
    """

    parameters: Parameters
    digest: bytes
    batch_key: tuple[object, ...]


@dataclass(frozen=True, eq=False)
class Row:
    """One variant to make; see `VariantEngine.row`.

    Attributes:
        name: 16 bytes; rows with equal names are the same image.
        embedding: of the source, float32 [D].
        seed: of the noise.
        settings: parameters of this row.
        key: of the variant, whose digest is `name`; None if a client chose the seed, which makes an image that no key
            names and no store may keep.
    """

    name: bytes
    embedding: torch.Tensor
    seed: int
    settings: Settings
    key: VariantKey | None = None


class VariantEngine:
    """Not thread-safe: `embed` and `generate` are called from the one thread that owns the device.

    Args:
        generator: conditioner and decoder.
        buckets: ascending batch sizes; a batch is padded up to the next one, so that few shapes are ever computed.
        deterministic: pads every batch to the largest bucket, so that a row's bits do not depend on its company.
    """

    def __init__(self, generator: Generator, buckets: Sequence[int], *, deterministic: bool = False) -> None:
        self.generator = generator
        self.buckets = [buckets[-1]] if deterministic else list(buckets)
        self.deterministic = deterministic

    def complete(self, given: Parameters) -> Settings:
        """Returns `given` on top of the generator's defaults, each with its default's type.

        Raises:
            RequestRefusedError: for a parameter that this generator does not have, for infinities and NaN, or for a
                fraction where a whole number is due.
        """
        defaults = self.generator.spec.defaults
        complete = dict(defaults)
        for name, value in given.items():
            if name not in defaults:
                raise RequestRefusedError(
                    f"{self.generator.spec.name} has no parameter {name!r}{suggest(name, defaults)}"
                )
            if not math.isfinite(value):
                raise RequestRefusedError(
                    f"{self.generator.spec.name}: parameter {name} is {value}; a finite number is expected"
                )
            kind = type(defaults[name])
            if kind(value) != value:
                raise RequestRefusedError(
                    f"{self.generator.spec.name}: parameter {name} is a whole number, not {value!r}"
                )
            complete[name] = kind(value) + 0  # -0.0 becomes 0.0: equal parameters must have equal names
        self.generator.check(complete)
        return Settings(complete, parameters_digest(complete), self.generator.batch_key(complete))

    def row(
        self, source_id: bytes, embedding: torch.Tensor, index: int, settings: Settings, seed: int | None = None
    ) -> Row:
        """Returns the row of variant `index` of a source; `seed` replaces the derived one."""
        key = VariantKey(source_id, self.generator.spec.fingerprint, settings.digest, index)
        if seed is None:
            return Row(key.digest(), embedding, key.seed(), settings, key)
        return Row(key.digest_with_seed(seed), embedding, seed, settings)

    def embed(self, images: Sequence[UInt8Array]) -> tuple[list[torch.Tensor], float]:
        """Embeds preprocessed sources uint8 [3, S, S]; returns float32 [D] each (CPU), and the device's seconds."""
        started = time.perf_counter()
        embeddings: list[torch.Tensor] = []
        for start in range(0, len(images), self.buckets[-1]):
            part = torch.from_numpy(np.stack(images[start : start + self.buckets[-1]]))
            padded = _pad(part, self._bucket(len(part)))
            embeddings += [row.clone() for row in self.generator.embed(padded)[: len(part)]]
        return embeddings, time.perf_counter() - started

    def generate(
        self, rows: Sequence[Row], *, bucket: int | None = None, alive: Alive | None = None
    ) -> tuple[UInt8Array, float]:
        """Makes variants in one batch.

        Args:
            rows: at most buckets[-1] of them, with equal `settings.batch_key`.
            bucket: the size to pad to; by default the smallest of `buckets` that holds the rows.
            alive: says of each row whether anyone still wants it; asked between sampler steps, in this thread. Dead
                rows get arbitrary images, and a batch may shrink to a smaller bucket (in deterministic mode never).

        Returns:
            uint8 [len(rows), 3, image_size, image_size], and the seconds the device took.

        Raises:
            Cancelled: if no row lives any more.
        """
        assert 0 < len(rows) <= self.buckets[-1], "a batch has at least one row and at most the largest bucket"
        started = time.perf_counter()
        bucket = bucket or self._bucket(len(rows))
        filler = bucket - len(rows)
        assert filler >= 0, "the bucket holds the rows"
        images = self.generator.generate(
            _pad(torch.stack([row.embedding for row in rows]), bucket),
            [row.seed for row in rows] + [0] * filler,
            [row.settings.parameters for row in rows] + [rows[-1].settings.parameters] * filler,
            alive=None if alive is None else lambda: [*alive(), *[False] * filler],
            sizes=[] if self.deterministic else [size for size in self.buckets if size < bucket],
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
