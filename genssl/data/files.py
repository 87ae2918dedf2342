"""Data sets whose images are files or lie in memory: what one's own folders, the digits and public sets share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from genssl.base.cores import usable_cores
from genssl.data.base import StoredImage, UInt8Array, raw_image
from genssl.data.configs import FileDatasetConfig
from genssl.data.decode import MAX_BYTES, decode, resize_and_crop
from genssl.errors import DataError

CHECKED_AT_ONCE = 1024


def read_image_file(path: Path) -> StoredImage:
    """Returns the bytes of an image file; raises OSError, or DataError if it is larger than `MAX_BYTES`."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise DataError(f"the file has {size:,} bytes; the limit is {MAX_BYTES:,}")
        return StoredImage(data=file.read(), encoding="file")


class FileDataset:
    """Images that are read from their files each time they are asked for; satisfies ImageDataset.

    Args:
        config: gives name, root (for messages), image_size and on_corrupt. With `on_corrupt: skip` every file is
            decoded here and now, because most damage shows only then; corrupt files are listed in `skipped`.
        files: (path, label) of every image in row order; the label is -1 where there is none.
        class_names: names of the labels 0, 1, ..., or None.
        unread: paths of images of formats that are not read, which were found beside them.

    Raises:
        DataError: if there are no files, or if all of them are corrupt.
    """

    def __init__(
        self,
        config: FileDatasetConfig,
        files: Iterable[tuple[str | Path, int]],
        class_names: list[str] | None,
        unread: Sequence[str] = (),
    ) -> None:
        self.name: str = config.name
        self.unread = list(unread)
        self.class_names = class_names
        self.image_size = config.image_size
        self.skipped: list[str] = []
        self._root = config.root.expanduser().absolute()
        self._skips_corrupt = config.on_corrupt == "skip"
        # Strings and not Paths: ImageNet has 1.3 million of them.
        self._paths: list[str] = []
        self._labels: list[int] = []
        for path, label in files:
            self._paths.append(str(path))
            self._labels.append(label)
        self._source_ids: list[bytes | None] = [None] * len(self._paths)
        if not self._paths:
            raise DataError(f"dataset {self.name}: {config.root.absolute()} has no images for this split; add some")
        if self._skips_corrupt:
            self._leave_out_corrupt(config.root)

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, row: int) -> UInt8Array:
        """Returns the image [3, image_size, image_size], RGB uint8; raises DataError naming a corrupt file."""
        return resize_and_crop(self.pixels(row), self.image_size)

    def pixels(self, row: int) -> UInt8Array:
        """Returns the whole image [3, H, W], RGB uint8; raises DataError naming a corrupt file."""
        stored = self.stored(row)
        try:
            return decode(stored)
        except DataError as error:
            raise self._fault(row, str(error)) from None

    def path(self, row: int) -> str:
        """Returns where the file lies below dataset.root, with slashes; its absolute path if it lies elsewhere."""
        path = Path(self._paths[row]).absolute()
        return (path.relative_to(self._root) if path.is_relative_to(self._root) else path).as_posix()

    def label(self, row: int) -> int:
        """Returns the class 0 .. len(class_names) - 1, or -1 for an unlabelled image."""
        return self._labels[row]

    def stored(self, row: int) -> StoredImage:
        """Returns the bytes of the file; raises DataError naming it if it cannot be read or is larger than 64 MiB."""
        try:
            return read_image_file(Path(self._paths[row]))
        except DataError as error:
            raise self._fault(row, str(error)) from None
        except OSError as error:
            raise self._fault(row, f"the file cannot be read ({error.strerror})") from None

    def source_id(self, row: int) -> bytes:
        """Returns the 16-byte digest of the file's bytes; the file is read once for it."""
        source_id = self._source_ids[row]
        if source_id is None:
            source_id = self._source_ids[row] = self.stored(row).source_id
        return source_id

    def _fault(self, row: int, what: str) -> DataError:
        advice = (
            "another program has changed it since this run began"
            if self._skips_corrupt
            else "repair or remove it, or set dataset.on_corrupt: skip to leave such files out"
        )
        return DataError(f"{self._paths[row]}: {what}; {advice}")

    def _leave_out_corrupt(self, root: Path) -> None:
        rows = range(len(self._paths))
        good: list[int] = []
        # Pillow decodes without the GIL. Chunks, because the pool would hold a future for every file at once.
        with ThreadPoolExecutor(usable_cores(), thread_name_prefix="genssl-check") as pool:
            for start in range(0, len(rows), CHECKED_AT_ONCE):
                chunk = rows[start : start + CHECKED_AT_ONCE]
                good += [row for row, fine in zip(chunk, pool.map(self._is_fine, chunk), strict=True) if fine]
        kept = set(good)
        self.skipped = [self._paths[row] for row in rows if row not in kept]
        if not good:
            raise DataError(
                f"dataset {self.name}: all {len(rows)} images of this split below {root.absolute()} are corrupt, "
                f"such as {self.skipped[0]}; set dataset.on_corrupt: fail to see what is wrong with it"
            )
        self._paths = [self._paths[row] for row in good]
        self._labels = [self._labels[row] for row in good]
        self._source_ids = [self._source_ids[row] for row in good]

    def _is_fine(self, row: int) -> bool:
        try:
            stored = self.stored(row)
            decode(stored)
        except DataError:
            return False
        self._source_ids[row] = stored.source_id
        return True


class ArrayDataset:
    """Images that are kept in memory as one array; satisfies ImageDataset.

    Args:
        name: registry name of the data set.
        image_size: side of the square images that `image` returns, in pixels.
        pixels: uint8 [N, C, H, W], C is 1 or 3.
        labels: N numbers of classes, -1 for unlabelled images.
        class_names: names of the classes.
    """

    def __init__(
        self, name: str, image_size: int, pixels: UInt8Array, labels: Sequence[int], class_names: list[str]
    ) -> None:
        self.name = name
        self.class_names: list[str] | None = list(class_names)
        self.image_size = image_size
        self.skipped: list[str] = []
        self._pixels, self._labels = pixels, labels

    def __len__(self) -> int:
        return len(self._pixels)

    def image(self, row: int) -> UInt8Array:
        """Returns the image [3, image_size, image_size], RGB uint8."""
        pixels = self._pixels[row]
        rgb = np.repeat(pixels, 3, axis=0) if len(pixels) == 1 else pixels
        return np.ascontiguousarray(resize_and_crop(rgb, self.image_size))

    def label(self, row: int) -> int:
        """Returns the class 0 .. len(class_names) - 1, or -1 for an unlabelled image."""
        return int(self._labels[row])

    def stored(self, row: int) -> StoredImage:
        """Returns the image as a raw image [C, H, W]."""
        return raw_image(self._pixels[row])

    def source_id(self, row: int) -> bytes:
        """Returns the 16-byte name of the image."""
        return self.stored(row).source_id
