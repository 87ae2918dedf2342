"""Small data sets in torchvision's layouts: images, labels and splits are those of the official files."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from genssl.data.base import ImageDataset
from genssl.data.configs import (
    AircraftConfig,
    Cifar10Config,
    DownloadableConfig,
    DTDConfig,
    Flowers102Config,
    ImagenetteConfig,
    PetsConfig,
)
from genssl.data.load import load_dataset
from genssl.errors import DataError
from genssl.registry import DATASETS


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("there is no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def image(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 32), (grey, grey, grey)).save(path, quality=100, subsampling=0)


def lines(path: Path, *content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in content))


def build_dtd(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for grey, (name, part) in {10: ("dotted", "train"), 20: ("banded", "val"), 30: ("dotted", "test")}.items():
        image(root / f"dtd/dtd/images/{name}/{name}_{grey}.jpg", grey)
        lines(root / f"dtd/dtd/labels/{part}1.txt", f"{name}/{name}_{grey}.jpg")
    image(root / "dtd/dtd/images/banded/banded_25.jpg", 25)
    for part, other in (("train", "banded/banded_25.jpg"), ("val", "dotted/dotted_10.jpg")):
        path = root / f"dtd/dtd/labels/{part}1.txt"
        path.write_text(path.read_text() + f"{other}\n")
    lines(root / "dtd/dtd/labels/test1.txt", "dotted/dotted_30.jpg", "banded/banded_20.jpg")


def build_flowers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "flowers-102"
    for number in (1, 2, 3):
        image(folder / f"jpg/image_{number:05d}.jpg", 10 * number)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[5, 7, 5]])})
    savemat(folder / "setid.mat", {"trnid": [[1, 1]], "valid": [[2, 2]], "tstid": [[3, 3]]})
    files = {"image": ("102flowers.tgz", "")}
    for word, name in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        files[word] = (name, hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest())
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)


def build_pets(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "oxford-iiit-pet"
    for name, grey in (("Abyssinian_1", 10), ("beagle_1", 20), ("beagle_2", 30), ("Abyssinian_2", 40)):
        image(folder / f"images/{name}.jpg", grey)
    lines(folder / "annotations/trainval.txt", "Abyssinian_1 1 1 1", "beagle_1 2 2 1")
    lines(folder / "annotations/test.txt", "beagle_2 2 2 1", "Abyssinian_2 1 1 1")


def build_aircraft(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "fgvc-aircraft-2013b/data"
    for name in ("10", "20", "30"):
        image(folder / f"images/{name}.jpg", int(name))
    lines(folder / "variants.txt", "707-320", "A300 B4")
    lines(folder / "images_variant_trainval.txt", "10 A300 B4", "20 707-320")
    lines(folder / "images_variant_test.txt", "30 707-320")


def build_imagenette(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, wnid, grey in (
        ("train", "n01440764", 10),
        ("train", "n03028079", 20),
        ("val", "n03028079", 30),
        ("val", "n01440764", 40),
    ):
        image(root / f"imagenette2-160/{part}/{wnid}/{wnid}_{grey}.jpeg", grey)


# Config, builder, and (grey value, class) of the rows of train and test.
SETS = {
    "dtd": (
        DTDConfig,
        build_dtd,
        [(10, "dotted"), (25, "banded"), (20, "banded"), (10, "dotted")],
        [(30, "dotted"), (20, "banded")],
    ),
    "flowers102": (
        Flowers102Config,
        build_flowers,
        [(10, "english marigold"), (10, "english marigold"), (20, "moon orchid"), (20, "moon orchid")],
        [(30, "english marigold"), (30, "english marigold")],
    ),
    "pets": (PetsConfig, build_pets, [(10, "Abyssinian"), (20, "Beagle")], [(30, "Beagle"), (40, "Abyssinian")]),
    "aircraft": (AircraftConfig, build_aircraft, [(10, "A300 B4"), (20, "707-320")], [(30, "707-320")]),
    "imagenette": (
        ImagenetteConfig,
        build_imagenette,
        [(10, "tench, Tinca tinca"), (20, "church, church building")],
        [(40, "tench, Tinca tinca"), (30, "church, church building")],
    ),
}


def contents(dataset: ImageDataset) -> list[tuple[int, str]]:
    names = dataset.class_names
    assert names is not None
    return [(int(dataset.image(row)[0].mean().round()), names[dataset.label(row)]) for row in range(len(dataset))]


@pytest.mark.parametrize("name", SETS)
def test_images_labels_and_splits_are_the_official_ones(name, tmp_path, monkeypatch):
    config, build, train, test = SETS[name]
    build(tmp_path, monkeypatch)
    loaded = config(root=tmp_path, image_size=16)
    assert contents(load_dataset(loaded, "train")) == train
    assert contents(load_dataset(loaded, "test")) == test
    assert load_dataset(loaded, "train").image(0).shape == (3, 16, 16)
    assert DATASETS.config(name) is config


@pytest.mark.parametrize("name", SETS)
def test_an_absent_data_set_says_where_it_was_looked_for_and_how_to_get_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("GENSSL_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load_dataset(SETS[name][0](), "train")
    message = str(caught.value)
    assert f"is not in {tmp_path}; expected there: " in message
    assert 'download=True)", or set dataset.download: true' in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == [], "nothing is downloaded unless it is asked for"


@pytest.mark.parametrize("config", [DTDConfig, Cifar10Config])
def test_a_download_that_fails_is_one_sentence(config: type[DownloadableConfig], tmp_path):
    with pytest.raises(DataError, match=r"dataset.download: .* could not be fetched into .*; get it with: ") as caught:
        load_dataset(config(root=tmp_path / "new", download=True), "train")  # type: ignore[call-arg]
    assert "\n" not in str(caught.value)


def test_a_download_is_asked_for_only_where_files_are_missing(tmp_path, monkeypatch):
    build_dtd(tmp_path, monkeypatch)
    assert len(load_dataset(DTDConfig(root=tmp_path, download=True), "train")) == 4  # there is no network


def test_imagenette_refuses_a_test_split_whose_classes_have_other_numbers(tmp_path, monkeypatch):
    build_imagenette(tmp_path, monkeypatch)
    (tmp_path / "imagenette2-160/val/n01440764").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"train and .*val must have the same class folders; only one .* n01440764"):
        load_dataset(ImagenetteConfig(root=tmp_path), "test")
