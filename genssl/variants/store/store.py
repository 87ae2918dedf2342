"""The variant store: a folder of LMDB environments, one per writing process, and a manifest.

    store.json                     format, generators by fingerprint, the pinned one if any
    writers/<host>-<n>/data.mdb    "variants": digest of the key -> record; "sources": source id -> links, by index
    writers/<host>-<n>/writer.lock held by the process that writes there

Variants are pure functions of their keys, so two writers that store the same one do no harm, and whatever cannot be
read is treated as absent and made again.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate
from pathlib import Path

import lmdb

from genssl.base.wording import counted
from genssl.data.base import UInt8Array
from genssl.errors import fork_message
from genssl.variants.key import VariantKey
from genssl.variants.store.environment import DAMAGED, MAP_BYTES, MISLED, Entry, Environment, take_writer
from genssl.variants.store.manifest import (
    StoredGenerator,
    StoreError,
    StoreManifest,
    create_store,
    pinned_to,
    read_manifest,
    update_manifest,
)
from genssl.variants.store.record import IDENTITY, Encoding, decode_image, digest_of, encode
from genssl.variants.store.scan import heads, link_of
from genssl.variants.store.writers import DATA, WRITERS, StorePlace, StoreState, network_filesystem, writer_names

log = logging.getLogger(__name__)

Digest = bytes  # the class has a property of the name `bytes`
UNKNOWN = StoredGenerator()
REFRESH_SECONDS = 1.0  # how often a miss looks for new writers
RETRY_SECONDS = 30.0  # how long a store that failed to write is left alone
PAGE = 4096
TREE_PAGES_EACH, TREE_PAGES = 3, 16  # an upper bound of tree pages that a record and a commit add


class VariantStore:
    """Variants by digest, on disk. Any number of processes may read and write one store at once; thread-safe.

    Reading and writing never raise for what a disk does: what cannot be read is absent, what cannot be written is not
    stored; both are counted and logged. Not usable across fork.

    Every read finds out whether a record is the one that was asked for. Its checksum is computed when this process
    reads it for the first time, which takes twice as long as the rest of a read; `verify` computes it always.

    Args:
        folder: of the store; made if it is absent or empty, unless `readonly`.
        readonly: takes no writer's environment and changes nothing.
        max_bytes: all environments together grow to at most this size, then nothing more is stored; None: no bound.
        encoding: of the images written; any encoding is read.
        fingerprint: of the generator in use, 16 bytes.
        pin: binds the store to `fingerprint`; later openings with another one are refused.
        map_bytes: address space first taken for the environment that is written; doubled whenever it is full.

    Raises StoreError if the folder is not a store, has a newer format, is another generator's, or cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        readonly: bool = False,
        max_bytes: int | None = None,
        encoding: Encoding = "raw",
        fingerprint: Digest | None = None,
        pin: bool = False,
        map_bytes: int = MAP_BYTES,
    ) -> None:
        assert fingerprint is not None or not pin, "a store is pinned to a fingerprint"
        folder = folder.expanduser()
        self.folder, self.max_bytes, self.encoding = folder, max_bytes, encoding
        self.damaged = 0  # records and environments found damaged so far, each treated as absent
        self.full = False  # something was refused because of `max_bytes`
        self.writer: str | None = None  # name of the environment that is written
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._environments: tuple[Environment, ...] = ()  # the written one first; replaced, never changed
        self._names: set[str] = set()
        self._own: Environment | None = None
        self._writer_locks: list[int] = []
        self._map_bytes = map_bytes
        self._place: StorePlace | None = None
        self._refreshed, self._retry_at, self._closed = 0.0, 0.0, False
        if not readonly:
            create_store(folder)
        self.manifest = read_manifest(folder)
        if fingerprint is not None:
            self._check_pinned(fingerprint)
        if pin and fingerprint is not None:
            pinned = partial(pinned_to, fingerprint=fingerprint.hex(), folder=folder)
            self.manifest = pinned(self.manifest) if readonly else update_manifest(folder, pinned)
        if (kind := network_filesystem(folder)) is not None:
            log.warning("%s lies on %s: LMDB is safe there only while one machine at a time uses it", folder, kind)
        try:
            if not readonly:
                self._take_writer()
            self.refresh()
        except BaseException:
            self.close()
            raise

    def get(self, digest: Digest) -> UInt8Array | None:
        """Returns the image uint8 [C, h, w], read-only, or None if it is not there intact."""
        return self.get_many([digest])[0]

    def get_many(self, digests: Sequence[Digest]) -> list[UInt8Array | None]:
        """Returns the images uint8 [C, h, w], read-only, in the order of the digests; None for those not there."""
        self._check_process()
        found: list[UInt8Array | None] = [None] * len(digests)
        self._look(digests, found, self._environments)
        if any(image is None for image in found) and time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._look(digests, found, self.refresh())
        return found

    def digests(self) -> Iterator[Digest]:
        """Yields every digest, ascending within a writer's environment; one that two writers stored comes twice."""
        self._check_process()
        for environment in self._environments:
            last = b""
            try:
                for last, _, _ in heads(environment, 0):
                    yield last
            except lmdb.Error as error:
                behind = last.hex() or "its start"
                self._count_damage(f"{environment.folder}: {error}; what it holds behind {behind} is")

    def put_many(self, items: Sequence[tuple[VariantKey, UInt8Array]], *, strict: bool = False) -> int:
        """Stores images uint8 [C, h, w] in one transaction; on return they survive kill -9 and power loss.

        Returns how many were written: not those that this writer has already, not those beyond `max_bytes`, and none if
        the disk refuses, which is logged once and tried again after a while, or while the folder is gone. With `strict`
        such a refusal is a StoreError: a server goes on without its store, who writes a store for its own sake does
        not. That the store is pinned to another generator always is one. What was stored before stays readable.
        """
        self._check_process()
        assert self._own is not None, "a store opened with readonly=True is not written"
        assert self._place is not None
        fingerprints = {key.fingerprint for key, _ in items}
        for fingerprint in fingerprints:
            self._check_pinned(fingerprint)
        if not self._place.look(strict=strict) or (not strict and time.monotonic() < self._retry_at):
            return 0
        entries = [
            Entry(key.digest(), encode(key, image, self.encoding), key.source_id, link_of(key)) for key, image in items
        ]
        try:
            for fingerprint in fingerprints:
                if fingerprint.hex() not in self.manifest.generators:
                    self.describe_generator(fingerprint)
            fitting = self._fitting(entries)
            written = self._write(fitting) if fitting else 0
        except (lmdb.Error, OSError) as error:
            if strict:
                raise StoreError(self._refused(f"({error})", entries)) from None
            if self._retry_at == 0.0:
                log.error("%s stores nothing for now: %s; variants are still served", self.folder, error)
            self._retry_at = time.monotonic() + RETRY_SECONDS
            return 0
        self._retry_at = 0.0
        if strict and len(fitting) < len(entries):
            raise StoreError(self._refused(f"its max_bytes is {self.max_bytes:,}", entries[len(fitting) :]))
        return written if self._place.look(strict=strict) else 0

    def look(self) -> bool:
        """Says whether the store still lies where it was opened; see `StorePlace`. A new one is never made there."""
        return self._place is None or self._place.look()

    @property
    def state(self) -> StoreState:
        """What becomes of variants that are to be stored now."""
        if self._place is not None and self._place.gone:
            return "gone"
        return "full" if self.full else "failing" if self._retry_at else "writing"

    def describe_generator(self, fingerprint: Digest, described: StoredGenerator = UNKNOWN) -> None:
        """Writes what is known of a generator into store.json; raises StoreError if it is pinned to another one."""
        self._check_process()
        self._check_pinned(fingerprint)
        name = fingerprint.hex()

        def change(manifest: StoreManifest) -> StoreManifest:
            if name in manifest.generators and described == UNKNOWN:
                return manifest
            return manifest.model_copy(update={"generators": {**manifest.generators, name: described}})

        self.manifest = update_manifest(self.folder, change)

    def refresh(self) -> tuple[Environment, ...]:
        """Opens the environments of writers that have appeared since; returns them."""
        self._check_process()
        with self._lock:
            self._refreshed = time.monotonic()
            before = len(self._environments)
            for name in (name for name in writer_names(self.folder) if name not in self._names):
                try:
                    environment = Environment.open(self.folder / WRITERS / name, writable=False)
                except (lmdb.Error, OSError) as error:
                    self._names.add(name)
                    self._count_damage(f"{self.folder / WRITERS / name} cannot be read: {error}")
                    continue
                if environment is not None:
                    self._names.add(name)
                    self._environments += (environment,)
                    if environment.loss is not None:
                        self._count_damage(f"{environment.folder}: {environment.loss}; the others are")
            return self._environments[before:]

    def __len__(self) -> int:
        """The number of records; a variant that two writers stored counts twice."""
        self._check_process()
        return sum(environment.count() for environment in self._environments)

    @property
    def bytes(self) -> int:
        """The size to which the files of all writers have grown."""
        self._check_process()
        return sum(environment.used_bytes() for environment in self._environments)

    def close(self) -> None:
        """Closes every environment and gives the writer's lock back; does nothing in a forked child."""
        if self._closed or os.getpid() != self._pid:
            return
        with self._lock:
            self._closed = True
            for environment in self._environments:
                environment.release()
            self._environments = ()
            for descriptor in self._writer_locks:
                os.close(descriptor)

    def __enter__(self) -> VariantStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look(self, digests: Sequence[Digest], found: list[UInt8Array | None], where: Sequence[Environment]) -> None:
        """Fills the places of `found` that are None as yet."""
        for environment in where:
            missing = [position for position, image in enumerate(found) if image is None]
            wanted = [digests[position] for position in missing]
            if not wanted:
                return
            try:
                records = environment.get_many(wanted)
            except lmdb.Error as error:
                self._count_damage(f"{environment.folder}: {error}")
                continue
            hashes = [0 if record is None else hash(record[IDENTITY]) for record in records]
            checked = environment.verified.known(wanted, hashes)
            verified: dict[Digest, int] = {}
            for position, record, known, hashed in zip(missing, records, checked, hashes, strict=True):
                if record is None:
                    continue
                named = known or digest_of(record) == digests[position]
                image = found[position] = decode_image(record, checked=known) if named else None
                if image is None:
                    wrong = "fails its checksum" if named else f"is {MISLED}"
                    self._count_damage(f"{environment.folder}: record {digests[position].hex()} {wrong}")
                elif not known:
                    verified[digests[position]] = hashed
            if verified:
                environment.verified.add(list(verified), list(verified.values()))

    def _take_writer(self) -> None:
        """Takes an environment to write; what was written before is read on."""
        self.writer, self._own, descriptor = take_writer(self.folder, self._map_bytes)
        self._writer_locks.append(descriptor)
        self._place = StorePlace(self.folder, self._own.folder / DATA)
        self._names.add(self.writer)
        self._environments = (self._own, *self._environments)

    def _write(self, entries: Sequence[Entry]) -> int:
        """Writes to the environment that was taken, or to another if its tree turns out to be damaged."""
        while True:
            own = self._own
            assert own is not None
            try:
                return own.put_many(entries)
            except DAMAGED as error:
                self._count_damage(f"{error}; another is written from now on, and what is damaged is")
                with self._lock:
                    try:
                        if own is self._own:
                            self._take_writer()
                    except StoreError as refused:
                        raise lmdb.Error(str(refused)) from None

    def _count_damage(self, what: str) -> None:
        self.damaged += 1
        if self.damaged & (self.damaged - 1) == 0:  # 1, 2, 4, 8, ...: seen, but no flood
            log.warning("%s; treated as absent (%d so far)", what, self.damaged)

    def _fitting(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Returns the first entries that surely fit under `max_bytes`."""
        if self.max_bytes is None or not entries:
            return entries
        if self.full:
            return []
        if time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self.refresh()  # other writers fill the same bound
        room = (self.max_bytes - self.bytes) // PAGE - TREE_PAGES
        pages = accumulate(-(-(len(entry.record) + 16) // PAGE) + TREE_PAGES_EACH for entry in entries)
        count = bisect_right(list(pages), room)
        # The bound is generous for small images, so a batch that fits in part leaves room that later ones use.
        self.full = count == 0
        if self.full:
            log.warning("%s has reached its max_bytes of %d; nothing more is stored", self.folder, self.max_bytes)
        return entries[:count]

    def _refused(self, why: str, entries: Sequence[Entry]) -> str:
        """Returns the message for entries that were not stored: why in words, or in brackets what the disk said."""
        room = wanted = sum(len(entry.record) for entry in entries)
        free = "its disk does not answer"
        with suppress(OSError):
            room = shutil.disk_usage(self.folder).free
            free = f"{room:,} bytes are free on its disk"
        if why.startswith("("):  # LMDB reports a write that was cut short as an input/output error
            why = f"its disk {'is full' if room < 2 * wanted else 'refused them'} {why}"
        return (
            f"{self.folder} has no room for {counted(len(entries), 'more variant')} of {wanted:,} bytes: {why}; it "
            f"has {self.bytes:,} bytes, and {free}. What it holds stays readable; make room, or move the store to a "
            "larger disk, and start again: what is stored is not made twice"
        )

    def _check_pinned(self, fingerprint: Digest) -> None:
        if self.manifest.pinned not in (None, fingerprint.hex()):
            pinned_to(self.manifest, fingerprint.hex(), self.folder)  # raises, naming both

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise StoreError(fork_message(self.folder, self._pid))
        assert not self._closed, "the store is closed"
