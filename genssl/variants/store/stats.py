"""Counts what a store holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from genssl.variants.store.manifest import StoreManifest, read_manifest
from genssl.variants.store.record import ENCODINGS, MAGIC, SHAPE, digest_of
from genssl.variants.store.scan import Progress, Writer, distinct_links, heads, link_key, open_writers

Shape = tuple[int, int, int]
DAMAGED: tuple[str, Shape] = ("damaged", (0, 0, 0))


@dataclass
class WriterStatistics:
    """One writer's part.

    Attributes:
        records: how many it holds.
        file_bytes: to which its file has grown.
        damage: why it cannot be read, or what is gone of it, or None.
    """

    records: int = 0
    file_bytes: int = 0
    damage: str | None = None


@dataclass
class StoreStatistics:
    """What a store holds.

    Attributes:
        manifest: of the store.
        variants: distinct ones; what two writers stored counts once.
        records, record_bytes: what all writers hold together, with headers.
        per_source: number of variants -> number of sources that have so many.
        per_generator: fingerprint in hexadecimal -> distinct variants.
        formats: (encoding, [C, h, w]) -> records and their bytes.
        writers: by name.
    """

    manifest: StoreManifest
    variants: int = 0
    records: int = 0
    record_bytes: int = 0
    per_source: Counter[int] = field(default_factory=Counter)
    per_generator: Counter[str] = field(default_factory=Counter)
    formats: dict[tuple[str, Shape], tuple[int, int]] = field(default_factory=dict)
    writers: dict[str, WriterStatistics] = field(default_factory=dict)

    @property
    def sources(self) -> int:
        """The number of sources that have a variant."""
        return self.per_source.total()

    @property
    def file_bytes(self) -> int:
        """The size to which the files of all writers have grown."""
        return sum(writer.file_bytes for writer in self.writers.values())


def statistics(
    folder: Path,
    progress: Progress = lambda done: None,
    started: Callable[[int], None] = lambda total: None,
) -> StoreStatistics:
    """Reads the headers of all records and the lists of all sources; images and checksums are left to `verify`.

    Args:
        folder: of the store; nothing in it is changed.
        progress: called with the number of records counted since its last call.
        started: called once with the number of records that there are.

    Raises:
        StoreError: if the folder is no store, or it is damaged.
    """
    found = StoreStatistics(read_manifest(folder))
    with open_writers(folder) as writers:
        for writer in writers:
            found.writers[writer.name] = WriterStatistics(damage=writer.damage)
            if writer.environment is not None:
                found.writers[writer.name].records = writer.environment.count()
                found.writers[writer.name].file_bytes = writer.environment.used_bytes()
        started(sum(one.records for one in found.writers.values()))
        _count_records(writers, found, progress)
        for _, group in groupby(distinct_links(writers), key=itemgetter(0)):
            variants = 0
            for source_id, link in group:
                variants += 1
                found.per_generator[link_key(source_id, link).fingerprint.hex()] += 1
            found.per_source[variants] += 1
            found.variants += variants
    return found


def _count_records(writers: list[Writer], found: StoreStatistics, progress: Progress) -> None:
    for writer in writers:
        if writer.environment is None:
            continue
        for digest, head, size in heads(writer.environment):
            found.records += 1
            found.record_bytes += size
            format_ = _format(head) if digest_of(head) == digest else DAMAGED
            records, total = found.formats.get(format_, (0, 0))
            found.formats[format_] = (records + 1, total + size)
            progress(1)


def _format(head: bytes) -> tuple[str, Shape]:
    """Returns encoding and shape as an unchecked header says them."""
    if head[:4] != MAGIC or len(head) < 8 + SHAPE.size:
        return DAMAGED
    encoding, channels, _, height, width = SHAPE.unpack_from(head, 8)
    return ENCODINGS[encoding] if encoding < len(ENCODINGS) else "damaged", (channels, height, width)
