"""Settings of the data sets. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from genssl.config.base import ComponentConfig

ROOT = "GENSSL_DATA"
WHERE = "folder that holds the data set; by default $GENSSL_DATA, or data"


def public_data(folder: str = "") -> Path:
    """Returns where public data sets are looked for: the environment's GENSSL_DATA, or `data`; or a folder in it."""
    return Path(os.environ.get(ROOT) or "data") / folder


class DigitsConfig(ComponentConfig):
    """scikit-learn's digits have no settings: 8x8 pixels, a fixed stratified split of 1,437 train and 360 test rows."""

    name: Literal["digits"] = "digits"


class FileDatasetConfig(ComponentConfig):
    """What all data sets on disk have in common."""

    root: Path = Field(description="folder that holds the data set")
    image_size: int = Field(
        32,
        ge=8,
        le=2048,
        description="pixels of the square views, which are cropped from the whole image; what is evaluated is resized "
        "(short side) and centre-cropped to this many",
    )
    on_corrupt: Literal["fail", "skip"] = Field(
        "fail", description="an image that cannot be decoded ends the run, or is left out and counted"
    )


class FolderConfig(FileDatasetConfig):
    """A tree of one's own images."""

    name: Literal["folder"] = "folder"
    labels: Literal["auto", "subfolders", "none"] = Field(
        "auto",
        description="subfolders: the first folder below root is the class; auto: that if there are two or more, or "
        "else none",
    )
    test_root: Path | None = Field(None, description="folder of test images; by default a part of root is held out")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="part held out for testing when there is no test_root")


class DownloadableConfig(FileDatasetConfig):
    """A public data set that torchvision can fetch."""

    root: Path = Field(default_factory=public_data, description=WHERE)
    download: bool = Field(False, description="fetch the data set into root if it is not there")


class Cifar10Config(DownloadableConfig):
    """CIFAR-10 in torchvision's layout."""

    name: Literal["cifar10"] = "cifar10"


class Cifar100Config(DownloadableConfig):
    """CIFAR-100 in torchvision's layout."""

    name: Literal["cifar100"] = "cifar100"


class Stl10Config(DownloadableConfig):
    """STL-10 in torchvision's layout."""

    name: Literal["stl10"] = "stl10"
    image_size: int = Field(96, ge=8, le=2048)
    unlabeled: bool = Field(
        False, description="pretrain on the 100,000 unlabelled images too; they are never used by evaluators"
    )


class Food101Config(DownloadableConfig):
    """Food-101 in torchvision's layout."""

    name: Literal["food101"] = "food101"
    image_size: int = Field(224, ge=8, le=2048)


class Places365Config(DownloadableConfig):
    """Places365-Standard in torchvision's layout; the test split is the official validation split."""

    name: Literal["places365"] = "places365"
    root: Path = Field(default_factory=lambda: public_data("places365"), description=f"{WHERE}/places365")
    image_size: int = Field(224, ge=8, le=2048)
    small: bool = Field(True, description="the 256x256 version of the files")


class INaturalist2018Config(FileDatasetConfig):
    """iNaturalist 2018; train2018.json, val2018.json and train_val2018/ lie below root.

    The test split is the official validation split.
    """

    name: Literal["inaturalist2018"] = "inaturalist2018"
    root: Path = Field(default_factory=lambda: public_data("inaturalist2018"), description=f"{WHERE}/inaturalist2018")
    image_size: int = Field(224, ge=8, le=2048)


class ImageNetConfig(FileDatasetConfig):
    """ImageNet-1k in torchvision's layout; the test split is the official validation split."""

    name: Literal["imagenet"] = "imagenet"
    root: Path = Field(default_factory=lambda: public_data("imagenet"), description=f"{WHERE}/imagenet")
    image_size: int = Field(224, ge=8, le=2048)


class DTDConfig(DownloadableConfig):
    """Describable Textures in torchvision's layout, partition 1; its validation part is trained on."""

    name: Literal["dtd"] = "dtd"
    image_size: int = Field(224, ge=8, le=2048)


class Flowers102Config(DownloadableConfig):
    """Oxford Flowers in torchvision's layout; its validation part is trained on."""

    name: Literal["flowers102"] = "flowers102"
    image_size: int = Field(224, ge=8, le=2048)


class PetsConfig(DownloadableConfig):
    """Oxford-IIIT Pets in torchvision's layout."""

    name: Literal["pets"] = "pets"
    image_size: int = Field(224, ge=8, le=2048)


class AircraftConfig(DownloadableConfig):
    """FGVC-Aircraft in torchvision's layout, by its 100 variants."""

    name: Literal["aircraft"] = "aircraft"
    image_size: int = Field(224, ge=8, le=2048)


class ImagenetteConfig(DownloadableConfig):
    """Imagenette, ten classes of ImageNet, in torchvision's layout; the test split is its validation split."""

    name: Literal["imagenette"] = "imagenette"
    image_size: int = Field(128, ge=8, le=2048)
    size: Literal["full", "320px", "160px"] = Field("160px", description="short side of the files")
