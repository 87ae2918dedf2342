"""Public data sets on their official splits, laid out on disk as torchvision does it.

Where a validation part stands beside train and test, it is trained on, as in Kornblith et al. 2019 (arXiv 1805.08974).
Nothing is downloaded but with `download: true`. Every data set raises a DataError if files are missing or damaged, or
have other checksums than the official ones.
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

from torchvision import datasets

from genssl.data.base import Split
from genssl.data.configs import (
    Cifar10Config,
    Cifar100Config,
    DownloadableConfig,
    FileDatasetConfig,
    ImageNetConfig,
    ImagenetteConfig,
    INaturalist2018Config,
    Places365Config,
    Stl10Config,
)
from genssl.data.files import ArrayDataset, FileDataset
from genssl.errors import DataError


@dataclass(frozen=True)
class Layout:
    """What a data set looks like below its root."""

    title: str  # the data set, for people
    root: Path  # where it is looked for
    expected: Sequence[str]  # the files and folders that must be there, relative to root
    get: str  # how one gets it, as the end of a message
    fetch: Callable[[], object] | None = None  # gets it, where the config says `download: true`

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
    root = _root(config)
    arguments = "".join(f", {name}={value!r}" for name, value in part.items())
    command = _python(f"{kind.__name__}({str(root)!r}{arguments}, download=True)")
    fetch = (lambda: kind(root, **part, download=True)) if config.download else None
    return Layout(title, root, expected, f"get it with: {command}, or set dataset.download: true", fetch)


def _root(config: FileDatasetConfig) -> Path:
    return config.root.expanduser().absolute()


def _python(statement: str) -> str:
    return f'python -c "from torchvision.datasets import *; {statement}"'


class Cifar10(ArrayDataset):
    """CIFAR-10 (Krizhevsky 2009): 50,000 train and 10,000 test images, 32x32."""

    source_class: Any = datasets.CIFAR10
    title = "CIFAR-10"

    def __init__(self, config: Cifar10Config | Cifar100Config, split: Split) -> None:
        kind = self.source_class
        files = [kind.meta["filename"], *(name for name, _ in kind.train_list + kind.test_list)]
        layout = by_torchvision(self.title, config, [f"{kind.base_folder}/{name}" for name in files], kind)
        # The batches are pickles: torchvision loads them only after their md5 was found to be the official one.
        with layout.opening():
            source = kind(layout.root, train=split == "train")
        super().__init__(
            config.name, config.image_size, source.data.transpose(0, 3, 1, 2), source.targets, source.classes
        )


class Cifar100(Cifar10):
    """CIFAR-100 (Krizhevsky 2009) with its 100 fine classes: 50,000 train and 10,000 test images, 32x32."""

    source_class = datasets.CIFAR100
    title = "CIFAR-100"


class Stl10(ArrayDataset):
    """STL-10 (Coates et al. 2011): 5,000 train, 8,000 test and 100,000 unlabelled images, 96x96.

    With `unlabeled: true` the unlabelled images follow the labelled ones of the train split, with label -1.
    """

    def __init__(self, config: Stl10Config, split: Split) -> None:
        kind = datasets.STL10
        files = [kind.class_names_file, *(name for name, _ in kind.train_list + kind.test_list)]
        layout = by_torchvision("STL-10", config, [f"{kind.base_folder}/{name}" for name in files], kind)
        with layout.opening():
            source = kind(layout.root, split="train+unlabeled" if config.unlabeled and split == "train" else split)
        super().__init__(config.name, config.image_size, source.data, source.labels, source.classes)


@dataclass(frozen=True)
class Release:
    """A public data set whose splits torchvision's class reads by their names."""

    title: str  # the data set, for people
    kind: Any  # torchvision's class
    expected: Sequence[str]  # as in `Layout`; "{split}" stands for train or test
    parts: Sequence[str] = ("train",)  # of which the train split consists; the test split is "test"
    images: str = "_image_files"  # the attribute of `kind` that has the paths


RELEASES = {
    # Bossard et al. 2014: 75,750 train and 25,250 test images.
    "food101": Release("Food-101", datasets.Food101, ("food-101/meta/{split}.json", "food-101/images")),
    # Describable Textures (Cimpoi et al. 2014), partition 1: 3,760 train and 1,880 test images, 47 classes.
    "dtd": Release(
        "Describable Textures (DTD)", datasets.DTD, ("dtd/dtd/labels", "dtd/dtd/images"), parts=("train", "val")
    ),
    # Nilsback and Zisserman 2008: 2,040 train and 6,149 test images, 102 classes.
    "flowers102": Release(
        "Oxford Flowers (102 classes)",
        datasets.Flowers102,
        ("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
        parts=("train", "val"),
    ),
    # Parkhi et al. 2012: 3,680 train and 3,669 test images, 37 breeds.
    "pets": Release(
        "Oxford-IIIT Pets",
        datasets.OxfordIIITPet,
        ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations"),
        parts=("trainval",),
        images="_images",
    ),
    # Maji et al. 2013: 6,667 train and 3,333 test images, 100 variants.
    "aircraft": Release("FGVC-Aircraft", datasets.FGVCAircraft, ("fgvc-aircraft-2013b/data",), parts=("trainval",)),
}


class ReleasedFiles(FileDataset):
    """A data set of the table of releases."""

    def __init__(self, config: DownloadableConfig, split: Split) -> None:
        release = RELEASES[config.name]
        expected = [name.format(split=split) for name in release.expected]
        layout = by_torchvision(release.title, config, expected, release.kind)
        files: list[tuple[str, int]] = []
        classes: list[str] = []
        for part in release.parts if split == "train" else ("test",):
            with layout.opening():
                source = release.kind(layout.root, split=part)
                paths = map(str, getattr(source, release.images))
                files += zip(paths, map(int, source._labels), strict=True)
                classes = list(source.classes)
        super().__init__(config, files, classes)


class Places365(FileDataset):
    """Places365-Standard (Zhou et al. 2017): 1,803,460 train images; its 36,500 validation images are for testing."""

    def __init__(self, config: Places365Config, split: Split) -> None:
        kind, part = datasets.Places365, "train-standard" if split == "train" else "val"
        size = "256" if config.small else "large"
        images = f"data_{size}_standard" if split == "train" else f"val_{size}"
        expected = [kind._CATEGORIES_META[0], kind._FILE_LIST_META[part][0], images]
        layout = by_torchvision("Places365-Standard", config, expected, kind, split=part, small=config.small)
        with layout.opening():
            source = kind(layout.root, split=part, small=config.small)
        # source.classes is sorted by name; the labels follow the numbers in the file.
        class_names = sorted(source.class_to_idx, key=source.class_to_idx.__getitem__)
        super().__init__(config, source.imgs, class_names)


class Imagenette(FileDataset):
    """Imagenette (fast.ai): 9,469 train and 3,925 validation images of ten classes of ImageNet."""

    def __init__(self, config: ImagenetteConfig, split: Split) -> None:
        kind, part = datasets.Imagenette, "train" if split == "train" else "val"
        folder = "imagenette2" if config.size == "full" else f"imagenette2-{config.size.removesuffix('px')}"
        expected = [f"{folder}/train", f"{folder}/val"]
        layout = by_torchvision("Imagenette", config, expected, kind, split=part, size=config.size)
        with layout.opening():
            source = kind(layout.root, split=part, size=config.size)
        train, val = (_class_folders(layout.root / name) for name in expected)
        _check_equal(layout.root, expected, train, val)
        super().__init__(config, source._samples, _joined(source.classes))


class ImageNet(FileDataset):
    """ImageNet-1k (ILSVRC 2012): 1,281,167 train images; the 50,000 validation images are the test split.

    A part of it without the official list of classes, such as most copies of ImageNet-100, is for `folder`.

    Raises:
        DataError: also if train/ and val/ do not have the same class folders.
    """

    def __init__(self, config: ImageNetConfig, split: Split) -> None:
        root, folder = _root(config), "train" if split == "train" else "val"
        get = (
            f"ask for access at image-net.org, put ILSVRC2012_devkit_t12.tar.gz and ILSVRC2012_img_{folder}.tar there, "
            f"and unpack them with: {_python(f'ImageNet({str(root)!r}, split={folder!r})')}"
        )
        train = _class_folders(root / "train")
        if train:
            get += f". Its {len(train)} class folders can be read without meta.bin too: {_as_folder(config, root)}"
        with Layout("ImageNet-1k", root, ["meta.bin", folder], get).opening():
            source = datasets.ImageNet(root, split=folder)
            if train and split == "test":
                _check_equal(root, ["train", folder], train, set(source.wnids))
        super().__init__(config, source.samples, _joined(source.classes))


def _class_folders(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*/")}


def _check_equal(root: Path, names: Sequence[str], train: set[str], val: set[str]) -> None:
    """Raises DataError for other class folders: torchvision numbers those it finds, so a number is another class."""
    if differing := sorted(train ^ val):
        raise DataError(
            f"dataset.root: {root / names[0]} and {root / names[1]} must have the same class folders; only one of "
            f"them has {differing[0]} ({len(differing)} differ)"
        )


def _joined(classes: Sequence[Sequence[str]]) -> list[str]:
    return [", ".join(synonyms) for synonyms in classes]


def _as_folder(config: ImageNetConfig, root: Path) -> str:
    """Returns what one types to read train/ and val/ below root by the data set `folder`."""
    roots = {"root": "train"} | ({"test_root": "val"} if _class_folders(root / "val") else {})
    settings = {"name": "folder", **{key: json.dumps(str(root / name)) for key, name in roots.items()}}
    settings |= {"image_size": str(config.image_size), "on_corrupt": config.on_corrupt}
    block = ", ".join(f"{key}: {value}" for key, value in settings.items())
    return f"type {shlex.quote(f'dataset={{{block}}}')} in its place"


class INaturalist2018(FileDataset):
    """iNaturalist 2018 (Van Horn et al.): 437,513 train images; the 24,426 validation images are the test split.

    torchvision's INaturalist class knows no 2018 splits, so the official lists are read here. They obfuscate the names
    of the species; the official categories.json, if it lies beside them, gives the real ones.
    """

    def __init__(self, config: INaturalist2018Config, split: Split) -> None:
        root = _root(config)
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
