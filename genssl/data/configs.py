"""Settings of the data sets. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from genssl.config.base import ComponentConfig


class DigitsConfig(ComponentConfig):
    """scikit-learn's digits have no settings: 8x8 pixels, a fixed stratified split of 1,437 train and 360 test rows."""

    name: Literal["digits"] = "digits"


class FileDatasetConfig(ComponentConfig):
    """What all data sets on disk have in common."""

    root: Path = Field(description="folder that holds the data set")
    image_size: int = Field(
        32, ge=8, le=2048, description="images are resized (short side) and centre-cropped to this many pixels"
    )
    on_corrupt: Literal["fail", "skip"] = Field(
        "fail", description="an image that cannot be decoded ends the run, or is left out and counted"
    )


class FolderConfig(FileDatasetConfig):
    """A tree of one's own images."""

    name: Literal["folder"] = "folder"
    labels: Literal["subfolders", "none"] = Field(
        "subfolders", description="subfolders: the first folder below root is the class"
    )
    test_root: Path | None = Field(None, description="folder of test images; by default a part of root is held out")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="part held out for testing when there is no test_root")


class Cifar10Config(FileDatasetConfig):
    """CIFAR-10 in torchvision's layout."""

    name: Literal["cifar10"] = "cifar10"


class Cifar100Config(FileDatasetConfig):
    """CIFAR-100 in torchvision's layout."""

    name: Literal["cifar100"] = "cifar100"


class Stl10Config(FileDatasetConfig):
    """STL-10 in torchvision's layout."""

    name: Literal["stl10"] = "stl10"
    image_size: int = Field(96, ge=8, le=2048)
    unlabeled: bool = Field(
        False, description="pretrain on the 100,000 unlabelled images too; they are never used by evaluators"
    )


class Food101Config(FileDatasetConfig):
    """Food-101 in torchvision's layout."""

    name: Literal["food101"] = "food101"
    image_size: int = Field(224, ge=8, le=2048)


class Places365Config(FileDatasetConfig):
    """Places365-Standard in torchvision's layout; the test split is the official validation split."""

    name: Literal["places365"] = "places365"
    image_size: int = Field(224, ge=8, le=2048)
    small: bool = Field(True, description="the 256x256 version of the files")


class INaturalist2018Config(FileDatasetConfig):
    """iNaturalist 2018; train2018.json, val2018.json and train_val2018/ lie below root.

    The test split is the official validation split.
    """

    name: Literal["inaturalist2018"] = "inaturalist2018"
    image_size: int = Field(224, ge=8, le=2048)


class ImageNetConfig(FileDatasetConfig):
    """ImageNet-1k in torchvision's layout; the test split is the official validation split."""

    name: Literal["imagenet"] = "imagenet"
    image_size: int = Field(224, ge=8, le=2048)
