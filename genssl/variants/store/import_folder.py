"""A store made of a folder: of what `genssl store export` wrote, or of images that another program wrote.

Of an export the table says what there must be. A file counts as a variant's only if its pixels are those that were
exported, so that renamed, exchanged, damaged and lossily encoded files are found out; a PNG that was packed better is
fine. The store has the same keys then, and the same pixels to the bit.

The images of another program are laid out like the paper's:

    FOLDER/<class>/<stem>_<k>.JPEG      variant k of
    ROOT/<class>/<stem>.JPEG            this image of the data set

The folders between may differ, as long as a stem is unique in ROOT. The variants belong to a generator that genssl does
not have: its fingerprint is the BLAKE2b-128 of its name (see `foreign_fingerprint`), its parameters are empty.

In both cases all names are looked up before anything is written. What is stored is not stored again, so an interrupted
import is taken up by calling it again.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import groupby, islice
from pathlib import Path

from genssl.data.base import UInt8Array
from genssl.data.decode import MAX_BYTES, MAX_PIXELS, decode
from genssl.data.files import read_image_file
from genssl.data.folder import SUFFIXES, images_below
from genssl.errors import DataError
from genssl.variants.key import VariantKey, parameters_digest
from genssl.variants.store.export_table import Description, ExportedVariant, pixels_digest, read_description, read_table
from genssl.variants.store.facts import with_contents
from genssl.variants.store.manifest import StoredGenerator, update_manifest
from genssl.variants.store.record import Encoding, from_png
from genssl.variants.store.scan import Progress
from genssl.variants.store.store import VariantStore

BATCH = 64
SHOWN = 5
INDICES = 2**64  # what an index is below
VARIANT = re.compile(r"(.+)_(\d+)")
Read = Callable[[str], bytes]
Found = tuple[VariantKey, Path, Callable[[], UInt8Array]]  # a variant, where it lies, and what reads its pixels


@dataclass
class Imported:
    """What an import did."""

    variants: int = 0  # written now
    present: int = 0  # stored before, by an earlier call
    absent: int = 0  # variants of an export without a file, left out
    unknown: int = 0  # images that belong to nothing, left out
    # one line for every image that cannot be decoded or is not the exported one, left out
    corrupt: list[str] = field(default_factory=list)


def _store(store: VariantStore, variants: Iterable[Found], done: Imported, progress: Progress) -> None:
    variants = iter(variants)
    while batch := list(islice(variants, BATCH)):
        items: list[tuple[VariantKey, UInt8Array]] = []
        present = store.get_many([key.digest() for key, _, _ in batch])
        for (key, path, read), image in zip(batch, present, strict=True):
            if image is not None:
                done.present += 1
                continue
            try:
                items.append((key, read()))
            except (DataError, OSError, tarfile.TarError) as error:
                done.corrupt.append(f"{path}: {error}")
        if items:
            store.put_many(items, strict=True)
        done.variants += len(items)
        progress.advance(len(batch))


# --- another program's images ---


def foreign_fingerprint(name: str) -> bytes:
    """Returns 16 bytes for a generator that genssl does not have: the BLAKE2b-128 of its name, in UTF-8."""
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def import_folder(
    folder: Path,
    out: Path,
    *,
    dataset_root: Path,
    generator_name: str,
    licence: str = "",
    encoding: Encoding = "png",
    skip_unknown: bool = False,
    progress: Progress | None = None,
) -> Imported:
    """Stores every image of a folder as a variant of the data set's image of the same stem.

    Args:
        folder: of the variants, at any depth.
        out: a store of this generator, or an absent or empty folder; pinned to the generator.
        dataset_root: of the images as the data set stores them; the digest of a file's bytes names the source.
        generator_name: not empty.
        licence: of the images, as it goes into the manifest.
        encoding: of the stored images, which are RGB at the size of their files.
        skip_unknown: leaves out images whose stem is not in the data set.
        progress: is told the number of images.
    """
    dataset, progress = _Stems(dataset_root), progress or Progress()
    known, unknown = _check_stems(folder, dataset)
    if unknown and not skip_unknown:
        raise DataError(
            f"{folder}: {len(unknown):,} of {known + len(unknown):,} images belong to none in {dataset_root}, such as "
            f"{', '.join(unknown[:SHOWN])}; a variant is named <stem>_<k>{SUFFIXES[1]} after <stem> of the data set: "
            "give another --dataset-root, or leave them out with --skip-unknown"
        )
    if not known:
        raise DataError(f"{folder}: no image belongs to one in {dataset_root}; give another folder or --dataset-root")
    done, fingerprint = Imported(unknown=len(unknown)), foreign_fingerprint(generator_name)

    def found() -> Iterator[Found]:
        for path in _images(folder, "FOLDER"):
            match = VARIANT.fullmatch(path.stem)
            if match and (source := dataset.find(path.relative_to(folder).parent, match[1])):
                key = VariantKey(_source_id(source), fingerprint, parameters_digest({}), int(match[2]))
                yield key, path, partial(_decoded, path)

    progress.start(known)
    with VariantStore(out, encoding=encoding, fingerprint=fingerprint, pin=True) as store:
        store.describe_generator(fingerprint, StoredGenerator(name=generator_name, licence=licence))
        _store(store, found(), done, progress)
    return done


def _decoded(path: Path) -> UInt8Array:
    return decode(read_image_file(path))


@lru_cache(maxsize=1024)
def _source_id(path: Path) -> bytes:
    try:
        return read_image_file(path).source_id
    except (DataError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}); repair it or remove it") from None


class _Stems:
    """The images of a data set by stem."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._paths: dict[str, list[Path]] = {}
        for path in _images(root, "--dataset-root"):
            self._paths.setdefault(path.stem, []).append(path.relative_to(root))

    def find(self, below: Path, stem: str) -> Path | None:
        """Returns the image of a stem: the one in the same folder `below` the root if there is, else the only one."""
        paths = self._paths.get(stem, [])
        nearest = [path for path in paths if path.parent == below] or paths
        if len(nearest) > 1:
            raise DataError(
                f"--dataset-root {self._root}: {nearest[0]} and {nearest[1]} have the same stem, so it is not clear "
                f"whose variant {below / stem}_0 is; put variants into folders named like those of the data set"
            )
        return self._root / nearest[0] if nearest else None


def _check_stems(folder: Path, dataset: _Stems) -> tuple[int, list[str]]:
    """Returns the number of images whose source is known, and the paths of the others, relative to the folder."""
    known, unknown = 0, []
    numbered: dict[tuple[Path | None, int], Path] = {}
    parent = None
    for path in _images(folder, "FOLDER"):
        relative = path.relative_to(folder)
        match = VARIANT.fullmatch(path.stem)
        source = dataset.find(relative.parent, match[1]) if match else None
        if match is None or source is None:
            unknown.append(str(relative))
            continue
        if int(match[2]) >= INDICES:
            raise DataError(f"{folder}: {relative} is numbered {match[2]}; a number must be below 2**64")
        if relative.parent != parent:  # a folder's worth of names is held, not all
            parent, numbered = relative.parent, {}
        other = numbered.setdefault((source, int(match[2])), relative)
        if other != relative:
            raise DataError(
                f"{folder}: {other} and {relative} are both variant {int(match[2])} of {source}; remove one of them"
            )
        known += 1
    return known, unknown


def _images(root: Path, what: str) -> Iterator[Path]:
    """Yields the images below a folder, in a fixed order; hidden ones are ignored."""
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise DataError(f"{what} {root} {found}; give a folder of images ({', '.join(SUFFIXES)})")
    yield from images_below(root, what)


# --- an export ---


def import_export(
    folder: Path,
    out: Path,
    *,
    encoding: Encoding = "png",
    skip_unknown: bool = False,
    progress: Progress | None = None,
) -> Imported:
    """Stores every variant of an export, in any of its formats, under the key that it had.

    Args:
        folder: of the export.
        out: a store, or an absent or empty folder; pinned to the generator if the exported store was.
        encoding: of the stored images; both are lossless.
        skip_unknown: leaves out variants whose files are gone, and images that the table does not name.
        progress: is told the number of variants.
    """
    description, progress = read_description(folder), progress or Progress()
    done = _check_files(folder, description, skip_unknown=skip_unknown)
    progress.start(description.variants - done.absent)
    fingerprint = bytes.fromhex(description.fingerprint)
    with VariantStore(out, encoding=encoding, fingerprint=fingerprint, pin=description.pinned) as store:
        known = description.generator.model_dump(include={"name", "model", "licence", "tflops"})
        store.describe_generator(fingerprint, StoredGenerator(**known))
        store.manifest = update_manifest(out, lambda manifest: with_contents(manifest, description.manifest))
        for shard, rows in groupby(read_table(folder, description), key=lambda row: row.shard):
            with _opened(folder, shard) as (names, read):
                there = (row for row in rows if row.file in names)
                found = ((row.key, folder / shard / row.file, partial(_image, row, read)) for row in there)
                _store(store, found, done, progress)
    return done


def _image(row: ExportedVariant, read: Read) -> UInt8Array:
    """Returns the pixels of a row's file; raises DataError if they are not those that were exported."""
    channels, height, width = row.shape
    if height * width > MAX_PIXELS:
        raise DataError(f"the table says that it has {height} x {width} pixels; the limit is {MAX_PIXELS:,} in all")
    image = from_png(read(row.file), channels, height, width)
    if image is None:
        raise DataError(f"this is not an intact PNG of {channels} x {height} x {width}")
    if pixels_digest(image) != row.pixels:
        raise DataError("its pixels are not those that were exported: it is another image, or was encoded with loss")
    return image


def _check_files(folder: Path, description: Description, *, skip_unknown: bool) -> Imported:
    """Looks for every file of the table, and for images that are in no row."""
    absent: list[str] = []
    unknown: list[str] = []
    shards = {""} if description.shards is None else {shard.name for shard in description.shards}
    for shard, rows in groupby(read_table(folder, description), key=lambda row: row.shard):
        if shard not in shards:
            raise DataError(f"{folder}: the table's rows of the shard {shard!r} are not as they were exported")
        shards.remove(shard)
        with _opened(folder, shard) as (names, _):
            wanted = [row.file for row in rows]
            absent += [str(Path(shard, name)) for name in wanted if name not in names]
            unknown += [str(Path(shard, name)) for name in sorted(names.difference(wanted))]
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
    if len(absent) == description.variants:
        raise DataError(f"{folder}: no variant has a file; give the folder that genssl store export wrote")
    return Imported(absent=len(absent), unknown=len(unknown))


@contextmanager
def _opened(folder: Path, shard: str) -> Iterator[tuple[set[str], Read]]:
    """Yields the names of the images that lie in a folder, or in a shard of it, and what reads one of them.

    A shard that is gone has none, and one that is cut short has those before the cut.
    """
    if not shard:
        there = {path.name for path in folder.iterdir() if _is_image(path.name) and path.is_file()}
        yield there, lambda name: read_image_file(folder / name).data
        return
    path = folder / Path(shard).name  # never outside of the export
    members: dict[str, tarfile.TarInfo] = {}
    with ExitStack() as stack:
        with suppress(OSError, tarfile.TarError):
            if path.is_file():  # a pipe would keep who opens it
                tar = stack.enter_context(tarfile.open(path, "r:"))
                for member in tar:
                    name = member.name.removeprefix("./")  # as `tar cf FILE .` writes them
                    if member.isreg() and _is_image(name):
                        members[name] = member

        def read(name: str) -> bytes:
            if members[name].size > MAX_BYTES:
                raise DataError(f"the file has {members[name].size:,} bytes; the limit is {MAX_BYTES:,}")
            file = tar.extractfile(members[name])
            assert file is not None, "a regular file"
            return file.read()

        yield set(members), read


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")
