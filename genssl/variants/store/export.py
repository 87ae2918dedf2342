"""A store's variants as files that everyone reads: WebDataset shards, or a folder of PNGs.

    webdataset   variants-000000.tar, ...: <source id>_<index>.png and <source id>_<index>.json
    folder       <source id>_<index>.png and <source id>_<index>.json

Both hold beside them `export.json`, the generator with its licence, the parameters, and what there is, and
`variants.csv`, a row for each image that says what its .json says. The order is that of the source ids, then of the
indices; equal variants are exported as equal bytes.

`import_folder` makes a store of it again.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from genssl.base.files import finished_at_once, sync
from genssl.base.wording import counted
from genssl.data.sources import Sources
from genssl.variants.store.export_table import (
    DESCRIPTION,
    FORMAT,
    TABLE,
    VERSION,
    Description,
    Shard,
    WriteRow,
    metadata_of,
    open_table,
    table_writer,
)
from genssl.variants.store.facts import contents_of, known_parameters
from genssl.variants.store.manifest import StoredGenerator, StoreError, StoreManifest, read_manifest
from genssl.variants.store.record import PNG_MODES, decode_image, digest_of, is_intact, png_of, read_head
from genssl.variants.store.scan import Progress, Writer, damage_of, distinct_links, link_key, open_writers

Format = Literal["webdataset", "folder"]
SHARD_BYTES = 2**28
BATCH = 64
BLOCK = tarfile.BLOCKSIZE
Files = Iterator[tuple[str, bytes, dict[str, Any]]]  # name without suffix, PNG and metadata


@dataclass
class Exported:
    """What an export wrote."""

    variants: int = 0  # variants, shards, bytes: how much; no shards for a folder
    shards: int = 0
    bytes: int = 0
    damaged: int = 0  # records that were left out
    # sources that the data set lacks, so that path and label of their variants are empty; None if there was no data
    # set to look in
    unknown: int | None = None
    parameters: bool = False  # whether the values of the parameters are known
    # one line for every writer whose records cannot be read or are gone in part
    lacking: list[str] = field(default_factory=list)


def export(
    folder: Path,
    out: Path,
    format_: Format,
    *,
    generator: str | None = None,
    sources: Sources | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Exported:
    """Writes the variants of one generator with one set of parameters; `out` appears when all of it is there.

    Args:
        folder: of the store; nothing in it is changed.
        out: absent or an empty folder.
        format_: what is written.
        generator: "FINGERPRINT" or "FINGERPRINT/PARAMETERS" in hexadecimal, or the beginning of it; needed if the store
            holds several, since the names of the files do not tell them apart.
        sources: where path and label of a source are looked up; None leaves them empty.
        shard_bytes: no shard is larger, except for one that holds a single larger image.
        progress: is told the number of variants.
    """
    manifest, progress = read_manifest(folder), progress or Progress()
    with open_writers(folder) as writers:
        kind, count = _chosen(folder, manifest, writers, generator)
        progress.start(count)
        values, fingerprint = known_parameters(manifest, kind[1]), kind[0].hex()
        done = Exported(parameters=values is not None, lacking=damage_of(writers))
        with finished_at_once(out, "exporting") as place:
            if sources is not None:
                done.unknown = sources.look_for(
                    source_id for source_id, link in distinct_links(writers) if (link[8:24], link[24:40]) == kind
                )
            files = _files(folder, writers, kind, sources, values, done, progress)
            with open_table(place, "w") as text:
                write_row = table_writer(text, sorted(values or {}))
                shards = _write_tars(files, place, shard_bytes, write_row) if format_ == "webdataset" else None
                done.shards, done.bytes = len(shards or []), sum(shard.bytes for shard in shards or [])
                if shards is None:
                    done.bytes = _write_folder(files, place, write_row)
                done.bytes += text.tell()
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
            (place / DESCRIPTION).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
            for name in (TABLE, DESCRIPTION, *(shard.name for shard in shards or [])):
                sync(place / name)
    return done


def _chosen(
    folder: Path, manifest: StoreManifest, writers: list[Writer], generator: str | None
) -> tuple[tuple[bytes, bytes], int]:
    """Returns fingerprint and parameters of what is exported, and the number of variants."""
    kinds: Counter[tuple[bytes, bytes]] = Counter((link[8:24], link[24:40]) for _, link in distinct_links(writers))
    if not kinds and (lacking := damage_of(writers)):
        raise StoreError(f"{folder} is damaged, and nothing of it is left to export: {'; '.join(lacking)}")
    if not kinds:
        raise StoreError(f"{folder} holds no variants; write some with genssl pregenerate")
    names = {f"{fingerprint.hex()}/{parameters.hex()}": (fingerprint, parameters) for fingerprint, parameters in kinds}
    chosen = [name for name in names if name.startswith((generator or "").lower())]
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
    values: Mapping[str, int | float] | None,
    done: Exported,
    progress: Progress,
) -> Files:
    """Yields name, PNG and metadata of every variant, in order."""
    keys = (link_key(*pair) for pair in distinct_links(writers))
    wanted = (key for key in keys if (key.fingerprint, key.parameters) == kind)
    while batch := list(islice(wanted, BATCH)):
        found: dict[bytes, bytes] = {}
        for environment in (writer.environment for writer in writers if writer.environment is not None):
            missing = [digest for key in batch if (digest := key.digest()) not in found]
            for digest, record in zip(missing, environment.get_many(missing), strict=True):
                if record is not None and digest_of(record) == digest and is_intact(record):
                    found[digest] = record
        for key in batch:
            record = found.get(key.digest())
            if record is not None and (channels := read_head(record).shape[0]) not in PNG_MODES:
                raise StoreError(
                    f"{folder}: variant {key.index} of the source {key.source_id.hex()} has {channels} channels; PNG "
                    "holds 1 or 3, so this store cannot be exported"
                )
            image = decode_image(record, checked=True) if record is not None else None
            if record is None or image is None:  # the latter if the checksum is right, and yet the PNG cannot be read
                done.damaged += 1
                continue
            source = sources.of(key.source_id) if sources is not None else None
            yield f"{key.source_id.hex()}_{key.index}", png_of(record), metadata_of(key, image, source, values)
            done.variants += 1
        progress.advance(len(batch))


def _write_folder(files: Files, place: Path, write_row: WriteRow) -> int:
    """Returns the number of bytes."""
    size = 0
    for name, png, told in files:
        text = json.dumps(told, sort_keys=True).encode()
        size += (place / f"{name}.png").write_bytes(png) + (place / f"{name}.json").write_bytes(text)
        write_row(f"{name}.png", "", told)
    return size


def _write_tars(files: Files, place: Path, shard_bytes: int, write_row: WriteRow) -> list[Shard]:
    shards: list[Shard] = []
    end = bytes(2 * BLOCK)  # of a tar
    with ExitStack() as opened:
        file: BinaryIO | None = None
        for name, png, told in files:
            members = _member(f"{name}.png", png) + _member(f"{name}.json", json.dumps(told, sort_keys=True).encode())
            if file is None or shards[-1].bytes + len(members) > shard_bytes:
                if file is not None:
                    file.write(end)
                    opened.close()
                shards.append(Shard(name=f"variants-{len(shards):06d}.tar", variants=0, bytes=len(end)))
                file = opened.enter_context((place / shards[-1].name).open("wb"))
            file.write(members)
            shards[-1].variants += 1
            shards[-1].bytes += len(members)
            write_row(f"{name}.png", shards[-1].name, told)
        if file is not None:
            file.write(end)
    return shards


def _member(name: str, content: bytes) -> bytes:
    """Returns a file as it stands in a tar: nothing of this machine, user or time is in it."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK)
