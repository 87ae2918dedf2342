"""A store made of a folder of images that another generator wrote, laid out like the paper's.

    FOLDER/<class>/<stem>_<k>.JPEG      variant k of
    ROOT/<class>/<stem>.JPEG            this image of the data set

The folders between may differ, as long as a stem is unique in ROOT. The variants belong to a generator that genssl does
not have: its fingerprint is the BLAKE2b-128 of its name (see `foreign_fingerprint`), its parameters are empty.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from genssl.data.base import StoredImage, UInt8Array
from genssl.data.decode import MAX_BYTES, decode
from genssl.data.folder import SUFFIXES, images_below
from genssl.errors import DataError
from genssl.variants.key import VariantKey, parameters_digest
from genssl.variants.store.record import Encoding
from genssl.variants.store.scan import Progress
from genssl.variants.store.store import VariantStore

BATCH = 64
SHOWN = 5
INDICES = 2**64  # what an index is below
VARIANT = re.compile(r"(.+)_(\d+)")


@dataclass
class Imported:
    """What an import did.

    Attributes:
        variants: written now.
        present: stored before, by an earlier call.
        unknown: images without a stem in the data set, left out.
        corrupt: one line for every image that cannot be decoded, left out.
    """

    variants: int = 0
    present: int = 0
    unknown: int = 0
    corrupt: list[str] = field(default_factory=list)


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
    progress: Progress = lambda done: None,
    started: Callable[[int], None] = lambda total: None,
) -> Imported:
    """Stores every image of a folder as a variant of the data set's image of the same stem.

    All names are looked up before anything is written. What is stored is not stored again, so an interrupted import is
    taken up by calling it again.

    Args:
        folder: of the variants, at any depth.
        out: a store of this generator, or an absent or empty folder; pinned to the generator.
        dataset_root: of the images as the data set stores them; the digest of a file's bytes names the source.
        generator_name: not empty.
        licence: of the images, as it goes into the manifest.
        encoding: of the stored images, which are RGB at the size of their files.
        skip_unknown: leaves out images whose stem is not in the data set.
        progress: called with the number of images done since its last call.
        started: called once with the number of images.

    Raises:
        DataError: if a folder is missing, has no images, cannot be read or is a link to a folder above it, if stems are
            unknown, if two files are the same variant, or if a number is not below 2**64.
        StoreError: if `out` is something else or belongs to another generator, or if the disk is full.
    """
    dataset = _Stems(dataset_root)
    known, unknown = _check_names(folder, dataset)
    if unknown and not skip_unknown:
        raise DataError(
            f"{folder}: {len(unknown):,} of {known + len(unknown):,} images belong to none in {dataset_root}, such as "
            f"{', '.join(unknown[:SHOWN])}; a variant is named <stem>_<k>{SUFFIXES[1]} after <stem> of the data set: "
            "give another --dataset-root, or leave them out with --skip-unknown"
        )
    if not known:
        raise DataError(f"{folder}: no image belongs to one in {dataset_root}; give another folder or --dataset-root")
    done, fingerprint = Imported(unknown=len(unknown)), foreign_fingerprint(generator_name)
    started(known)
    with VariantStore(out, encoding=encoding, fingerprint=fingerprint, pin=True) as store:
        store.describe_generator(fingerprint, name=generator_name, licence=licence)
        batch: list[tuple[VariantKey, Path]] = []
        for path, stem, index in _variants(folder):
            source = dataset.find(path.relative_to(folder).parent, stem)
            if source is None:
                continue
            key = VariantKey(_source_id(source), fingerprint, parameters_digest({}), index)
            batch.append((key, path))
            if len(batch) == BATCH:
                _store(store, batch, done, progress)
                batch.clear()
        _store(store, batch, done, progress)
    return done


def _store(store: VariantStore, batch: Sequence[tuple[VariantKey, Path]], done: Imported, progress: Progress) -> None:
    present = store.get_many([key.digest() for key, _ in batch])
    items: list[tuple[VariantKey, UInt8Array]] = []
    for (key, path), image in zip(batch, present, strict=True):
        if image is not None:
            done.present += 1
            continue
        try:
            items.append((key, decode(_read(path))))
        except (DataError, OSError) as error:
            done.corrupt.append(f"{path}: {error}")
    if items:
        store.put_many(items, strict=True)
    done.variants += len(items)
    progress(len(batch))


@lru_cache(maxsize=1024)
def _source_id(path: Path) -> bytes:
    try:
        return _read(path).source_id
    except (DataError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}); repair it or remove it") from None


def _read(path: Path) -> StoredImage:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise DataError(f"the file has {size:,} bytes; the limit is {MAX_BYTES:,}")
        return StoredImage(file.read(), "file")


class _Stems:
    """The images of a data set by stem."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._paths: dict[str, list[Path]] = {}
        for path in _images(root, "--dataset-root"):
            self._paths.setdefault(path.stem, []).append(path.relative_to(root))

    def find(self, below: Path, stem: str) -> Path | None:
        """Returns the image of a stem: the one in the same folder `below` the root if there is, else the only one.

        Raises:
            DataError: if several could be meant.
        """
        paths = self._paths.get(stem, [])
        nearest = [path for path in paths if path.parent == below] or paths
        if len(nearest) > 1:
            raise DataError(
                f"--dataset-root {self._root}: {nearest[0]} and {nearest[1]} have the same stem, so it is not clear "
                f"whose variant {below / stem}_0 is; put variants into folders named like those of the data set"
            )
        return self._root / nearest[0] if nearest else None


def _check_names(folder: Path, dataset: _Stems) -> tuple[int, list[str]]:
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


def _variants(folder: Path) -> Iterator[tuple[Path, str, int]]:
    for path in _images(folder, "FOLDER"):
        if match := VARIANT.fullmatch(path.stem):
            yield path, match[1], int(match[2])


def _images(root: Path, what: str) -> Iterator[Path]:
    """Yields the images below a folder, in a fixed order; hidden ones are ignored."""
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise DataError(f"{what} {root} {found}; give a folder of images ({', '.join(SUFFIXES)})")
    yield from images_below(root, what)
