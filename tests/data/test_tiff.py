"""TIFF files as scanners, microscopes and cameras write them, and ones just above the limits."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genssl.data.base import StoredImage, UInt8Array
from genssl.data.configs import FolderConfig
from genssl.data.decode import MOST_PARTS, count_pixels, decode
from genssl.data.folder import ImageFolder
from genssl.errors import DataError

RANDOM = np.random.default_rng(5)
PHOTO: UInt8Array = RANDOM.integers(0, 256, (12, 17, 3), dtype=np.uint8)
DEEP = RANDOM.integers(0, 65536, (12, 17)).astype(np.uint16)


def tiff(image: Image.Image, **options: object) -> StoredImage:
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", **options)
    return StoredImage(buffer.getvalue(), "file")


def written(pixels: bytes, width: int, height: int, bits: int, order: str = "<", **tags: int) -> StoredImage:
    """A grey TIFF of one strip, written by hand: Pillow writes none of 12 bits, and none in which zero is white."""
    places = {"photometric": 262, "tile_width": 322, "tile_height": 323}
    values = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: height, 279: len(pixels)}
    values |= {places[name]: value for name, value in tags.items()}
    values[273] = 8 + 2 + 12 * len(values) + 4
    data = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(values))
    for tag, value in sorted(values.items()):
        data += struct.pack(f"{order}HHII", tag, 4, 1, value)
    return StoredImage(data + bytes(4) + pixels, "file")


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_pixels_are_those_of_the_file(compression: str | None) -> None:
    stored = tiff(Image.fromarray(PHOTO), compression=compression)
    np.testing.assert_array_equal(decode(stored), PHOTO.transpose(2, 0, 1))
    assert count_pixels(stored) == 12 * 17


def test_the_first_page_is_the_image() -> None:
    pages = [Image.fromarray(PHOTO), Image.new("RGB", (3, 3)), Image.new("L", (900, 900))]
    stored = tiff(pages[0], save_all=True, append_images=pages[1:])
    np.testing.assert_array_equal(decode(stored), PHOTO.transpose(2, 0, 1))
    assert count_pixels(stored) == 12 * 17


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_has_the_colours_that_it_has_as_png(mode: str) -> None:
    image = Image.fromarray(PHOTO).convert(mode)
    np.testing.assert_array_equal(decode(tiff(image)), np.asarray(image.convert("RGB")).transpose(2, 0, 1))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_sixteen_bits_become_eight_as_in_a_png(order: str, compression: str | None) -> None:
    pixels = decode(tiff(Image.fromarray(DEEP.astype(f"{order}u2")), compression=compression))
    np.testing.assert_array_equal(pixels, np.stack([np.rint(DEEP / 257).astype(np.uint8)] * 3))


def test_twelve_bits_have_the_white_of_twelve_bits() -> None:
    packed = bytes([0x00, 0x03, 0xE8, 0xFF, 0xF8, 0x00])  # 0, 1000, 4095, 2048
    assert decode(written(packed, 4, 1, 12))[0].tolist() == [[0, 62, 255, 128]]


def test_where_zero_is_white_it_is_white_at_any_depth() -> None:
    assert decode(written(bytes([0, 100, 255]), 3, 1, 8, photometric=0))[0].tolist() == [[255, 155, 0]]
    deep = np.array([[0, 25700, 65535]], "<u2").tobytes()
    assert decode(written(deep, 3, 1, 16, photometric=0))[0].tolist() == [[255, 155, 0]]
    assert decode(written(deep, 3, 1, 16, photometric=1))[0].tolist() == [[0, 100, 255]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_it_is_turned_upright_once(orientation: int, compression: str | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    as_png = io.BytesIO()
    Image.fromarray(PHOTO).save(as_png, "PNG", exif=exif)
    stored = tiff(Image.fromarray(PHOTO), tiffinfo={274: orientation}, compression=compression)
    np.testing.assert_array_equal(decode(stored), decode(StoredImage(as_png.getvalue(), "file")))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_white_are_refused(dtype: type) -> None:
    with pytest.raises(DataError, match=r"as pixels \(mode [IF]\), .* bring it to 8 or 16 bits a channel"):
        decode(tiff(Image.fromarray(DEEP.astype(dtype))))


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "jpeg"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the tags
def test_truncated_files_are_refused(compression: str | None) -> None:
    noise = Image.fromarray(RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = tiff(noise, compression=compression)
    assert decode(whole).shape == (3, 64, 64)
    for end in (6, len(whole.data) // 2, len(whole.data) - 40):
        with pytest.raises(DataError, match=r"corrupt|not an image"):
            decode(StoredImage(whole.data[:end], "file"))


def test_more_pixels_than_the_limit_are_refused() -> None:
    with pytest.raises(DataError, match="17 x 12 pixels; the limit is 203 in all"):
        decode(tiff(Image.fromarray(PHOTO)), max_pixels=203)


def test_a_tile_beyond_the_limit_is_refused() -> None:
    with pytest.raises(DataError, match="the image's tiles have 20 x 11 pixels; the limit is 219 in all"):
        decode(written(bytes(12), 4, 3, 8, tile_width=20, tile_height=11), max_pixels=219)
    assert decode(written(bytes(12), 4, 3, 8, tile_width=20, tile_height=11), max_pixels=220).shape == (3, 3, 4)


def directory(*tags: tuple[int, int, int], size: int) -> StoredImage:
    """A file of so many bytes whose first page has these tags (tag, type, count), and no image."""
    data = b"II*\0" + struct.pack("<IH", 8, len(tags))
    data += b"".join(struct.pack("<HHII", *tag, 0) for tag in tags)
    return StoredImage(data.ljust(size, b"\0"), "file")


def test_tags_with_more_bytes_than_the_file_are_refused() -> None:
    with pytest.raises(DataError, match="its tags have more bytes than the file"):
        decode(directory((700, 1, 600), (34675, 1, 401), size=1000))
    with pytest.raises(DataError, match="not an image"):  # it is none, but not for its tags
        decode(directory((700, 1, 600), (34675, 1, 400), size=1000))


def test_more_strips_than_anybody_writes_are_refused() -> None:
    with pytest.raises(DataError, match="lies in 100,001 strips or tiles; the limit is 100,000"):
        decode(directory((273, 3, MOST_PARTS + 1), size=10 * MOST_PARTS))


@pytest.mark.parametrize("data", [b"II*\0", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", b"II+\0", b"MMxx"])
def test_a_beginning_without_the_rest_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="the image is corrupt"):
        decode(StoredImage(data, "file"))


def test_a_folder_reads_tiff(tmp_path: Path) -> None:
    for name in ("train/a/1.tif", "train/a/2.TIFF", "test/a/3.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PHOTO).save(tmp_path / name, "TIFF")
    (tmp_path / "train/a/cut.tif").write_bytes((tmp_path / "train/a/1.tif").read_bytes()[:100])
    config = FolderConfig(root=tmp_path / "train", test_root=tmp_path / "test", image_size=8, on_corrupt="skip")
    dataset = ImageFolder(config, "train")
    assert [Path(path).name for path in dataset.skipped] == ["cut.tif"]
    assert len(dataset) == 2
    for row in range(2):
        np.testing.assert_array_equal(dataset.pixels(row), PHOTO.transpose(2, 0, 1))
