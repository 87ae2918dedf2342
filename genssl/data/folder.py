"""A tree of one's own images."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from genssl.data.base import Split
from genssl.data.configs import FolderConfig
from genssl.data.files import FileDataset
from genssl.errors import DataError, suggest

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Names of images that are not read, so that they are not left out in silence; any other file is not an image.
UNREAD_SUFFIXES = (
    *(".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jfif", ".jpe", ".svg", ".psd", ".ico", ".tga"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".exr", ".hdr", ".dcm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"),
)


class ImageFolder(FileDataset):
    """Every image below a folder, in the order of its path; hidden files and folders are ignored, links are followed.

    Images of formats that are not read (`UNREAD_SUFFIXES`) are left out, and listed in `unread`; all other files are
    taken for something else than images.

    Without `test_root` a part of root is held out for the test split: see `held_out`.

    Args:
        config: where the images are, and where their labels and the test split come from.
        split: "train" or "test".

    Attributes:
        labels_note: with `labels: auto`, where the labels were found, or that there are none; else None.

    Raises:
        DataError: if a folder is missing or empty, if an image lies outside the class folders, if test_root has a class
            that root has not, or if test_root and root overlap.
    """

    def __init__(self, config: FolderConfig, split: Split) -> None:
        root, unread = config.root.expanduser(), list[str]()
        labelled = config.labels == "subfolders"
        self.labels_note: str | None = None
        found = _relative_paths(root, "dataset.root", unread)
        if config.labels == "auto":
            folders = {path.partition("/")[0] for path in found if "/" in path}
            labelled = len(folders) > 1
            self.labels_note = (
                f"{root}: its {len(folders)} sub-folders are the classes; dataset.labels: none takes them for none"
                if labelled
                else f"{root}: no sub-folders that could be classes, so no labels"
            )
        classes = _by_class(found, root, "dataset.root", labelled)
        label_of = {name: label if labelled else -1 for label, name in enumerate(classes)}
        if config.test_root is None:
            test = {path for paths in classes.values() for path in held_out(paths, config.test_fraction)}
            classes = {name: [p for p in paths if (p in test) == (split == "test")] for name, paths in classes.items()}
            if not any(classes.values()):
                raise DataError(
                    f"dataset.root: no class in {root.absolute()} has two images, so none can be held out for testing; "
                    "add images, or give dataset.test_root"
                )
        else:
            test_root = config.test_root.expanduser()
            _check_apart(root, test_root)
            if split == "test":
                root, unread = test_root, []
                found = _relative_paths(test_root, "dataset.test_root", unread)
                classes = _by_class(found, test_root, "dataset.test_root", labelled)
        for name in classes:
            if name not in label_of:
                raise DataError(
                    f"dataset.test_root: {root.absolute()} has a class {name!r} that dataset.root has not"
                    f"{suggest(name, label_of)}"
                )
        labels = {path: label_of[name] for name, paths in classes.items() for path in paths}
        files = ((root / path, labels[path]) for path in sorted(labels))
        super().__init__(config, files, list(label_of) if labelled else None, unread)


def held_out(paths: list[str], fraction: float) -> list[str]:
    """Returns the images of one class, given by relative POSIX paths, that are held out for testing.

    An image is held out if the hash of its path, as a number in 0..1, is below `fraction`. So images that are added
    or removed never move another one from train to test; the part held out is `fraction` up to chance. Two or more
    images leave at least one on each side, and a single one is trained on.
    """
    ranked = sorted((_position(path), path) for path in paths)
    count = sum(position < fraction for position, _ in ranked)
    count = max(min(count, len(ranked) - 1), min(1, len(ranked) - 1))
    return [path for _, path in ranked[:count]]


def _position(path: str) -> float:
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=6).digest(), "big") / 2**48


def by_suffix(unread: Iterable[str]) -> str:
    """Returns how many files there are of each suffix, the most first: "3 .gif, 1 .heic"."""
    counts = Counter(Path(path).suffix.lower() for path in unread)
    return ", ".join(
        f"{count:,} {suffix}" for suffix, count in sorted(counts.items(), key=lambda item: (-item[1], item))
    )


def _relative_paths(root: Path, key: str, unread: list[str]) -> list[str]:
    """Returns the paths of all images below a folder, sorted; raises DataError, naming `key`, if there are none.

    `unread` gets the paths of images that are not read.
    """
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise DataError(f"{key}: {root.absolute()} {found}; give the folder that holds the images ({_allowed()})")
    paths = sorted(path.relative_to(root).as_posix() for path in images_below(root, key, (), unread))
    if not paths:
        others = f" but {by_suffix(unread)}, which are not read" if unread else ""
        raise DataError(
            f"{key}: {root.absolute()} has no images{others}; put files there ({_allowed()}), or give another folder"
        )
    return paths


def _by_class(paths: list[str], root: Path, key: str, labelled: bool) -> dict[str, list[str]]:
    """Returns the relative paths of every class's images, all sorted; without labels, of one class that has no name."""
    classes: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        name, below, _ = path.partition("/")
        if labelled and not below:
            raise DataError(
                f"{key}: {root / path} lies directly in {root.absolute()}, so it has no class; move it into a folder "
                "named as its class, or set dataset.labels: none"
            )
        classes[name if labelled else ""].append(path)
    return dict(sorted(classes.items()))


def images_below(
    folder: Path, key: str, above: tuple[Path, ...] = (), unread: list[str] | None = None
) -> Iterator[Path]:
    """Yields the images below a folder, those of a folder one after another; hidden files and folders are ignored.

    Links are followed. What is not a regular file, such as a pipe, which would be waited for, is ignored. `unread` gets
    the paths of images that are not read; `above` are the resolved folders on the way to this one; `key` is what named
    it, for messages. Raises DataError if a folder cannot be read, or is a link to a folder above it.
    """
    real = folder.resolve()
    if real in above:
        raise DataError(f"{key}: {folder} is a link to a folder above it; remove the link")
    try:
        entries = sorted(
            (entry for entry in os.scandir(folder) if not entry.name.startswith(".")), key=lambda entry: entry.name
        )
        folders = [Path(entry.path) for entry in entries if entry.is_dir()]
        # A dangling link counts as an image, so that on_corrupt decides about it instead of silence.
        files = [entry for entry in entries if entry.is_file() or not Path(entry.path).exists()]
    except OSError as error:
        where = error.filename or folder  # a link that leads to itself is named
        raise DataError(f"{key}: {where} cannot be read ({error.strerror}); repair it or remove it") from None
    for below in folders:
        yield from images_below(below, key, (*above, real), unread)
    if unread is not None:
        unread += [entry.path for entry in files if entry.name.lower().endswith(UNREAD_SUFFIXES)]
    yield from (Path(entry.path) for entry in files if entry.name.lower().endswith(SUFFIXES))


def _check_apart(root: Path, test_root: Path) -> None:
    one, other = root.resolve(), test_root.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise DataError(
            f"dataset.test_root: {test_root.absolute()} and dataset.root {root.absolute()} overlap, so test images "
            "would be trained on; give two folders that lie side by side"
        )


def _allowed() -> str:
    return ", ".join(SUFFIXES)
