"""The union of several stores as one store with one environment, which is the same bytes whatever their order."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import lmdb

from genssl.base.files import empty, finished_at_once, write_atomically
from genssl.variants.store.environment import Entry, Environment
from genssl.variants.store.manifest import (
    StoredGenerator,
    StoreError,
    StoreManifest,
    read_manifest,
    write_manifest,
)
from genssl.variants.store.record import digest_of, is_intact, read_head
from genssl.variants.store.scan import Progress, link_of, open_writers, records
from genssl.variants.store.writers import WRITERS

MERGED = "merged-000"
INPUTS = "merge.json"  # of an unfinished merge: what it merges
BATCH = 32  # records of a transaction


@dataclass
class Merged:
    """What a merge did."""

    variants: int = 0  # distinct ones in the result, those of an earlier, interrupted call included
    resumed: int = 0  # how many of them an earlier call had merged
    # one line for what could not be read, and is missing where no other store has it
    damaged: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)  # key paths of the manifests on which the stores do not agree


def merge(
    out: Path,
    folders: Sequence[Path],
    progress: Progress | None = None,
) -> Merged:
    """Makes a store of all variants of several stores; of copies of a variant, the oldest is taken.

    Records are written by digest, a fixed number in a transaction, into a folder beside `out` that gets its name at the
    end, so the order of the stores makes no difference to a byte. After kill -9 the next call with the same stores goes
    on behind the last whole transaction, to the same records (what LMDB leaves in free pages may differ); with other
    stores, or if they have been written since, it begins again.

    Args:
        out: absent or an empty folder.
        folders: of the stores; nothing in them is changed.
        progress: is told the number of records, copies included.
    """
    done, progress = Merged(), progress or Progress()
    folders = sorted({folder.resolve() for folder in folders})
    manifest = _united([read_manifest(folder) for folder in folders], folders, done)
    with finished_at_once(out, "merging", keep=True) as place, ExitStack() as stack:
        opened: list[tuple[Path, str, Environment]] = []
        for folder in folders:
            for writer in stack.enter_context(open_writers(folder)):
                if writer.damage:
                    done.damaged.append(f"{folder / writer.name}: {writer.damage}")
                if writer.environment is not None:
                    opened.append((folder, writer.name, writer.environment))
        inputs = json.dumps([[str(folder), name, e.count(), e.used_bytes()] for folder, name, e in opened]).encode()
        if not (place / INPUTS).exists() or (place / INPUTS).read_bytes() != inputs:
            empty(place)
            write_atomically(place / INPUTS, lambda partial: partial.write_bytes(inputs), synced=True)
        progress.start(sum(environment.count() for _, _, environment in opened))
        used = sum(environment.used_bytes() for _, _, environment in opened)
        merged = place / WRITERS / MERGED
        merged.mkdir(parents=True, exist_ok=True)
        # Twice what is merged, a power of two: the map's size stands in the file, and must not depend on the way there.
        map_bytes = 1 << (2 * used + 2**20).bit_length()
        target = None
        try:
            target = Environment.open(merged, writable=True, map_bytes=map_bytes)
            assert target is not None, "nobody else has the folder of an unfinished merge open: it is locked"
            _copy(target, [(f"{folder.name}/{name}", e) for folder, name, e in opened], done, progress)
        except lmdb.Error as error:
            raise StoreError(
                f"{out} cannot be written ({error}); make room and start again, which goes on with what {place} holds, "
                "or remove that to begin anew"
            ) from None
        finally:
            if target is not None:
                target.release()
        write_manifest(place, manifest)
        (place / INPUTS).unlink()
    return done


def _copy(target: Environment, sources: list[tuple[str, Environment]], done: Merged, progress: Progress) -> None:

    def last(txn: Any) -> bytes:
        cursor = txn.cursor(db=target.variants)
        return cursor.key() if cursor.last() else b""

    after = target.read(last)
    done.variants = done.resumed = target.count()
    progress.advance(done.resumed)

    def of(name: str, environment: Environment) -> Iterator[tuple[bytes, bytes, str]]:
        try:
            for digest, record in records(environment, after):
                yield digest, record, name
        except lmdb.Error as error:
            done.damaged.append(f"{name}: its tree is damaged: {error}")

    def entries() -> Iterator[Entry]:
        everything = heapq.merge(*(of(name, environment) for name, environment in sources), key=itemgetter(0))
        for digest, copies in groupby(everything, key=itemgetter(0)):
            intact = []
            for _, record, name in copies:
                progress.advance(1)
                if digest_of(record) == digest and is_intact(record):
                    intact.append(record)
                else:
                    done.damaged.append(f"{name}: record {digest.hex()} is damaged")
            if intact:
                record = min(intact, key=lambda one: (read_head(one).created, one))
                key = read_head(record).key
                yield Entry(digest, record, key.source_id, link_of(key))

    missing = entries()
    while batch := list(islice(missing, BATCH)):
        done.variants += target.put_many(batch)


def _united(manifests: list[StoreManifest], folders: list[Path], done: Merged) -> StoreManifest:
    """Returns the manifest of the union; `done.dropped` gets what the stores disagree on."""
    generators: dict[str, StoredGenerator] = {}
    for manifest in manifests:
        for fingerprint, described in manifest.generators.items():
            # Of two descriptions the fuller one, whatever the order of the stores.
            generators[fingerprint] = max(
                described,
                generators.get(fingerprint, StoredGenerator()),
                key=lambda one: (sum(map(bool, one.model_dump().values())), one.model_dump_json()),
            )
    united = StoreManifest(
        created_by=min(manifest.created_by for manifest in manifests),
        created=min(manifest.created for manifest in manifests),
        generators=dict(sorted(generators.items())),
    )
    _check_unmixed(united, manifests, folders)
    pinned = {manifest.pinned for manifest in manifests if manifest.pinned}
    extra = _joined_mappings([manifest.model_extra or {} for manifest in manifests], "", done.dropped)
    return united.model_copy(update={"pinned": pinned.pop() if pinned else None, **extra})


def _joined_mappings(mappings: list[dict[str, Any]], where: str, dropped: list[str]) -> dict[str, Any]:
    """Returns what several manifests say together, whatever their order: lists united, of two numbers the larger.

    `dropped` gets the key paths on which they disagree, which are left out.
    """
    joined: dict[str, Any] = {}
    for name in sorted({name for mapping in mappings for name in mapping}):
        values = [mapping[name] for mapping in mappings if name in mapping]
        if all(value == values[0] for value in values):
            joined[name] = values[0]
        elif all(isinstance(value, dict) for value in values):
            joined[name] = _joined_mappings(values, f"{where}{name}.", dropped)
        elif all(isinstance(value, list) for value in values):
            entries = {json.dumps(entry, sort_keys=True): entry for value in values for entry in value}
            joined[name] = [entries[text] for text in sorted(entries)]
        elif all(isinstance(value, int | float) for value in values):
            joined[name] = max(values)
        else:
            dropped.append(f"{where}{name}")
    return joined


def _check_unmixed(united: StoreManifest, manifests: list[StoreManifest], folders: list[Path]) -> None:
    pairs = list(zip(folders, manifests, strict=True))
    for folder, pinned in ((folder, manifest.pinned) for folder, manifest in pairs if manifest.pinned is not None):
        for other, manifest in pairs:
            strange = [one for one in [manifest.pinned, *manifest.generators] if one not in (None, pinned)]
            if strange:
                raise StoreError(
                    f"{folder} is pinned to the generator {united.describe(pinned)}, but {other} holds variants of the "
                    f"generator {united.describe(str(strange[0]))}: variants of different generators must not be mixed "
                    "here; merge stores of one generator"
                )
