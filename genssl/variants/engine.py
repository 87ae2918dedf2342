"""Makes variants by key with one generator on one device: derived seeds and padded batches.

The server and the in-process source both stand on this, which is why they give the same images.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from genssl.data.base import UInt8Array
from genssl.generators.base import (
    Alive,
    Cancelled,
    EmbedsForeground,
    GeneratesExactly,
    Generator,
    KeepsEmbeddings,
    ReleasesConditioner,
)
from genssl.generators.embedding_cache import DiskEmbeddings, rounded
from genssl.generators.finite import check_made
from genssl.generators.parameters import Parameters
from genssl.generators.variation import Variation, complete, redraw_seed
from genssl.variants.key import VariantKey, parameters_digest

IDLE_SECONDS = 60.0  # without a source to embed, after which the conditioner's memory is freed


@dataclass(frozen=True, eq=False)
class Settings:
    """A complete parameter mapping and what follows from it, worked out once for all rows that share it.

    Attributes:
        parameters: every parameter of the generator; where one varies, the low end of its range until it is settled.
        digest: 16 bytes, see `parameters_digest`; over what varies, not over what a row drew.
        batch_key: rows whose keys are equal can share a batch.
        variation: what source and seed settle, and the drift guard; None if there is neither.
    """

    parameters: Parameters
    digest: bytes
    batch_key: tuple[object, ...]
    variation: Variation | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """One variant to make; see `VariantEngine.row`.

    Attributes:
        name: 16 bytes; rows with equal names are the same image.
        embedding: of the source, float32 [D], or [D + 1] with its foreground, see `VariantEngine.embed`.
        seed: of the noise.
        settings: parameters of this row, settled.
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

    Attributes:
        redrawn: draws that the drift guard added so far.
        kept: embeddings on disk, or None.
    """

    def __init__(self, generator: Generator, buckets: Sequence[int], *, deterministic: bool = False) -> None:
        self.generator = generator
        self.buckets = [buckets[-1]] if deterministic else list(buckets)
        self.deterministic = deterministic
        self.redrawn = 0
        # A generator that can tells how much of a source is foreground, in the same pass of its conditioner.
        self._knows_foreground = isinstance(generator, EmbedsForeground)
        self._embed = generator.embed_with_foreground if isinstance(generator, EmbedsForeground) else generator.embed
        self.kept: DiskEmbeddings | None = generator.kept_embeddings if isinstance(generator, KeepsEmbeddings) else None
        self._embedded: float | None = None

    def complete(self, given: Parameters) -> Settings:
        """Returns `given` on top of the generator's defaults, each with its default's type.

        Raises:
            RequestRefusedError: see `variation.complete`.
        """
        whole, plain, variation = complete(self.generator, given)
        return Settings(plain, parameters_digest(whole), self.generator.batch_key(plain), variation)

    def settle(self, settings: Settings, embedding: torch.Tensor, seed: int) -> Settings:
        """Returns the settings of the variant that a source's embedding (from `embed`) and a seed make."""
        variation = settings.variation
        if variation is None or not (variation.ranges or variation.adaptive):
            return settings
        foreground = float(embedding[-1]) if self._knows_foreground else None
        parameters = variation.settle(settings.parameters, seed, foreground)
        return replace(settings, parameters=parameters, batch_key=self.generator.batch_key(parameters))

    def row(
        self, source_id: bytes, embedding: torch.Tensor, index: int, settings: Settings, seed: int | None = None
    ) -> Row:
        """Returns the row of variant `index` of a source; `seed` replaces the derived one."""
        key = VariantKey(source_id, self.generator.spec.fingerprint, settings.digest, index)
        if seed is None:
            return Row(key.digest(), embedding, key.seed(), self.settle(settings, embedding, key.seed()), key)
        return Row(key.digest_with_seed(seed), embedding, seed, self.settle(settings, embedding, seed))

    def embed(
        self, images: Sequence[UInt8Array], source_ids: Sequence[bytes] | None = None
    ) -> tuple[list[torch.Tensor], float]:
        """Embeds preprocessed sources uint8 [3, S, S]; raises GeneratorError if an embedding is not finite.

        With embeddings on disk they are rounded to what the disk holds, and kept there under `source_ids`, if given.
        Returns float32 [D] each (CPU), or [D + 1] where the conditioner tells the foreground of a source, the last
        number; and the device's seconds.
        """
        started, spec = time.perf_counter(), self.generator.spec
        embeddings: list[torch.Tensor] = []
        for start in range(0, len(images), self.buckets[-1]):
            part = torch.from_numpy(np.stack(images[start : start + self.buckets[-1]]))
            padded = _pad(part, self._bucket(len(part)))
            made = self._embed(padded)[: len(part)]
            dtype = getattr(torch, spec.settings.get("dtype", "float32"), torch.float32)
            check_made(made, f"{spec.title}, its conditioner", "embeddings", dtype)
            embeddings += [row.clone() for row in made]
        if self.kept is not None and embeddings:
            embeddings = rounded(embeddings)
            if source_ids is not None:
                self.kept.put(source_ids, embeddings)
            self._embedded = time.monotonic()
        return embeddings, time.perf_counter() - started

    def _release_conditioner(self) -> None:
        """Frees the conditioner once all embeddings have come from disk for a while."""
        if self._embedded is not None and time.monotonic() - self._embedded > IDLE_SECONDS:
            self._embedded = None
            if isinstance(self.generator, ReleasesConditioner):
                self.generator.release_conditioner()

    def batches(self, rows: Sequence[Row]) -> list[list[int]]:
        """Returns positions of rows that can go through `generate` together, every position once."""
        by_key: dict[tuple[object, ...], list[int]] = {}
        for position, row in enumerate(rows):
            by_key.setdefault(row.settings.batch_key, []).append(position)
        most = self.buckets[-1]
        return [part[start : start + most] for part in by_key.values() for start in range(0, len(part), most)]

    def generate(
        self, rows: Sequence[Row], *, bucket: int | None = None, alive: Alive | None = None
    ) -> tuple[UInt8Array, float]:
        """Makes variants of at most buckets[-1] rows, with equal `settings.batch_key`, in one batch.

        `bucket` is the size to pad to, by default the smallest that holds the rows. `alive` says of each row whether
        anyone still wants it; it is asked between sampler steps, in this thread. Dead rows get arbitrary images, and a
        batch may shrink to a smaller bucket (in deterministic mode never); if no row lives any more, Cancelled is
        raised. Returns uint8 [len(rows), 3, image_size, image_size], and the seconds the device took.
        """
        assert 0 < len(rows) <= self.buckets[-1], "a batch has at least one row and at most the largest bucket"
        assert len({row.settings.batch_key for row in rows}) == 1, "the rows of a batch have equal keys"
        self._release_conditioner()
        started = time.perf_counter()
        images = self._draw(rows, [row.seed for row in rows], bucket or self._bucket(len(rows)), alive)
        if any(_guarded(row) for row in rows):
            images = self._guard(rows, images, alive)
        return images, time.perf_counter() - started

    def _draw(self, rows: Sequence[Row], seeds: Sequence[int], bucket: int, alive: Alive | None) -> UInt8Array:
        filler = bucket - len(rows)
        assert filler >= 0, "the bucket holds the rows"
        embeddings = torch.stack([row.embedding for row in rows])
        if self._knows_foreground:
            embeddings = embeddings[:, :-1]
        generate = self.generator.generate
        if self.deterministic and isinstance(self.generator, GeneratesExactly):
            generate = self.generator.generate_exact
        images = generate(
            _pad(embeddings, bucket),
            [*seeds, *[0] * filler],
            [row.settings.parameters for row in rows] + [rows[-1].settings.parameters] * filler,
            alive=None if alive is None else lambda: [*alive(), *[False] * filler],
            sizes=[] if self.deterministic else [size for size in self.buckets if size < bucket],
        )
        result: UInt8Array = images[: len(rows)].numpy()
        return result

    def _guard(self, rows: Sequence[Row], images: UInt8Array, alive: Alive | None) -> UInt8Array:
        """Draws anew what is too unlike its source; of a row's draws the first that passes stays, or else the best."""
        images, number = images.copy(), 0
        left = [position for position, row in enumerate(rows) if _guarded(row)]
        best = dict(zip(left, self._similarities(rows, left, images[left]), strict=True))
        while True:
            number += 1
            wanted = alive() if alive is not None else [True] * len(rows)
            left = [one for one in left if wanted[one] and _fails(rows[one], best[one], number)]
            if not left:
                return images
            self.redrawn += len(left)
            chosen = [rows[position] for position in left]
            seeds = [redraw_seed(row.seed, number) for row in chosen]
            try:
                part = None if alive is None else _part(alive, left)
                drawn = self._draw(chosen, seeds, self._bucket(len(chosen)), part)
            except Cancelled:  # those that fail are not wanted any more; the others are made
                return images
            for position, image, similarity in zip(left, drawn, self._similarities(rows, left, drawn), strict=True):
                if similarity > best[position]:
                    images[position], best[position] = image, similarity

    def _similarities(self, rows: Sequence[Row], positions: Sequence[int], images: UInt8Array) -> list[float]:
        """Returns the cosines of the embeddings of `images` and of the sources of the rows at `positions`."""
        embedded, _ = self.embed([self.generator.preprocess(image) for image in images])
        sources = torch.stack([rows[position].embedding for position in positions])
        made = torch.stack(embedded)
        if self._knows_foreground:
            sources, made = sources[:, :-1], made[:, :-1]
        similarities: list[float] = F.cosine_similarity(made.float(), sources.float(), dim=1).tolist()
        return similarities

    def _bucket(self, count: int) -> int:
        return next(size for size in self.buckets if size >= count)


class EmbeddingCache:
    """Up to `capacity` embeddings by source id, least recently used dropped first; the others are looked for on disk.

    Belongs to one thread.
    """

    def __init__(self, capacity: int, kept: DiskEmbeddings | None = None) -> None:
        self._capacity, self._kept = capacity, kept
        self._items: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def get(self, source_id: bytes) -> torch.Tensor | None:
        """Returns the embedding float32 [D], or None."""
        if source_id not in self._items:
            found = None if self._kept is None else self._kept.get(source_id)
            if found is not None:
                self.put(source_id, found)
            return found
        self._items.move_to_end(source_id)
        return self._items[source_id]

    def put(self, source_id: bytes, embedding: torch.Tensor) -> None:
        """Keeps an embedding."""
        self._items[source_id] = embedding
        self._items.move_to_end(source_id)
        while len(self._items) > self._capacity:
            self._items.popitem(last=False)


def _part(alive: Alive, positions: Sequence[int]) -> Alive:
    """Returns `alive` for some of its rows."""

    def of_positions() -> list[bool]:
        wanted = alive()
        return [wanted[position] for position in positions]

    return of_positions


def _guarded(row: Row) -> bool:
    return row.settings.variation is not None and row.settings.variation.min_similarity is not None


def _fails(row: Row, similarity: float, draws: int) -> bool:
    """Says whether a row is drawn once more after so many draws, of which the best has this similarity."""
    variation = row.settings.variation
    assert variation is not None
    assert variation.min_similarity is not None
    return similarity < variation.min_similarity and draws < variation.max_tries


def _pad(batch: torch.Tensor, size: int) -> torch.Tensor:
    """Repeats the last row until the batch has `size` rows."""
    if len(batch) == size:
        return batch
    return torch.cat([batch, batch[-1:].expand(size - len(batch), *batch.shape[1:])])
