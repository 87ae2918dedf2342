"""Walks through all that a store holds, in ascending order and in short transactions, which keep no writer waiting."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import lmdb

from genssl.variants.key import VariantKey
from genssl.variants.store.environment import Environment, in_order
from genssl.variants.store.manifest import StoreError
from genssl.variants.store.record import HEADER
from genssl.variants.store.writers import WRITERS, writer_names

Progress = Callable[[int], None]  # called with the number of records done since the last call
HEADS, RECORDS, LINKS = 1024, 32, 4096  # of a transaction


@dataclass(frozen=True)
class Writer:
    """What one process wrote into a store.

    Attributes:
        name: of its folder.
        environment: None if it cannot be opened, or if nothing was written yet.
        damage: why it cannot be read, or what is gone of that which was committed, or None.
    """

    name: str
    environment: Environment | None
    damage: str | None = None


@contextmanager
def open_writers(folder: Path, only: str | None = None) -> Iterator[list[Writer]]:
    """Opens every environment of a store for reading, by name, or `only` one.

    Raises:
        StoreError: in place of what LMDB raises on a damaged tree while the block reads.
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


def records(environment: Environment, after: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
    """Yields digest and record of every variant, by digest, of those above `after`; raises lmdb.Error on damage."""
    for digest, record, _ in _values(environment, after, None, RECORDS):
        yield digest, record


def heads(environment: Environment) -> Iterator[tuple[bytes, bytes, int]]:
    """Yields digest, header and size in bytes of every record, by digest; raises lmdb.Error on a damaged tree."""
    return _values(environment, b"", HEADER.size, HEADS)


def links(environment: Environment) -> Iterator[tuple[bytes, bytes]]:
    """Yields source id and link of every variant, by source and index; raises lmdb.Error on a damaged tree."""
    last: tuple[bytes, bytes] | None = None

    def work(txn: Any) -> list[tuple[bytes, bytes]]:
        cursor = txn.cursor(db=environment.sources)
        if last is None:
            valid = cursor.first()
        elif cursor.set_key_dup(*last):
            valid = cursor.next()
        else:
            raise lmdb.CorruptedError(f"{environment.folder}: the link that was read last is gone")
        found: list[tuple[bytes, bytes]] = []
        while valid and len(found) < LINKS:
            found.append(cursor.item())
            valid = cursor.next()
        return found

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
    last = None
    for pair in heapq.merge(*(links(writer.environment) for writer in writers if writer.environment is not None)):
        if pair != last:
            yield pair
        last = pair


def merged_by_digest(iterators: list[Iterator[Any]]) -> Iterator[Any]:
    """Yields the tuples of all iterators by their digest, which stands first."""
    return heapq.merge(*iterators, key=itemgetter(0))


def _values(environment: Environment, after: bytes, size: int | None, limit: int) -> Iterator[tuple[bytes, bytes, int]]:
    def work(txn: Any) -> list[tuple[bytes, bytes, int]]:
        cursor = txn.cursor(db=environment.variants)
        found: list[tuple[bytes, bytes, int]] = []
        valid = cursor.set_range(after + b"\0") if after else cursor.first()
        while valid and len(found) < limit:
            digest, record = cursor.item()
            found.append((bytes(digest), bytes(record[:size]), len(record)))
            valid = cursor.next()
        return found

    while part := environment.read(work, buffers=True):
        in_order([digest for digest, _, _ in part], after, environment.folder)
        yield from part
        after = part[-1][0]
