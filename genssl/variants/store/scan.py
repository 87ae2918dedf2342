"""Walks through all that a store holds, in ascending order and in short transactions, which keep no writer waiting."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import lmdb

from genssl.variants.key import VariantKey
from genssl.variants.store.environment import Environment, in_order
from genssl.variants.store.manifest import StoreError, StoreManifest, read_manifest
from genssl.variants.store.record import ENCODINGS, HEADER, MAGIC, SHAPE, digest_of
from genssl.variants.store.writers import WRITERS, writer_names

KEYS, RECORDS, LINKS = 1024, 32, 4096  # of a transaction
Shape = tuple[int, int, int]
DAMAGED: tuple[str, Shape] = ("damaged", (0, 0, 0))


class Progress:
    """Is told how far a tool of the store has come; this one ignores it."""

    def start(self, total: int) -> None:
        """Takes the number of records that there are, as far as is known."""

    def advance(self, done: int) -> None:
        """Takes the number of records done since the last call."""


@dataclass(frozen=True)
class Writer:
    """What one process wrote into a store."""

    name: str  # of its folder
    environment: Environment | None  # None if it cannot be opened, or if nothing was written yet
    damage: str | None = None  # why it cannot be read, or what is gone of that which was committed, or None


@contextmanager
def open_writers(folder: Path, only: str | None = None) -> Iterator[list[Writer]]:
    """Opens every environment of a store for reading, by name, or `only` one.

    What LMDB raises on a damaged tree while the block reads becomes a StoreError.
    """
    writers: list[Writer] = []
    try:
        for name in [only] if only is not None else writer_names(folder):
            try:
                environment = Environment.open(folder / WRITERS / name, writable=False)
                damage = environment.loss if environment is not None else None
            except (lmdb.Error, OSError) as error:
                environment, damage = None, f"it cannot be read: {error}"
            writers.append(Writer(name, environment, damage))
        yield writers
    except lmdb.Error as error:
        raise StoreError(
            f"{folder} is damaged ({error}); genssl store verify {folder} names what is, and genssl store merge copies "
            "what is not"
        ) from None
    finally:
        for writer in writers:
            if writer.environment is not None:
                writer.environment.release()


def damage_of(writers: list[Writer]) -> list[str]:
    """Returns one line for every writer whose records cannot be read or are gone in part."""
    return [f"{writer.name}: {writer.damage}" for writer in writers if writer.damage]


def records(environment: Environment, after: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    """Yields digest and record of every variant, by digest, of those above `after`; raises lmdb.Error on damage."""
    for digest, record, _ in _values(environment, after, None, RECORDS):
        yield digest, record


def heads(environment: Environment, size: int = HEADER.size) -> Iterator[tuple[bytes, bytes, int]]:
    """Yields digest, header and size in bytes of every record, by digest; raises lmdb.Error on a damaged tree.

    Of the header come the first `size` bytes; with 0 no record is touched.
    """
    return _values(environment, b"", size, KEYS)


def _values(environment: Environment, after: bytes, size: int | None, limit: int) -> Iterator[tuple[bytes, bytes, int]]:
    def work(txn: Any) -> list[tuple[bytes, bytes, int]]:
        cursor = txn.cursor(db=environment.variants)
        if not (cursor.set_range(after + b"\0") if after else cursor.first()):
            return []
        part = islice(cursor.iternext(), limit)
        return [(bytes(digest), bytes(record[:size]), len(record)) for digest, record in part]

    while part := environment.read(work, buffers=True):
        in_order([digest for digest, _, _ in part], after, environment.folder)
        yield from part
        after = part[-1][0]


def links(environment: Environment) -> Iterator[tuple[bytes, bytes]]:
    """Yields source id and link of every variant, by source and index; raises lmdb.Error on a damaged tree."""
    last: tuple[bytes, bytes] | None = None

    def work(txn: Any) -> list[tuple[bytes, bytes]]:
        cursor = txn.cursor(db=environment.sources)
        if last is not None and not cursor.set_key_dup(*last):
            raise lmdb.CorruptedError(f"{environment.folder}: the link that was read last is gone")
        if not (cursor.first() if last is None else cursor.next()):
            return []
        return list(islice(cursor.iternext(), LINKS))

    while part := in_order(environment.read(work), last, environment.folder):
        yield from part
        last = part[-1]


def link_of(key: VariantKey) -> bytes:
    """Returns the 40 bytes that stand for a key in the list of its source: big-endian, so LMDB sorts them by index."""
    return key.index.to_bytes(8, "big") + key.fingerprint + key.parameters


def link_key(source_id: bytes, link: bytes) -> VariantKey:
    """Returns the key that a link of a source stands for."""
    return VariantKey(source_id, link[8:24], link[24:40], int.from_bytes(link[:8], "big"))


def distinct_links(writers: list[Writer]) -> Iterator[tuple[bytes, bytes]]:
    """Yields source id and link of every variant of a store once, by source and index."""
    everything = heapq.merge(*(links(writer.environment) for writer in writers if writer.environment is not None))
    return (pair for pair, _ in groupby(everything))


# --- counting ---


@dataclass
class WriterStatistics:
    """One writer's part."""

    records: int = 0  # how many it holds
    file_bytes: int = 0  # to which its file has grown
    damage: str | None = None  # why it cannot be read, or what is gone of it, or None


@dataclass
class StoreStatistics:
    """What a store holds."""

    manifest: StoreManifest  # of the store
    records: int = 0  # records and record_bytes: what all writers hold together, with headers
    record_bytes: int = 0
    # number of distinct variants -> number of sources that have so many
    per_source: Counter[int] = field(default_factory=Counter)
    # fingerprint in hexadecimal -> distinct variants; what two writers stored counts once
    per_generator: Counter[str] = field(default_factory=Counter)
    # (encoding, [C, h, w]) -> records and their bytes
    formats: dict[tuple[str, Shape], tuple[int, int]] = field(default_factory=dict)
    writers: dict[str, WriterStatistics] = field(default_factory=dict)  # by name

    @property
    def variants(self) -> int:
        """The number of distinct variants."""
        return self.per_generator.total()

    @property
    def sources(self) -> int:
        """The number of sources that have a variant."""
        return self.per_source.total()

    @property
    def file_bytes(self) -> int:
        """The size to which the files of all writers have grown."""
        return sum(writer.file_bytes for writer in self.writers.values())


def statistics(folder: Path, progress: Progress | None = None) -> StoreStatistics:
    """Reads the headers of all records and the lists of all sources; images and checksums are left to `verify`.

    Nothing is changed. Raises StoreError if the folder is not a store, or it is damaged.
    """
    found, progress = StoreStatistics(read_manifest(folder)), progress or Progress()
    with open_writers(folder) as writers:
        opened = [(writer.name, writer.environment) for writer in writers if writer.environment is not None]
        found.writers = {writer.name: WriterStatistics(damage=writer.damage) for writer in writers}
        for name, environment in opened:
            found.writers[name].records = environment.count()
            found.writers[name].file_bytes = environment.used_bytes()
        progress.start(sum(one.records for one in found.writers.values()))
        for _, environment in opened:
            for digest, head, size in heads(environment):
                format_ = _format(head) if digest_of(head) == digest else DAMAGED
                records, total = found.formats.get(format_, (0, 0))
                found.formats[format_] = (records + 1, total + size)
                progress.advance(1)
        found.records = sum(records for records, _ in found.formats.values())
        found.record_bytes = sum(total for _, total in found.formats.values())
        for _, group in groupby(distinct_links(writers), key=itemgetter(0)):
            variants = Counter(link_key(*pair).fingerprint.hex() for pair in group)
            found.per_generator += variants
            found.per_source[variants.total()] += 1
    return found


def _format(head: bytes) -> tuple[str, Shape]:
    """Returns encoding and shape as an unchecked header says them."""
    if head[:4] != MAGIC or len(head) < 8 + SHAPE.size:
        return DAMAGED
    encoding, channels, _, height, width = SHAPE.unpack_from(head, 8)
    return ENCODINGS[encoding] if encoding < len(ENCODINGS) else "damaged", (channels, height, width)
