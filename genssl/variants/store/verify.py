"""Checks all that a store holds: records, their names, and the lists of their sources.

Every writer's environment is read by a process of its own, for which this module is run: LMDB trusts its trees, and one
that is damaged badly enough kills the process that reads it. Every line that it prints is a JSON object: {"total": n}
says how many records there are, {"records": n} and {"links": n} count what was checked since the last, {"damage": text}
says what is wrong, {"uncounted": true} that it is not known how many records were committed, {"finished": true} stands
at the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb

from genssl.base.wording import counted
from genssl.variants.store.environment import Environment
from genssl.variants.store.manifest import StoreManifest, read_manifest
from genssl.variants.store.record import CHECKED_FROM, ENCODINGS, HEADER, RAW, SHAPE, is_intact, read_head
from genssl.variants.store.scan import LINKS, Progress, link_key, link_of, links, open_writers, records
from genssl.variants.store.writers import WRITERS, read_committed, writer_names

BATCH = 64


@dataclass
class Verification:
    """What a check found."""

    writers: int = 0  # writers, records, links: how many were looked at
    records: int = 0
    links: int = 0
    # how many writers have no count of what was committed there, so that lost commits would not be seen
    uncounted: int = 0
    damage: list[str] = field(default_factory=list)  # one line for everything that is wrong, the writer's name first


def verify(folder: Path, progress: Progress | None = None) -> Verification:
    """Reads a whole store and checks checksums, keys against digests, lists of sources, and the number of records.

    Nothing is changed. `progress` is told the number of records of the writers begun so far.
    """
    read_manifest(folder)
    found, total, progress = Verification(), 0, progress or Progress()
    for name in writer_names(folder):
        found.writers += 1
        for said in _checked(folder, name):
            if "total" in said:
                total += int(said["total"])
                progress.start(total)
            found.records += int(said.get("records", 0))
            found.links += int(said.get("links", 0))
            found.uncounted += int(said.get("uncounted", False))
            progress.advance(int(said.get("records", 0)))
            if "damage" in said:
                found.damage.append(f"{name}: {said['damage']}")
    return found


def _checked(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yields what the process that checks one writer says."""
    command = [sys.executable, "-m", __name__, str(folder.absolute()), name]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    finished = False
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        try:
            assert child.stdout is not None, "it is a pipe"
            for line in child.stdout:
                said = json.loads(line)
                finished = finished or "finished" in said
                yield said
        except BaseException:
            child.kill()
            raise
    if child.returncode < 0:
        died = f"its tree is so damaged that LMDB died of reading it (signal {-child.returncode})"
        yield {"damage": f"{died}; move its folder away, what it held is made again"}
    elif not finished:
        raise RuntimeError(f"the check of {folder / name} ended with exit code {child.returncode}")


# --- in the process of one writer ---


def check_writer(folder: Path, name: str) -> None:
    """Checks what one writer wrote, and prints what is wrong.

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
        for (digest, source_id, _), present in zip(linked, _in_lists(environment, pairs), strict=True):
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


def _in_lists(environment: Environment, pairs: list[tuple[bytes, bytes]]) -> list[bool]:
    """Says of every source id and link whether the link is in the list of the source."""

    def work(txn: Any) -> list[bool]:
        cursor = txn.cursor(db=environment.sources)
        return [cursor.set_key_dup(*pair) for pair in pairs]

    return environment.read(work)


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


def _say(**what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    check_writer(Path(sys.argv[1]), sys.argv[2])
