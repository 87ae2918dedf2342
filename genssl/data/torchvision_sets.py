"""Public data sets on their official splits, laid out on disk as torchvision does it.

Nothing is downloaded but with `download: true`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
from torchvision import datasets

from genssl.data.base import Split, StoredImage, UInt8Array, raw_image
from genssl.data.configs import (
    Cifar10Config,
    Cifar100Config,
    DownloadableConfig,
    FileDatasetConfig,
    Food101Config,
    ImageNetConfig,
    INaturalist2018Config,
    Places365Config,
    Stl10Config,
)
from genssl.data.decode import resize_and_crop
from genssl.data.files import FileDataset
from genssl.errors import DataError


@dataclass(frozen=True)
class Layout:
    """What a data set looks like below its root.

    Attributes:
        title: the data set, for people.
        root: where it is looked for.
        expected: the files and folders that must be there, relative to root.
        get: how one gets it, as the end of a message.
        fetch: gets it, where the config says `download: true`.
    """

    title: str
    root: Path
    expected: Sequence[str]
    get: str
    fetch: Callable[[], object] | None = None

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Wraps the code that opens the data set; turns whatever is wrong with the files into a DataError."""
        # torchvision is asked only when all is there: its messages name no file, and ImageNet would start unpacking.
        missing = self._missing()
        if missing and self.fetch is not None:
            self._download(self.fetch)
            missing = self._missing()
        if missing:
            which = "all" if len(missing) == len(self.expected) else ", ".join(missing)
            raise DataError(
                f"dataset.root: {self.title} is not in {self.root}; expected there: {', '.join(self.expected)} "
                f"(missing: {which}); {self.get}"
            )
        try:
            yield
        except (RuntimeError, OSError, LookupError, TypeError, ValueError, EOFError, UnpicklingError) as error:
            reason = f"{type(error).__name__}: {error}".split(". ")[0]
            raise DataError(
                f"dataset.root: {self.title} in {self.root} is damaged or not the official release ({reason}); "
                f"repair it, or remove it and get it again; {self.get}"
            ) from None

    def _missing(self) -> list[str]:
        return [name for name in self.expected if not (self.root / name).exists()]

    def _download(self, fetch: Callable[[], object]) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            fetch()
        except (RuntimeError, OSError, ValueError) as error:  # without a network, or with another file at the address
            raise DataError(
                f"dataset.download: {self.title} could not be fetched into {self.root} ({error}); {self.get}"
            ) from None


def by_torchvision(title: str, config: DownloadableConfig, expected: Sequence[str], kind: Any, **part: Any) -> Layout:
    """Returns the layout of a data set that torchvision's class `kind` fetches when its `part` is asked for."""
    root = config.root.expanduser().absolute()
    arguments = "".join(f", {name}={value!r}" for name, value in part.items())
    command = (
        f'python -c "from torchvision.datasets import *; {kind.__name__}({str(root)!r}{arguments}, download=True)"'
    )
    fetch = (lambda: kind(root, **part, download=True)) if config.download else None
    return Layout(title, root, expected, f"get it with: {command}, or set dataset.download: true", fetch)


def _python(statement: str) -> str:
    return f'python -c "from torchvision.datasets import *; {statement}"'


class ArrayDataset:
    """Images that are kept in memory as one array; satisfies ImageDataset.

    Args:
        config: gives name and image_size; on_corrupt has no effect, as the files have official checksums.
        pixels: uint8 [N, 3, H, W].
        labels: N numbers of classes, -1 for unlabelled images.
        class_names: names of the classes.
    """

    def __init__(
        self, config: FileDatasetConfig, pixels: UInt8Array, labels: Sequence[int], class_names: list[str]
    ) -> None:
        self.name: str = config.name
        self.class_names: list[str] | None = list(class_names)
        self.image_size = config.image_size
        self.skipped: list[str] = []
        self._pixels, self._labels = pixels, labels

    def __len__(self) -> int:
        return len(self._pixels)

    def image(self, row: int) -> UInt8Array:
        """Returns the image [3, image_size, image_size], RGB uint8."""
        return np.ascontiguousarray(resize_and_crop(self._pixels[row], self.image_size))

    def label(self, row: int) -> int:
        """Returns the class 0 .. len(class_names) - 1, or -1 for an unlabelled image."""
        return int(self._labels[row])

    def stored(self, row: int) -> StoredImage:
        """Returns the image as a raw image [3, H, W]."""
        return raw_image(self._pixels[row])

    def source_id(self, row: int) -> bytes:
        """Returns the 16-byte name of the image."""
        return self.stored(row).source_id


class Cifar10(ArrayDataset):
    """CIFAR-10 (Krizhevsky 2009): 50,000 train and 10,000 test images, 32x32.

    Raises:
        DataError: if files are missing or have other checksums than the official ones.
    """

    source_class: Any = datasets.CIFAR10
    title = "CIFAR-10"

    def __init__(self, config: Cifar10Config | Cifar100Config, split: Split) -> None:
        root, kind = config.root.expanduser().absolute(), self.source_class
        files = [kind.meta["filename"], *(name for name, _ in kind.train_list + kind.test_list)]
        layout = by_torchvision(self.title, config, [f"{kind.base_folder}/{name}" for name in files], kind)
        # The batches are pickles: torchvision loads them only after their md5 was found to be the official one.
        with layout.opening():
            source = kind(root, train=split == "train")
        super().__init__(config, source.data.transpose(0, 3, 1, 2), source.targets, source.classes)


class Cifar100(Cifar10):
    """CIFAR-100 (Krizhevsky 2009) with its 100 fine classes: 50,000 train and 10,000 test images, 32x32."""

    source_class = datasets.CIFAR100
    title = "CIFAR-100"


class Stl10(ArrayDataset):
    """STL-10 (Coates et al. 2011): 5,000 train, 8,000 test and 100,000 unlabelled images, 96x96.

    With `unlabeled: true` the unlabelled images follow the labelled ones of the train split, with label -1.

    Raises:
        DataError: if files are missing or have other checksums than the official ones.
    """

    def __init__(self, config: Stl10Config, split: Split) -> None:
        root, kind = config.root.expanduser().absolute(), datasets.STL10
        files = [kind.class_names_file, *(name for name, _ in kind.train_list + kind.test_list)]
        layout = by_torchvision("STL-10", config, [f"{kind.base_folder}/{name}" for name in files], kind)
        with layout.opening():
            source = kind(root, split="train+unlabeled" if config.unlabeled and split == "train" else split)
        super().__init__(config, source.data, source.labels, source.classes)


class Food101(FileDataset):
    """Food-101 (Bossard et al. 2014): 75,750 train and 25,250 test images.

    Raises:
        DataError: if files are missing or damaged.
    """

    def __init__(self, config: Food101Config, split: Split) -> None:
        root = config.root.expanduser().absolute()
        expected = [f"food-101/meta/{split}.json", "food-101/images"]
        with by_torchvision("Food-101", config, expected, datasets.Food101).opening():
            source = datasets.Food101(root, split=split)
        super().__init__(config, zip(source._image_files, source._labels, strict=True), source.classes)


class Places365(FileDataset):
    """Places365-Standard (Zhou et al. 2017): 1,803,460 train images; the 36,500 validation images are the test split.

    Raises:
        DataError: if files are missing or damaged.
    """

    def __init__(self, config: Places365Config, split: Split) -> None:
        root, kind = config.root.expanduser().absolute(), datasets.Places365
        part = "train-standard" if split == "train" else "val"
        size = "256" if config.small else "large"
        images = f"data_{size}_standard" if split == "train" else f"val_{size}"
        expected = [kind._CATEGORIES_META[0], kind._FILE_LIST_META[part][0], images]
        with by_torchvision("Places365-Standard", config, expected, kind, split=part, small=config.small).opening():
            source = kind(root, split=part, small=config.small)
        # source.classes is sorted by name; the labels follow the numbers in the file.
        class_names = sorted(source.class_to_idx, key=source.class_to_idx.__getitem__)
        super().__init__(config, source.imgs, class_names)


class INaturalist2018(FileDataset):
    """iNaturalist 2018 (Van Horn et al.): 437,513 train images; the 24,426 validation images are the test split.

    torchvision's INaturalist class knows no 2018 splits, so the official lists are read here. They obfuscate the names
    of the species; the official categories.json, if it lies beside them, gives the real ones.

    Raises:
        DataError: if files are missing or damaged.
    """

    def __init__(self, config: INaturalist2018Config, split: Split) -> None:
        root = config.root.expanduser().absolute()
        expected = ["train2018.json" if split == "train" else "val2018.json", "train_val2018"]
        get = "download and unpack it there: the 2018 folder of github.com/visipedia/inat_comp has the links"
        with Layout("iNaturalist 2018", root, expected, get).opening():
            listing = _read_json(root / expected[0])
            released = root / "categories.json"
            categories = _read_json(released) if released.exists() else listing["categories"]
            names = {category["id"]: category["name"] for category in categories}
            labels = {category: label for label, category in enumerate(sorted(names))}
            category_of = {item["image_id"]: item["category_id"] for item in listing["annotations"]}
            files = [(root / item["file_name"], labels[category_of[item["id"]]]) for item in listing["images"]]
        super().__init__(config, files, [names[category] for category in labels])


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class ImageNet(FileDataset):
    """ImageNet-1k (ILSVRC 2012): 1,281,167 train images; the 50,000 validation images are the test split.

    Raises:
        DataError: if files are missing or damaged, or if train/ and val/ do not have the same class folders. A part of
            it without the official list of classes, such as most copies of ImageNet-100, is for the data set `folder`.
    """

    def __init__(self, config: ImageNetConfig, split: Split) -> None:
        root = config.root.expanduser().absolute()
        folder = "train" if split == "train" else "val"
        get = (
            f"ask for access at image-net.org, put ILSVRC2012_devkit_t12.tar.gz and ILSVRC2012_img_{folder}.tar there, "
            f"and unpack them with: {_python(f'ImageNet({str(root)!r}, split={folder!r})')}"
        )
        if found := _class_folders(root / "train"):
            get += f". Its {len(found)} class folders can be read without meta.bin too: {_as_folder(config, root)}"
        with Layout("ImageNet-1k", root, ["meta.bin", folder], get).opening():
            source = datasets.ImageNet(root, split=folder)
            # torchvision numbers the folders it finds: with other folders the same number is another class.
            train = _class_folders(root / "train") if split == "test" else set()
            if train and train != set(source.wnids):
                differing = sorted(train ^ set(source.wnids))
                raise DataError(
                    f"dataset.root: {root / 'train'} and {root / folder} must have the same class folders; only one of "
                    f"them has {differing[0]} ({len(differing)} differ)"
                )
        super().__init__(config, source.samples, [", ".join(synonyms) for synonyms in source.classes])


def _class_folders(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*/")}


def _as_folder(config: ImageNetConfig, root: Path) -> str:
    """Returns what one types to read train/ and val/ below root by the data set `folder`."""
    roots = {"root": "train"} | ({"test_root": "val"} if _class_folders(root / "val") else {})
    settings = {"name": "folder", **{key: json.dumps(str(root / name)) for key, name in roots.items()}}
    settings |= {"image_size": str(config.image_size), "on_corrupt": config.on_corrupt}
    block = ", ".join(f"{key}: {value}" for key, value in settings.items())
    return f"type {shlex.quote(f'dataset={{{block}}}')} in its place"
