from __future__ import annotations

import hashlib
import json
import pickle
import shlex
import shutil
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.data.base import ImageDataset, Split, UInt8Array
from genssl.data.configs import (
    Cifar10Config,
    Cifar100Config,
    FileDatasetConfig,
    FolderConfig,
    Food101Config,
    ImageNetConfig,
    INaturalist2018Config,
    Places365Config,
    Stl10Config,
)
from genssl.data.load import load_dataset
from genssl.errors import DataError

MakeConfig = Callable[..., FileDatasetConfig]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a data set must never be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def write_image(path: Path, colour: tuple[int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 32), colour).save(path, quality=100, subsampling=0)
    return path


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def contents(dataset: ImageDataset) -> list[tuple[int, str]]:
    """(grey value, name of the class) of every row; the builders give every image another grey."""
    assert dataset.class_names is not None
    names = [*dataset.class_names, "none"]  # label -1
    return [(int(dataset.image(row)[0].mean().round()), names[dataset.label(row)]) for row in range(len(dataset))]


# ---- small data sets in the official layouts ----


def build_cifar(kind: Any, root: Path, monkeypatch: pytest.MonkeyPatch, labels: str, names: str) -> None:
    """Two images a batch; torchvision's checksums are exchanged for those of the small batches."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def write(name: str, content: object) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return md5(folder / name)

    lists: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    batches = [(part, name) for part in ("train_list", "test_list") for name, _ in getattr(kind, part)]
    for number, (part, name) in enumerate(batches):
        greys = [10 * number, 10 * number + 5]
        pixels = np.repeat(np.array(greys, np.uint8)[:, None], 3072, axis=1)
        lists[part].append([name, write(name, {"data": pixels, labels: [number % 3, 2]})])
    meta = {**kind.meta, "md5": write(kind.meta["filename"], {names: ["ant", "bee", "cow"]})}
    for name, value in {**lists, "meta": meta}.items():
        monkeypatch.setattr(kind, name, value)


def build_stl10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)

    def write(name: str, array: UInt8Array) -> list[str]:
        array.tofile(folder / name)
        return [name, md5(folder / name)]

    def flat(*greys: int) -> UInt8Array:
        return np.repeat(np.array(greys, np.uint8)[:, None], 3 * 96 * 96, axis=1)

    def classes(*numbers: int) -> UInt8Array:  # STL-10 counts from 1
        return np.array(numbers, np.uint8)

    train = [write("train_X.bin", flat(1, 2, 3)), write("train_y.bin", classes(2, 1, 3))]
    test = [write("test_X.bin", flat(11, 12)), write("test_y.bin", classes(3, 1))]
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")
    monkeypatch.setattr(datasets.STL10, "train_list", [*train, write("unlabeled_X.bin", flat(21, 22))])
    monkeypatch.setattr(datasets.STL10, "test_list", test)


def build_food101(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "food-101"
    write_json(folder / "meta" / "train.json", {"waffles": ["waffles/7", "waffles/3"], "baklava": ["baklava/5"]})
    write_json(folder / "meta" / "test.json", {"waffles": ["waffles/9"], "baklava": ["baklava/2"]})
    for name in ("waffles/7", "waffles/3", "baklava/5", "waffles/9", "baklava/2"):
        grey = int(name[-1]) * 10
        write_image(folder / "images" / f"{name}.jpg", (grey, grey, grey))


def build_places365(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = datasets.Places365
    root.mkdir()
    files = {
        # Numbers that are not in the order of the names.
        "categories_places365.txt": "/b/beach 0\n/a/airfield 2\n/a/alley 1\n",
        "places365_train_standard.txt": "/b/beach/1.jpg 0\n/a/airfield/2.jpg 2\n/a/alley/3.jpg 1\n",
        "places365_val.txt": "Places365_val_4.jpg 2\nPlaces365_val_5.jpg 0\n",
    }
    for name, text in files.items():
        (root / name).write_text(text)
    for path in ("data_256_standard/b/beach/1.jpg", "data_256_standard/a/airfield/2.jpg",
                 "data_256_standard/a/alley/3.jpg", "val_256/Places365_val_4.jpg", "val_256/Places365_val_5.jpg",
                 "val_large/Places365_val_4.jpg", "val_large/Places365_val_5.jpg"):  # fmt: skip
        grey = int(Path(path).stem[-1]) * 10 + (100 if "large" in path else 0)
        write_image(root / path, (grey, grey, grey))
    lists = {
        "train-standard": ("places365_train_standard.txt", md5(root / "places365_train_standard.txt")),
        "val": ("places365_val.txt", md5(root / "places365_val.txt")),
    }
    monkeypatch.setattr(kind, "_FILE_LIST_META", lists)
    categories = root / "categories_places365.txt"
    monkeypatch.setattr(kind, "_CATEGORIES_META", (categories.name, md5(categories)))


def build_inaturalist(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    categories = [{"id": 7, "name": "0007"}, {"id": 3, "name": "0003"}]
    images = {"train": [(100, 7, "Aves/7/10.jpg"), (101, 3, "Fungi/3/20.jpg")], "val": [(200, 7, "Aves/7/30.jpg")]}
    for part, rows in images.items():
        listing = {
            "images": [{"id": image, "file_name": f"train_val2018/{name}"} for image, _, name in rows],
            # In another order than the images.
            "annotations": [{"id": 1, "image_id": image, "category_id": kind} for image, kind, _ in rows[::-1]],
            "categories": categories,
        }
        write_json(root / f"{part}2018.json", listing)
        for _, _, name in rows:
            grey = int(Path(name).stem)
            write_image(root / "train_val2018" / name, (grey, grey, grey))


def build_imagenet(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"n02": ("crane", "bird"), "n01": ("tench", "Tinca tinca")}
    for part, start in (("train", 10), ("val", 30)):
        for number, wnid in enumerate(sorted(names)):
            grey = start + 10 * number
            write_image(root / part / wnid / f"{wnid}_{grey}.JPEG", (grey, grey, grey))
    torch.save((names, ["n01", "n02"]), root / "meta.bin")


def build_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_cifar(datasets.CIFAR10, root, monkeypatch, "labels", "label_names")


def build_cifar100(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_cifar(datasets.CIFAR100, root, monkeypatch, "fine_labels", "fine_label_names")


Expected = list[tuple[int, str]]
SETS: dict[str, tuple[MakeConfig, Callable[[Path, pytest.MonkeyPatch], None], Expected, Expected, list[str]]] = {
    "cifar10": (
        Cifar10Config,
        build_cifar10,
        [(0, "ant"), (5, "cow"), (10, "bee"), (15, "cow"), (20, "cow"), (25, "cow"), (30, "ant"), (35, "cow"),
         (40, "bee"), (45, "cow")],
        [(50, "cow"), (55, "cow")],
        ["ant", "bee", "cow"],
    ),
    "cifar100": (
        Cifar100Config,
        build_cifar100,
        [(0, "ant"), (5, "cow")],
        [(10, "bee"), (15, "cow")],
        ["ant", "bee", "cow"],
    ),
    "stl10": (
        Stl10Config,
        build_stl10,
        [(1, "bird"), (2, "airplane"), (3, "car")],
        [(11, "car"), (12, "airplane")],
        ["airplane", "bird", "car"],
    ),
    "food101": (
        Food101Config,
        build_food101,
        [(70, "waffles"), (30, "waffles"), (50, "baklava")],
        [(90, "waffles"), (20, "baklava")],
        ["baklava", "waffles"],
    ),
    "places365": (
        Places365Config,
        build_places365,
        [(10, "/b/beach"), (20, "/a/airfield"), (30, "/a/alley")],
        [(40, "/a/airfield"), (50, "/b/beach")],
        ["/b/beach", "/a/alley", "/a/airfield"],
    ),
    "inaturalist2018": (
        INaturalist2018Config,
        build_inaturalist,
        [(10, "0007"), (20, "0003")],
        [(30, "0007")],
        ["0003", "0007"],
    ),
    "imagenet": (
        ImageNetConfig,
        build_imagenet,
        [(10, "tench, Tinca tinca"), (20, "crane, bird")],
        [(30, "tench, Tinca tinca"), (40, "crane, bird")],
        ["tench, Tinca tinca", "crane, bird"],
    ),
}  # fmt: skip

# What the message about an absent data set must say: expected files of the train split, and how to get them.
ABSENT = {
    "cifar10": ["cifar-10-batches-py/data_batch_5", "cifar-10-batches-py/test_batch", "CIFAR10('{root}', download"],
    "cifar100": ["cifar-100-python/train", "cifar-100-python/meta", "CIFAR100('{root}', download=True)"],
    "stl10": ["stl10_binary/unlabeled_X.bin", "stl10_binary/class_names.txt", "STL10('{root}', download=True)"],
    "food101": ["food-101/meta/train.json", "food-101/images", "Food101('{root}', download=True)"],
    "places365": ["categories_places365.txt", "places365_train_standard.txt", "data_256_standard",
                  "Places365('{root}', split='train-standard', small=True, download=True)"],
    "inaturalist2018": ["train2018.json", "train_val2018", "github.com/visipedia/inat_comp"],
    "imagenet": ["meta.bin", "train", "image-net.org", "ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar",
                 "ImageNet('{root}', split='train')"],
}  # fmt: skip

FIRST_FILES = {
    "food101": {"train": "food-101/images/waffles/7.jpg", "test": "food-101/images/waffles/9.jpg"},
    "places365": {"train": "data_256_standard/b/beach/1.jpg", "test": "val_256/Places365_val_4.jpg"},
    "inaturalist2018": {"train": "train_val2018/Aves/7/10.jpg", "test": "train_val2018/Aves/7/30.jpg"},
    "imagenet": {"train": "train/n01/n01_10.JPEG", "test": "val/n01/n01_30.JPEG"},
}

every_set = pytest.mark.parametrize("name", SETS)


def build(name: str, root: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> FileDatasetConfig:
    make_config, builder, *_ = SETS[name]
    builder(root, monkeypatch)
    return make_config(root=root, **{"image_size": 16, **settings})


# ---- all sets ----


@every_set
def test_splits_labels_and_class_names_are_the_official_ones(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build(name, tmp_path / "root", monkeypatch)
    _, _, train, test, class_names = SETS[name]
    assert contents(load_dataset(config, "train")) == train
    assert contents(load_dataset(config, "test")) == test
    for split in ("train", "test"):
        dataset = load_dataset(config, split)
        assert (dataset.name, dataset.class_names) == (name, class_names)
        assert (dataset.image_size, dataset.skipped) == (16, [])


@every_set
def test_images_are_rgb_of_the_size_that_was_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load_dataset(build(name, tmp_path / "root", monkeypatch, image_size=24), "train")
    assert dataset.image(0).shape == (3, 24, 24)
    assert dataset.image(0).dtype == np.uint8
    assert dataset.image(0).flags.c_contiguous


@every_set
def test_source_ids_are_digests_of_what_is_stored(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_dataset(build(name, tmp_path / "root", monkeypatch), "test")
    if name in FIRST_FILES:
        data = (tmp_path / "root" / FIRST_FILES[name]["test"]).read_bytes()
    else:
        grey, size = SETS[name][3][0][0], 96 if name == "stl10" else 32
        data = f"uint8[3,{size},{size}]".encode() + bytes([grey]) * (3 * size * size)
    assert dataset.source_id(0) == hashlib.blake2b(data, digest_size=16).digest()


@every_set
def test_an_absent_set_says_where_what_and_how_to_get_it(name: str, tmp_path: Path) -> None:
    root = tmp_path / "absent"
    with pytest.raises(DataError) as caught:
        load_dataset(SETS[name][0](root=root), "train")
    message = str(caught.value)
    assert f"is not in {root}; expected there: " in message
    assert "(missing: all)" in message
    for part in ABSENT[name]:
        assert part.replace("{root}", str(root)) in message
    assert "\n" not in message
    assert not root.exists()  # nothing was made or fetched


@every_set
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_is_missing_is_named(name: str, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    config = build(name, root, monkeypatch)
    with pytest.raises(DataError) as caught:
        load_dataset(config.model_copy(update={"root": tmp_path / "absent"}), split)
    expected = str(caught.value).split("expected there: ")[1].split(" (missing")[0].split(", ")
    for part in expected:
        assert (root / part).exists(), "every file that the message asks for is one that the data set has"
    (root / expected[0]).rename(root / "elsewhere")
    with pytest.raises(DataError, match=rf"\(missing: {expected[0]}\)"):
        load_dataset(config, split)


# ---- sets of arrays ----


@pytest.mark.parametrize(
    ("name", "file"), [("cifar10", "cifar-10-batches-py/data_batch_3"), ("cifar10", "cifar-10-batches-py/batches.meta"),
                       ("cifar100", "cifar-100-python/test"), ("stl10", "stl10_binary/train_y.bin")]
)  # fmt: skip
def test_files_with_another_checksum_are_never_opened(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build(name, tmp_path / "root", monkeypatch)

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "the pickle was loaded",)

    (tmp_path / "root" / file).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match=r"is damaged or not the official release \(RuntimeError: .*; repair it, or"):
        load_dataset(config, "train")
    assert not (tmp_path / "the pickle was loaded").exists()


def test_cifar_pixels_are_channels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build("cifar100", tmp_path / "root", monkeypatch, image_size=32)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    path = tmp_path / "root" / "cifar-100-python" / "train"
    path.write_bytes(pickle.dumps({"data": pixels.reshape(2, -1), "fine_labels": [1, 0]}))
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", md5(path)]])
    dataset = load_dataset(config, "train")
    np.testing.assert_array_equal(np.stack([dataset.image(0), dataset.image(1)]), pixels)
    assert dataset.stored(1).data == pixels[1].tobytes()


def test_stl10_pixels_are_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build("stl10", tmp_path / "root", monkeypatch, image_size=96)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)
    path = tmp_path / "root" / "stl10_binary" / "train_X.bin"
    pixels.transpose(0, 1, 3, 2).tofile(path)  # the files hold columns, "column-major order" in the official text
    monkeypatch.setattr(datasets.STL10, "train_list", [["train_X.bin", md5(path)], *datasets.STL10.train_list[1:]])
    dataset = load_dataset(config, "train")
    np.testing.assert_array_equal(dataset.image(2), pixels[2])
    assert dataset.stored(2).data == pixels[2].tobytes()


def test_stl10_adds_the_unlabelled_images_to_the_train_split_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build("stl10", tmp_path / "root", monkeypatch, unlabeled=True)
    _, _, train, test, _ = SETS["stl10"]
    assert contents(load_dataset(config, "train")) == [*train, (21, "none"), (22, "none")]
    assert contents(load_dataset(config, "test")) == test


# ---- sets of files ----


@pytest.mark.parametrize("name", FIRST_FILES)
def test_corrupt_files_are_skipped_or_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build(name, tmp_path / "root", monkeypatch)
    whole = load_dataset(config, "train")
    path = tmp_path / "root" / FIRST_FILES[name]["train"]
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=rf"{path}: the image is corrupt: .*on_corrupt: skip"):
        whole.image(0)
    skipping = load_dataset(config.model_copy(update={"on_corrupt": "skip"}), "train")
    assert skipping.skipped == [str(path)]
    assert contents(skipping) == SETS[name][2][1:]


def test_a_file_that_the_list_names_and_the_disk_has_not_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load_dataset(build("food101", tmp_path / "root", monkeypatch), "train")
    path = tmp_path / "root" / "food-101" / "images" / "waffles" / "3.jpg"
    path.unlink()
    with pytest.raises(DataError, match=rf"{path}: the file cannot be read \(No such file or directory\)"):
        dataset.image(1)


def test_places365_reads_the_large_files_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build("places365", tmp_path / "root", monkeypatch, small=False)
    assert contents(load_dataset(config, "test")) == [(140, "/a/airfield"), (150, "/b/beach")]
    with pytest.raises(DataError, match=r"\(missing: data_large_standard\).*small=False"):
        load_dataset(config, "train")


def test_inaturalist_takes_the_released_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build("inaturalist2018", tmp_path / "root", monkeypatch)
    write_json(tmp_path / "root" / "categories.json", [{"id": 3, "name": "Boletus"}, {"id": 7, "name": "Corvus"}])
    dataset = load_dataset(config, "train")
    assert contents(dataset) == [(10, "Corvus"), (20, "Boletus")]


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [], "categories": []}']
)
def test_a_list_that_is_no_list_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build("inaturalist2018", tmp_path / "root", monkeypatch)
    (tmp_path / "root" / "train2018.json").write_text(text)
    with pytest.raises(DataError, match=r"iNaturalist 2018 in .* is damaged or not the official release"):
        load_dataset(config, "train")


def test_an_empty_list_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build("inaturalist2018", tmp_path / "root", monkeypatch)
    write_json(tmp_path / "root" / "train2018.json", {"images": [], "annotations": [], "categories": []})
    with pytest.raises(DataError, match=r"dataset inaturalist2018: .*root has no images for this split"):
        load_dataset(config, "train")


def test_imagenet_refuses_a_test_split_whose_classes_have_other_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build("imagenet", tmp_path / "root", monkeypatch)
    (tmp_path / "root" / "val" / "n01").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"must have the same class folders; only one of them has n01 \(1 differ\)"):
        load_dataset(config, "test")


def test_a_part_of_imagenet_with_the_official_list_keeps_its_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build("imagenet", tmp_path, monkeypatch)
    wnids = ["n00", "n01", "n02"]
    torch.save(({wnid: (wnid,) for wnid in wnids}, wnids), tmp_path / "meta.bin")  # the first has no folder
    data = load_dataset(config, "train")
    assert {data.label(row) for row in range(len(data))} == {0, 1}
    assert data.class_names == ["n01", "n02"]


@pytest.mark.parametrize("with_val", [True, False])
def test_a_part_of_imagenet_is_pointed_to_the_data_set_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, with_val: bool
) -> None:
    root = tmp_path / "image net's, 100"
    config = build("imagenet", root, monkeypatch, image_size=24, on_corrupt="skip")
    (root / "meta.bin").unlink()
    for wnid in ("n01", "n02"):
        write_image(root / "train" / wnid / "more.JPEG", (7, 7, 7))
    if not with_val:
        shutil.rmtree(root / "val")
    with pytest.raises(DataError, match="2 class folders") as caught:
        load_dataset(config, "train")
    (typed,) = [word for word in shlex.split(str(caught.value).partition("type ")[2]) if word.startswith("dataset=")]
    recipe = load(Recipe, Path(__file__).resolve().parents[2] / "recipes" / "imagenet" / "simclr.yaml", [typed])
    assert isinstance(recipe.dataset, FolderConfig)
    assert (recipe.dataset.image_size, recipe.dataset.on_corrupt) == (24, "skip")
    assert recipe.dataset.test_root == (root / "val" if with_val else None)
    for split, greys in ("train", {7, 10, 20}), ("test", {30, 40} if with_val else {7, 10, 20}):
        data = load_dataset(recipe.dataset, split)  # type: ignore[arg-type]
        assert data.class_names == ["n01", "n02"]
        found = {(round(float(data.image(row).mean())), data.label(row)) for row in range(len(data))}
        assert {grey for grey, _ in found} <= greys
        if with_val:
            assert found == {(grey, label) for grey, label in ((10, 0), (20, 1), (7, 0), (7, 1), (30, 0), (40, 1))
                             if grey in greys}  # fmt: skip


def test_imagenet_archives_are_not_unpacked_by_a_run(tmp_path: Path) -> None:
    for name in ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar"):
        with tarfile.open(tmp_path / name, "w"):
            pass
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"\(missing: all\).*and unpack them with: python -c"):
        load_dataset(ImageNetConfig(root=tmp_path), "train")
    assert sorted(tmp_path.iterdir()) == before


def test_imagenet_class_list_that_would_run_code_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build("imagenet", tmp_path / "root", monkeypatch)

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "the pickle was loaded",)

    torch.save(Bomb(), tmp_path / "root" / "meta.bin")
    with pytest.raises(DataError, match=r"ImageNet-1k in .* is damaged or not the official release"):
        load_dataset(config, "train")
    assert not (tmp_path / "the pickle was loaded").exists()
