from __future__ import annotations

import hashlib
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.data.base import Split
from genssl.data.configs import FolderConfig
from genssl.data.folder import ImageFolder, held_out
from genssl.data.load import hold_out, left_out_note, load_dataset
from genssl.errors import DataError
from genssl.training.provenance import provenance


def write_image(path: Path, colour: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (12, 9)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def write_noise(path: Path) -> bytes:
    """Writes an image whose file is long enough to be cut in two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return path.read_bytes()


def png_that_claims_30000_x_30000() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(90))) + chunk(b"IEND", b"")


def config(root: Path, **settings: Any) -> FolderConfig:
    return FolderConfig(root=root, **{"image_size": 8, **settings})


def paths(dataset: ImageFolder, root: Path) -> list[str]:
    return [Path(path).relative_to(root).as_posix() for path in dataset._paths]


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    for name, count in {"cat": 30, "dog": 20, "eel": 2, "fox": 1}.items():
        for number in range(count):
            write_image(tmp_path / "zoo" / name / f"{number:02}.png", (number, count, 7))
    return tmp_path / "zoo"


# ---- rows and labels ----


def test_rows_are_in_the_order_of_their_paths_and_the_first_folder_is_the_class(tmp_path: Path) -> None:
    for name in ["b/2.png", "b/10.png", "a/z/deep/1.png", "a-c/1.png", "B/1.png", "a/1.png"]:
        write_image(tmp_path / "root" / name)
    write_image(tmp_path / "test" / "a" / "1.png")
    dataset = ImageFolder(config(tmp_path / "root", test_root=tmp_path / "test"), "train")
    assert paths(dataset, tmp_path / "root") == [
        "B/1.png", "a-c/1.png", "a/1.png", "a/z/deep/1.png", "b/10.png", "b/2.png",
    ]  # fmt: skip
    assert dataset.class_names == ["B", "a", "a-c", "b"]
    assert [dataset.label(row) for row in range(6)] == [0, 2, 1, 1, 3, 3]


def test_suffixes_have_any_case_and_other_and_hidden_files_are_ignored(tmp_path: Path) -> None:
    kept = ["a/1.JPG", "a/2.jpeg", "a/3.Png", "a/4.webp", "a/5.bmp", "a/6.tif", "a/7.TIFF"]
    for name in [*kept, "a/.6.png", ".git/7.png", "a/.thumbs/8.png", "a/9.gif"]:
        write_image(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "README.md").write_text("files that are no images may lie in root")
    train, test = (ImageFolder(config(tmp_path), split) for split in ("train", "test"))
    assert sorted(paths(train, tmp_path) + paths(test, tmp_path)) == kept


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    outside = write_image(tmp_path / "outside" / "1.png", (1, 2, 3))
    write_image(tmp_path / "outside" / "2.png", (4, 5, 6))
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "link.png").symlink_to(outside)
    (tmp_path / "root" / "b").symlink_to(tmp_path / "outside")
    dataset = ImageFolder(config(tmp_path / "root"), "train")
    both = paths(dataset, tmp_path / "root") + paths(ImageFolder(config(tmp_path / "root"), "test"), tmp_path / "root")
    assert sorted(both) == ["a/link.png", "b/1.png", "b/2.png"]
    assert dataset.image(0)[:, 0, 0].tolist() == [1, 2, 3]


def test_what_is_no_regular_file_is_ignored(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "1.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")  # reading it would wait for ever
    (tmp_path / "a" / "link.png").symlink_to(tmp_path / "a" / "pipe.png")
    assert paths(ImageFolder(config(tmp_path, on_corrupt="skip"), "train"), tmp_path) == ["a/1.png"]


def test_a_link_to_a_folder_above_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"a/loop is a link to a folder above it; remove the link"):
        ImageFolder(config(tmp_path), "train")


def test_without_labels_any_tree_will_do(tmp_path: Path) -> None:
    for name in ["1.png", "a/2.png", "b/c/3.png"]:
        write_image(tmp_path / name)
    dataset = ImageFolder(config(tmp_path, labels="none"), "train")
    assert dataset.class_names is None
    assert [dataset.label(row) for row in range(len(dataset))] == [-1] * len(dataset)


def test_an_image_outside_the_class_folders_is_refused(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png", "stray.png"):
        write_image(tmp_path / name)
    with pytest.raises(DataError, match=r"stray\.png lies directly in .*move it .*or set dataset\.labels: none"):
        ImageFolder(config(tmp_path), "train")


@pytest.mark.parametrize(
    ("names", "classes", "said"),
    [
        (["a/1.png", "a/2.png", "b/1.png"], ["a", "b"], "its 2 sub-folders are the classes"),
        (["1.png", "2.png"], None, "no sub-folders that could be classes, so no labels"),
        (["all/1.png", "all/2.png"], None, "no sub-folders that could be classes, so no labels"),
        (["1.png", "2.png", "more/3.png"], None, "no sub-folders that could be classes, so no labels"),
    ],
)
def test_labels_are_looked_for_and_what_was_found_is_said(tmp_path: Path, names, classes, said) -> None:
    for number, name in enumerate(names):
        write_image(tmp_path / name, (number, 0, 0))
    train, test = (ImageFolder(config(tmp_path), split) for split in ("train", "test"))
    assert (train.class_names, test.class_names) == (classes, classes)
    assert said in train.labels_note
    told = ImageFolder(config(tmp_path, labels="none"), "train")
    assert (told.class_names, told.labels_note) == (None, None)


# ---- pixels and names ----


def test_image_is_resized_and_cropped_and_stored_is_the_file(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = (50, 100, 200)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    dataset = load_dataset(config(tmp_path), "train")
    assert dataset.image(0).shape == (3, 8, 8)
    assert dataset.image(0).reshape(3, -1)[:, 9:-9].T.tolist() == [[50, 100, 200]] * 46
    data = (tmp_path / "a" / "1.png").read_bytes()
    assert (dataset.stored(0).data, dataset.stored(0).encoding) == (data, "file")
    assert dataset.source_id(0) == hashlib.blake2b(data, digest_size=16).digest()
    assert (dataset.name, dataset.image_size, dataset.skipped) == ("folder", 8, [])


@pytest.mark.parametrize("on_corrupt", ["fail", "skip"])
def test_source_id_is_read_from_the_file_once(tmp_path: Path, on_corrupt: str) -> None:
    path = write_image(tmp_path / "a" / "1.png")
    dataset = ImageFolder(config(tmp_path, on_corrupt=on_corrupt), "train")
    first = dataset.source_id(0)
    path.unlink()
    assert dataset.source_id(0) == first


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_of_any_colour_mode_are_rgb(tmp_path: Path, mode: str) -> None:
    (tmp_path / "a").mkdir()
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode).save(tmp_path / "a" / f"1.{suffix}")
    np.testing.assert_array_equal(ImageFolder(config(tmp_path), "train").image(0), np.full((3, 8, 8), 255))


def test_photos_are_upright(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left edge of the file is the top of the scene
    photo = Image.new("RGB", (32, 32), (255, 0, 0))
    photo.paste((0, 0, 255), (16, 0, 32, 32))
    photo.save(tmp_path / "a" / "1.jpg", exif=exif, quality=100)
    image = ImageFolder(config(tmp_path), "train").image(0).astype(int)
    np.testing.assert_allclose(image[:, 1, 4], [255, 0, 0], atol=10)
    np.testing.assert_allclose(image[:, 6, 4], [0, 0, 255], atol=10)


# ---- the split ----


def test_train_and_test_are_disjoint_and_together_everything(zoo: Path) -> None:
    train, test = (paths(ImageFolder(config(zoo), split), zoo) for split in ("train", "test"))
    everything = sorted(path.relative_to(zoo).as_posix() for path in zoo.rglob("*.png"))
    assert sorted(train + test) == everything
    assert set(train).isdisjoint(test)
    assert train == sorted(train)
    assert test == sorted(test)


def test_an_image_is_held_out_if_the_hash_of_its_path_says_so(zoo: Path) -> None:
    def position(path: str) -> float:
        return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=6).digest(), "big") / 2**48

    large = [f"{name}/{number:02}.png" for name, count in [("cat", 30), ("dog", 20)] for number in range(count)]
    expected = [path for path in large if position(path) < 0.2]
    test = paths(ImageFolder(config(zoo), "test"), zoo)
    assert [path for path in test if path.startswith(("cat", "dog"))] == expected
    cats = ["cat/05.png", "cat/12.png", "cat/13.png", "cat/15.png", "cat/24.png", "cat/29.png"]
    assert expected[:6] == cats  # pinned: a user's test images must be the same after an upgrade


def test_every_class_is_on_both_sides_where_it_can_be(zoo: Path) -> None:
    for fraction in (0.001, 0.999):
        train, test = (ImageFolder(config(zoo, test_fraction=fraction), split) for split in ("train", "test"))
        assert {train.label(row) for row in range(len(train))} == {0, 1, 2, 3}
        assert {test.label(row) for row in range(len(test))} == {0, 1, 2}  # the only fox is trained on
        assert train.class_names == test.class_names == ["cat", "dog", "eel", "fox"]
        assert min(len(train), len(test)) <= 4


def test_adding_images_moves_no_other_image(zoo: Path) -> None:
    before = set(paths(ImageFolder(config(zoo), "test"), zoo))
    for number in range(100, 150):
        write_image(zoo / "cat" / f"{number}.png")
    write_image(zoo / "aardvark" / "1.png")
    after = set(paths(ImageFolder(config(zoo), "test"), zoo))
    assert {path for path in after if len(path) == len("cat/00.png")} == before
    assert len(after) > len(before)


def test_the_test_images_are_the_same_with_and_without_labels(zoo: Path) -> None:
    labelled, unlabelled = (
        set(paths(ImageFolder(config(zoo, labels=labels), "test"), zoo)) for labels in ("subfolders", "none")
    )
    # Classes of one or two images are the exception: there a side would be empty.
    assert {path for path in labelled ^ unlabelled if path.startswith(("cat", "dog"))} == set()


def test_the_part_held_out_is_the_fraction() -> None:
    many = [f"a/{number}.png" for number in range(20_000)]
    assert len(held_out(many, 0.2)) == pytest.approx(4_000, abs=4 * (20_000 * 0.2 * 0.8) ** 0.5)
    assert set(held_out(many, 0.1)) < set(held_out(many, 0.2))
    assert set(held_out(many[::-1], 0.2)) == set(held_out(many, 0.2))


def test_nothing_can_be_held_out_of_single_images(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "1.png")
    write_image(tmp_path / "b" / "1.png")
    assert len(ImageFolder(config(tmp_path), "train")) == 2
    with pytest.raises(DataError, match=r"no class in .* has two images.*give dataset\.test_root"):
        ImageFolder(config(tmp_path), "test")


# ---- test_root ----


def test_test_root_is_the_whole_test_split_with_the_classes_of_root(zoo: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "test" / "dog" / "1.png")
    write_image(tmp_path / "test" / "fox" / "1.png")
    settings = config(zoo, test_root=tmp_path / "test")
    train, test = ImageFolder(settings, "train"), ImageFolder(settings, "test")
    assert len(train) == 53
    assert paths(test, tmp_path / "test") == ["dog/1.png", "fox/1.png"]
    assert [test.label(row) for row in range(2)] == [1, 3]
    assert test.class_names == train.class_names == ["cat", "dog", "eel", "fox"]


def test_a_class_that_was_never_trained_on_is_refused(zoo: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "test" / "dogs" / "1.png")
    settings = config(zoo, test_root=tmp_path / "test")
    with pytest.raises(DataError, match=r"test_root: .*class 'dogs' that dataset\.root has not; did you mean 'dog'"):
        ImageFolder(settings, "test")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("root", "test_root"), [(".", "."), (".", "cat"), ("cat", "."), (".", "cat/../dog")])
def test_overlapping_folders_are_refused(zoo: Path, split: Split, root: str, test_root: str) -> None:
    settings = config(zoo / root, test_root=zoo / test_root, labels="none")
    with pytest.raises(DataError, match=r"test_root: .* overlap, so test images would be trained on"):
        ImageFolder(settings, split)


def test_a_link_does_not_hide_that_folders_overlap(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(zoo / "cat")
    with pytest.raises(DataError, match="would be trained on"):
        ImageFolder(config(zoo, test_root=tmp_path / "link", labels="none"), "train")


# ---- what is missing ----


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"dataset\.root: {tmp_path}/nowhere does not exist; give the folder .*\.webp"):
        ImageFolder(config(tmp_path / "nowhere"), "train")


def test_a_missing_test_root_is_named(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.test_root: .*nowhere does not exist"):
        ImageFolder(config(zoo, test_root=tmp_path / "nowhere"), "test")


def test_a_file_is_no_root(tmp_path: Path) -> None:
    path = write_image(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"dataset\.root: .*1\.png is a file; give the folder"):
        ImageFolder(config(path), "train")


def test_a_root_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.gif").write_bytes(b"GIF89a")
    with pytest.raises(
        DataError, match=rf"dataset\.root: {tmp_path} has no images but 1 \.gif, which are not read; put"
    ):
        ImageFolder(config(tmp_path), "train")
    (tmp_path / "a" / "1.gif").unlink()
    with pytest.raises(DataError, match=rf"dataset\.root: {tmp_path} has no images; put files there \(\.jpg, "):
        ImageFolder(config(tmp_path), "train")


def test_images_that_are_not_read_are_named_and_counted_once(tmp_path: Path) -> None:
    for name in ["a/1.png", "a/2.png", "a/3.png", "a/4.png", "b/5.png", "b/6.png", "b/7.png", "b/8.png"]:
        write_image(tmp_path / name)
    for name in ["a/1.gif", "a/2.GIF", "b/deep/3.gif", "4.heic", "b/5.dng", ".6.gif", ".cache/7.gif"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"GIF89a")
    for name in ["a/notes.txt", "labels.csv", "meta.json", "README.md", "a/Thumbs.db", "b/archive.zip", "noname"]:
        (tmp_path / name).write_text("no image")
    train, test = (load_dataset(config(tmp_path), split) for split in ("train", "test"))
    expected = f"left out: 3 .gif, 1 .dng, 1 .heic, formats that are not read, such as {tmp_path}/4.heic"
    assert left_out_note(train) == left_out_note(train, test) == expected
    rest, part = hold_out(train, 0.5)
    assert left_out_note(rest, part) == expected
    assert provenance_of(train) == {"images": len(train), "skipped": [], "unread": "3 .gif, 1 .dng, 1 .heic"}


def provenance_of(dataset: Any) -> dict[str, Any]:
    recipe = load(Recipe, Path(__file__).resolve().parents[2] / "recipes" / "simclr_sd.yaml")
    said = provenance(recipe, dataset, None, torch.device("cpu"))["dataset"]
    return {name: said[name] for name in ("images", "skipped", "unread")}


def test_nothing_left_out_is_no_note(zoo: Path) -> None:
    assert left_out_note(ImageFolder(config(zoo), "train")) is None


# ---- corrupt files ----


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A folder with two good images and one of every kind of damage."""
    root = tmp_path / "damaged"
    write_image(root / "a" / "good_1.png", (1, 1, 1))
    write_image(root / "b" / "good_2.png", (2, 2, 2))
    for suffix in ("jpg", "png", "webp", "bmp"):
        path = root / "a" / f"truncated.{suffix}"
        data = write_noise(path)
        path.write_bytes(data[: len(data) // 2])
    (root / "a" / "text.png").write_text("this is not an image")
    (root / "a" / "empty.png").write_bytes(b"")
    (root / "a" / "huge.png").write_bytes(png_that_claims_30000_x_30000())
    Image.new("P", (8, 8)).save(root / "a" / "renamed_gif.png", "GIF")
    (root / "b" / "dangling.png").symlink_to(root / "nowhere.png")
    return root


BAD = [
    "a/empty.png", "a/huge.png", "a/renamed_gif.png", "a/text.png", "a/truncated.bmp", "a/truncated.jpg",
    "a/truncated.png", "a/truncated.webp", "b/dangling.png",
]  # fmt: skip


def test_skip_leaves_out_every_corrupt_file_and_lists_it(damaged: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "test" / "a" / "1.png")
    dataset = ImageFolder(config(damaged, on_corrupt="skip", test_root=tmp_path / "test"), "train")
    assert paths(dataset, damaged) == ["a/good_1.png", "b/good_2.png"]
    assert [Path(path).relative_to(damaged).as_posix() for path in dataset.skipped] == BAD
    assert [dataset.label(row) for row in range(2)] == [0, 1]
    assert [dataset.image(row)[0, 0, 0] for row in range(2)] == [1, 2]
    assert [dataset.source_id(row) for row in range(2)] == [
        hashlib.blake2b((damaged / name).read_bytes(), digest_size=16).digest()
        for name in ("a/good_1.png", "b/good_2.png")
    ]


def test_fail_names_the_corrupt_file_when_it_is_asked_for(damaged: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "test" / "a" / "1.png")
    dataset = ImageFolder(config(damaged, test_root=tmp_path / "test"), "train")
    assert dataset.skipped == []
    messages = {}
    for row, path in enumerate(paths(dataset, damaged)):
        try:
            dataset.image(row)
        except DataError as error:
            messages[path] = str(error)
    assert list(messages) == BAD
    for path, message in messages.items():
        assert message.startswith(f"{damaged / path}: ")
        assert message.endswith("or set dataset.on_corrupt: skip to leave such files out")


def test_skipping_does_not_move_images_between_the_splits(damaged: Path) -> None:
    for number in range(40):
        write_image(damaged / "a" / f"{number}.png")
    for split in ("train", "test"):
        everything = paths(ImageFolder(config(damaged), split), damaged)
        kept = paths(ImageFolder(config(damaged, on_corrupt="skip"), split), damaged)
        assert kept == [path for path in everything if path not in BAD]


def test_more_files_than_are_checked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genssl.data.files.CHECKED_AT_ONCE", 4)
    for number in range(10):
        write_image(tmp_path / "a" / f"{number}.png", (number, 0, 0))
    (tmp_path / "a" / "7.png").write_bytes(b"")
    dataset = ImageFolder(config(tmp_path, on_corrupt="skip", test_fraction=0.001), "train")
    kept = [int(Path(path).stem) for path in paths(dataset, tmp_path)]
    assert [int(dataset.image(row)[0, 0, 0]) for row in range(len(dataset))] == kept
    assert len(kept) == 8  # one is corrupt, one held out
    assert 7 not in kept


def test_skip_refuses_a_folder_with_nothing_but_corrupt_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"dataset folder: all 1 images .* are corrupt, such as .*a/1\.png"):
        ImageFolder(config(tmp_path, on_corrupt="skip"), "train")


def test_a_file_that_breaks_during_the_run_is_named_although_corrupt_files_are_skipped(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a" / "1.png")
    dataset = ImageFolder(config(tmp_path, on_corrupt="skip"), "train")
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"a/1\.png: .*another program has changed it since this run began"):
        dataset.image(0)


def test_a_file_with_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a" / "1.png")
    with path.open("r+b") as file:
        file.truncate(64 * 2**20 + 1)  # sparse: takes no space
    with pytest.raises(DataError, match=r"a/1\.png: the file has 67,108,865 bytes; the limit is 67,108,864"):
        ImageFolder(config(tmp_path), "train").stored(0)
