"""Checks one writer's environment, in the process that `store_verify` starts: LMDB can die of a damaged tree.

Every line of standard output is a JSON object: {"total": n} says how many records there are, {"records": n} and
{"links": n} count what was checked since the last, {"damage": text} says what is wrong, {"uncounted": true} that it is
not known how many records were committed, {"finished": true} stands at the end.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb

from genssl.base.wording import counted
from genssl.variants.store.committed import read_committed
from genssl.variants.store.environment import Environment
from genssl.variants.store.manifest import StoreManifest, read_manifest
from genssl.variants.store.record import CHECKED_FROM, ENCODINGS, HEADER, RAW, SHAPE, is_intact, read_head
from genssl.variants.store.scan import LINKS, link_key, link_of, links, open_writers, records
from genssl.variants.store.writers import WRITERS

BATCH = 64


def check(folder: Path, name: str) -> None:
    """Checks what one writer wrote: checksums, keys against digests, lists of sources against records and back.

    The number of records is checked against the number that was committed, where that is known.
    """
    manifest = read_manifest(folder)
    if read_committed(folder / WRITERS / name) is None:
        _say(uncounted=True)
    with open_writers(folder, only=name) as writers:
        for writer in writers:
            if writer.damage is not None:
                _say(damage=writer.damage)
            if writer.environment is None:
                continue
            try:
                total = writer.environment.count()
                _say(total=total)
                if (found := _check_records(writer.environment, manifest)) < total:
                    _say(damage=f"its tree is damaged: of {total:,} records {found:,} are found in it")
                _check_links(writer.environment)
            except lmdb.Error as error:
                _say(damage=f"its tree is damaged, so that the rest cannot be read: {error}")
    _say(finished=True)


def _check_records(environment: Environment, manifest: StoreManifest) -> int:
    """Returns how many there are."""
    everything, found = records(environment), 0
    while part := list(islice(everything, BATCH)):
        linked: list[tuple[bytes, bytes, bytes]] = []  # digest, source id, link
        for digest, record in part:
            if (wrong := _wrong(digest, record, manifest)) is not None:
                _say(damage=f"record {digest.hex()}: {wrong}")
            else:
                key = read_head(record).key
                linked.append((digest, key.source_id, link_of(key)))
        pairs = [(source_id, link) for _, source_id, link in linked]
        for (digest, source_id, _), present in zip(linked, _linked(environment, pairs), strict=True):
            if not present:
                _say(damage=f"record {digest.hex()}: it is not in the list of its source {source_id.hex()}")
        _say(records=len(part))
        found += len(part)
    return found


def _wrong(digest: bytes, record: bytes, manifest: StoreManifest) -> str | None:
    """Says what is wrong with a record, or returns None."""
    if not is_intact(record):
        return "its checksum is wrong"
    encoding, channels, _, height, width = SHAPE.unpack_from(record, CHECKED_FROM)
    if encoding >= len(ENCODINGS):
        return f"its encoding {encoding} is unknown to this genssl"
    if encoding == RAW and len(record) != HEADER.size + channels * height * width:
        return "its size is not that of its image"
    key = read_head(record).key
    if key.digest() != digest:
        return f"it is another variant, {key.digest().hex()}"
    if manifest.pinned not in (None, key.fingerprint.hex()):
        return f"it is of the generator {key.fingerprint.hex()}, to which the store is not pinned"
    return None


def _check_links(environment: Environment) -> None:
    pairs = links(environment)
    while part := list(islice(pairs, LINKS)):
        whole = [pair for pair in part if (len(pair[0]), len(pair[1])) == (16, 40)]
        digests = [link_key(*pair).digest() for pair in whole]
        for (source_id, link), present in zip(whole, environment.present(digests), strict=True):
            if not present:
                index = int.from_bytes(link[:8], "big")
                _say(damage=f"source {source_id.hex()}: variant {index} is in its list, but has no record")
        if len(whole) < len(part):
            _say(damage=f"lists of sources: {counted(len(part) - len(whole), 'entry is', 'entries are')} malformed")
        _say(links=len(part))


def _linked(environment: Environment, pairs: list[tuple[bytes, bytes]]) -> list[bool]:
    def work(txn: Any) -> list[bool]:
        cursor = txn.cursor(db=environment.sources)
        return [cursor.set_key_dup(*pair) for pair in pairs]

    return environment.read(work)


def _say(**what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    check(Path(sys.argv[1]), sys.argv[2])
