"""A store's variants as files that everyone reads: WebDataset shards, or a folder of PNGs.

    webdataset   variants-000000.tar, ...: <source id>_<index>.png and <source id>_<index>.json
    folder       <source id>_<index>.png and <source id>_<index>.json

Both hold beside them `export.json`, the generator with its licence, the parameters, and what there is, and
`variants.csv`, a row for each image that says what its .json says. The order is that of the source ids, then of the
indices; equal variants are exported as equal bytes. `store_restore` makes a store of it again.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from genssl.base.files import finished_at_once, write_synced
from genssl.base.wording import counted
from genssl.variants.key import VariantKey
from genssl.variants.store.facts import contents_of, known_parameters
from genssl.variants.store.manifest import StoredGenerator, StoreError, StoreManifest, read_manifest
from genssl.variants.store.record import PNG_MODES, decode_image, digest_of, is_intact, png_of, read_head
from genssl.variants.store.scan import Progress, Writer, distinct_links, link_key, open_writers
from genssl.variants.store.sources import Sources
from genssl.variants.store.table import (
    DESCRIPTION,
    FORMAT,
    VERSION,
    Description,
    Shard,
    TableWriter,
    about,
    open_table,
)

Format = Literal["webdataset", "folder"]
SHARD_BYTES = 2**28
BATCH = 64
BLOCK = tarfile.BLOCKSIZE
Files = Iterator[tuple[VariantKey, bytes, dict[str, Any]]]  # key, PNG and metadata


@dataclass
class Exported:
    """What an export wrote.

    Attributes:
        variants: how many.
        shards: how many; 0 for a folder.
        bytes: of its files.
        damaged: records that were left out.
        unknown: sources that the data set lacks, so that path and label of their variants are empty; None if there was
            no data set to look in.
        parameters: whether the values of the parameters are known.
        lacking: one line for every writer whose records cannot be read or are gone in part.
    """

    variants: int = 0
    shards: int = 0
    bytes: int = 0
    damaged: int = 0
    unknown: int | None = None
    parameters: bool = False
    lacking: list[str] = field(default_factory=list)


def export(
    folder: Path,
    out: Path,
    format_: Format,
    *,
    generator: str | None = None,
    sources: Sources | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done: None,
    started: Callable[[int], None] = lambda total: None,
) -> Exported:
    """Writes the variants of one generator with one set of parameters; `out` appears when all of it is there.

    Args:
        folder: of the store; nothing in it is changed.
        out: absent or an empty folder.
        format_: "webdataset" or "folder".
        generator: "FINGERPRINT" or "FINGERPRINT/PARAMETERS" in hexadecimal, or the beginning of it; needed if the store
            holds several, since the names of the files do not tell them apart.
        sources: where path and label of a source are looked up; None leaves them empty.
        shard_bytes: no shard is larger, except for one that holds a single larger image.
        progress: called with the number of variants written since its last call.
        started: called once with the number of variants.

    Raises:
        StoreError: if the folder is no store or holds no variants, if it is not clear what to export, if `out` holds
            something, or if the disk is full.
    """
    manifest = read_manifest(folder)
    with open_writers(folder) as writers:
        kind, count = _chosen(folder, manifest, writers, generator)
        started(count)
        values = known_parameters(manifest, kind[1])
        with finished_at_once(out, "exporting") as place:
            done = Exported(lacking=[f"{writer.name}: {writer.damage}" for writer in writers if writer.damage])
            done.parameters = values is not None
            if sources is not None:
                done.unknown = sources.look_for(
                    source_id for source_id, link in distinct_links(writers) if (link[8:24], link[24:40]) == kind
                )
            files = _files(folder, writers, kind, sources, values, done, progress)
            with open_table(place, "w") as text:
                table = TableWriter(text, sorted(values or {}))
                shards = _write_tars(files, place, shard_bytes, table, done) if format_ == "webdataset" else None
                if shards is None:
                    _write_folder(files, place, table, done)
                text.flush()
                os.fsync(text.fileno())
                done.bytes += text.tell()
            fingerprint = kind[0].hex()
            described = Description(
                format=f"{FORMAT}-{format_}/{VERSION}",
                fingerprint=fingerprint,
                parameters=kind[1].hex(),
                parameter_values=values,
                generator=manifest.generators.get(fingerprint, StoredGenerator()),
                pinned=manifest.pinned == fingerprint,
                manifest=contents_of(manifest, fingerprint),
                variants=done.variants,
                shards=shards,
            ).model_dump(mode="json")
            write_synced(place / DESCRIPTION, (json.dumps(described, indent=2, sort_keys=True) + "\n").encode())
    return done


def _chosen(
    folder: Path, manifest: StoreManifest, writers: list[Writer], generator: str | None
) -> tuple[tuple[bytes, bytes], int]:
    """Returns fingerprint and parameters of what is exported, and the number of variants."""
    kinds: Counter[tuple[bytes, bytes]] = Counter((link[8:24], link[24:40]) for _, link in distinct_links(writers))
    if not kinds and (lacking := [f"{writer.name}: {writer.damage}" for writer in writers if writer.damage]):
        raise StoreError(f"{folder} is damaged, and nothing of it is left to export: {'; '.join(lacking)}")
    if not kinds:
        raise StoreError(f"{folder} holds no variants; write some with genssl pregenerate")
    names = {f"{fingerprint.hex()}/{parameters.hex()}": (fingerprint, parameters) for fingerprint, parameters in kinds}
    chosen = sorted(name for name in names if name.startswith((generator or "").lower()))
    if len(chosen) != 1:
        there = "; ".join(
            f"{name} ({manifest.describe(name[:32])}, {counted(kinds[names[name]], 'variant')})"
            for name in sorted(names)
        )
        if generator and not chosen:
            raise StoreError(f"{folder} holds nothing of --generator {generator}; it holds {there}")
        raise StoreError(
            f"{folder} holds variants of several generators or parameters, whose files would have equal names; choose "
            f"one with --generator and the beginning of its name: {there}"
        )
    return names[chosen[0]], kinds[names[chosen[0]]]


def _files(
    folder: Path,
    writers: list[Writer],
    kind: tuple[bytes, bytes],
    sources: Sources | None,
    values: dict[str, int | float] | None,
    done: Exported,
    progress: Progress,
) -> Files:
    """Yields key, PNG and metadata of every variant, in order."""
    wanted = (
        key
        for key in (link_key(*pair) for pair in distinct_links(writers))
        if (key.fingerprint, key.parameters) == kind
    )
    while batch := list(islice(wanted, BATCH)):
        found: list[bytes | None] = [None] * len(batch)
        for writer in writers:
            if writer.environment is None:
                continue
            missing = [position for position, record in enumerate(found) if record is None]
            digests = [batch[position].digest() for position in missing]
            for position, digest, record in zip(missing, digests, writer.environment.get_many(digests), strict=True):
                if record is not None and digest_of(record) == digest and is_intact(record):
                    found[position] = record
        for key, record in zip(batch, found, strict=True):
            if record is None:
                done.damaged += 1
                continue
            channels = read_head(record).shape[0]
            if channels not in PNG_MODES:
                raise StoreError(
                    f"{folder}: variant {key.index} of the source {key.source_id.hex()} has {channels} channels; PNG "
                    "holds 1 or 3, so this store cannot be exported"
                )
            image = decode_image(record, checked=True)
            if image is None:  # the checksum is right, and yet the PNG is none
                done.damaged += 1
                continue
            source = sources.of(key.source_id) if sources is not None else None
            yield key, png_of(record), about(key, image, source, values)
            done.variants += 1
        progress(len(batch))


def _write_folder(files: Files, place: Path, table: TableWriter, done: Exported) -> None:
    for key, png, told in files:
        text = json.dumps(told, sort_keys=True).encode()
        (place / f"{_stem(key)}.png").write_bytes(png)
        (place / f"{_stem(key)}.json").write_bytes(text)
        table.write(f"{_stem(key)}.png", "", told)
        done.bytes += len(png) + len(text)


def _write_tars(files: Files, place: Path, shard_bytes: int, table: TableWriter, done: Exported) -> list[Shard]:
    """Returns name, variants and bytes of every shard."""
    shards: list[Shard] = []
    file: BinaryIO | None = None
    variants = 0

    def finish() -> None:
        if file is None:
            return
        file.write(bytes(2 * BLOCK))  # the end of a tar
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
        file.close()
        shards.append(Shard(name=Path(file.name).name, variants=variants, bytes=size))
        done.bytes += size

    try:
        for key, png, told in files:
            members = _member(f"{_stem(key)}.png", png) + _member(
                f"{_stem(key)}.json", json.dumps(told, sort_keys=True).encode()
            )
            if file is None or (variants and file.tell() + len(members) + 2 * BLOCK > shard_bytes):
                finish()
                file, variants = (place / f"variants-{len(shards):06d}.tar").open("wb"), 0
            file.write(members)
            table.write(f"{_stem(key)}.png", Path(file.name).name, told)
            variants += 1
        finish()
    finally:
        if file is not None:
            file.close()
    done.shards = len(shards)
    return shards


def _member(name: str, content: bytes) -> bytes:
    """Returns a file as it stands in a tar: nothing of this machine, user or time is in it."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK)


def _stem(key: VariantKey) -> str:
    return f"{key.source_id.hex()}_{key.index}"
