"""A store made again of what `genssl store export` wrote: the same keys, and the same pixels to the bit.

The table says what there must be. A file counts as a variant's only if its pixels are those that were exported, so
that renamed, exchanged, damaged and lossily encoded files are found out; a PNG that was packed better is fine.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path

from genssl.data.base import UInt8Array
from genssl.data.decode import MAX_BYTES, MAX_PIXELS
from genssl.data.folder import SUFFIXES
from genssl.errors import DataError
from genssl.variants.key import VariantKey
from genssl.variants.store.facts import with_contents
from genssl.variants.store.manifest import StoredGenerator, update_manifest
from genssl.variants.store.record import Encoding, from_png
from genssl.variants.store.scan import Progress
from genssl.variants.store.store import VariantStore
from genssl.variants.store.table import Description, Exported, pixels_digest, read_description, read_table

BATCH = 64
SHOWN = 5
Read = Callable[[str], bytes]


@dataclass
class Restored:
    """What an import of an export did.

    Attributes:
        variants: written now.
        present: stored before, by an earlier call.
        absent: variants without a file, left out.
        unknown: images that the table does not name, left out.
        corrupt: one line for every file that is not the exported image, left out.
    """

    variants: int = 0
    present: int = 0
    absent: int = 0
    unknown: int = 0
    corrupt: list[str] = field(default_factory=list)


def restore(
    folder: Path,
    out: Path,
    *,
    encoding: Encoding = "png",
    skip_unknown: bool = False,
    progress: Progress = lambda done: None,
    started: Callable[[int], None] = lambda total: None,
) -> Restored:
    """Stores every variant of an export under the key that it had.

    All names are looked up before anything is written. What is stored is not stored again, so an interrupted import is
    taken up by calling it again.

    Args:
        folder: of the export, in any of its formats.
        out: a store, or an absent or empty folder; pinned to the generator if the exported store was.
        encoding: of the stored images; both are lossless.
        skip_unknown: leaves out variants whose files are gone, and images that the table does not name.
        progress: called with the number of variants done since its last call.
        started: called once with the number of variants.

    Raises:
        DataError: if the folder is no export, if its description or table is damaged, or if files are gone or unknown.
        StoreError: if `out` is something else or belongs to another generator, or if the disk is full.
    """
    description = read_description(folder)
    if description is None:
        raise DataError(f"{folder} is no export of a store: it has no export.json")
    done = _check_names(folder, description, skip_unknown=skip_unknown)
    started(description.variants - done.absent)
    fingerprint = bytes.fromhex(description.fingerprint)
    with VariantStore(out, encoding=encoding, fingerprint=fingerprint, pin=description.pinned) as store:
        known = description.generator
        if known != StoredGenerator() or description.fingerprint not in store.manifest.generators:
            store.describe_generator(
                fingerprint, name=known.name, model=known.model, licence=known.licence, tflops=known.tflops
            )
        store.manifest = update_manifest(out, lambda manifest: with_contents(manifest, description.manifest))
        for shard, rows in groupby(read_table(folder, description), key=lambda row: row.shard):
            with _opened(folder, shard) as (names, read):
                there = (row for row in rows if row.file in names)
                while batch := list(islice(there, BATCH)):
                    _store(store, batch, Path(folder, shard), read, done)
                    progress(len(batch))
    return done


def _store(store: VariantStore, batch: Sequence[Exported], where: Path, read: Read, done: Restored) -> None:
    items: list[tuple[VariantKey, UInt8Array]] = []
    for row, present in zip(batch, store.get_many([row.key.digest() for row in batch]), strict=True):
        if present is not None:
            done.present += 1
            continue
        try:
            items.append((row.key, _image(row, read)))
        except (DataError, OSError, tarfile.TarError) as error:
            done.corrupt.append(f"{where / row.file}: {error}")
    if items:
        store.put_many(items, strict=True)
    done.variants += len(items)


def _image(row: Exported, read: Read) -> UInt8Array:
    """Returns the pixels of a row's file; raises DataError if they are not those that were exported."""
    channels, height, width = row.shape
    if height * width > MAX_PIXELS:
        raise DataError(f"the table says that it has {height} x {width} pixels; the limit is {MAX_PIXELS:,} in all")
    image = from_png(read(row.file), channels, height, width)
    if image is None:
        raise DataError(f"this is no intact PNG of {channels} x {height} x {width}")
    if pixels_digest(image) != row.pixels:
        raise DataError("its pixels are not those that were exported: it is another image, or was encoded with loss")
    return image


def _check_names(folder: Path, description: Description, *, skip_unknown: bool) -> Restored:
    """Looks for every file of the table, and for images that are in no row."""
    done, absent, unknown = Restored(), [], []
    shards = {shard.name for shard in description.shards or ()}
    seen = set()
    for shard, rows in groupby(read_table(folder, description), key=lambda row: row.shard):
        if shard in seen or (shard not in shards if description.shards is not None else shard != ""):
            raise DataError(f"{folder}: the table's rows of the shard {shard!r} are not as they were exported")
        seen.add(shard)
        with _opened(folder, shard) as (names, _):
            wanted = set()
            for row in rows:
                wanted.add(row.file)
                if row.file not in names:
                    absent.append(str(Path(shard, row.file)))
            unknown += [str(Path(shard, name)) for name in sorted(names - wanted)]
    done.absent, done.unknown = len(absent), len(unknown)
    if (absent or unknown) and not skip_unknown:
        found = [
            f"{len(names):,} {what}, such as {', '.join(names[:SHOWN])}"
            for names, what in (
                (absent, f"of its {description.variants:,} variants have no file"),
                (unknown, "of its images are in no row of the table"),
            )
            if names
        ]
        raise DataError(
            f"{folder}: {'; '.join(found)}; put back what was renamed or removed, or leave it out with --skip-unknown"
        )
    if done.absent == description.variants:
        raise DataError(f"{folder}: no variant has a file; give the folder that genssl store export wrote")
    return done


@contextmanager
def _opened(folder: Path, shard: str) -> Iterator[tuple[set[str], Read]]:
    """Yields the names of the images that lie in a folder, or in a shard of it, and what reads one of them.

    A shard that is gone has none, and one that is cut short has those before the cut.
    """
    if not shard:
        there = {path.name for path in folder.iterdir() if _is_image(path.name) and path.is_file()}
        yield there, lambda name: _bounded(name, (folder / name).stat().st_size, (folder / name).read_bytes)
        return
    path = folder / Path(shard).name  # never outside of the export
    try:
        if not path.is_file():  # a pipe would keep who opens it
            raise FileNotFoundError(path)
        tar = tarfile.open(path, "r:")  # noqa: SIM115, closed below
    except (OSError, tarfile.TarError):
        yield set(), lambda name: b""
        return
    with tar:
        members: dict[str, tarfile.TarInfo] = {}
        try:
            for member in tar:
                name = member.name.removeprefix("./")  # as `tar cf FILE .` writes them
                if member.isreg() and _is_image(name):
                    members[name] = member
        except (OSError, tarfile.TarError):
            pass

        def read(name: str) -> bytes:
            file = tar.extractfile(members[name])
            assert file is not None, "a regular file"
            return _bounded(name, members[name].size, file.read)

        yield set(members), read


def _bounded(name: str, size: int, read: Callable[[], bytes]) -> bytes:
    if size > MAX_BYTES:
        raise DataError(f"{name} has {size:,} bytes; the limit is {MAX_BYTES:,}")
    return read()


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")
