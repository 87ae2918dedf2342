from __future__ import annotations

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from genssl.data.base import StoredImage, UInt8Array, raw_image
from genssl.data.decode import decode, resize_and_crop
from genssl.errors import DataError

RANDOM = np.random.default_rng(7)
PHOTO: UInt8Array = RANDOM.integers(0, 256, (3, 6, 9), dtype=np.uint8)


def pil(pixels: UInt8Array) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def stored(image: Image.Image, encoding: str, **options: object) -> StoredImage:
    buffer = io.BytesIO()
    image.save(buffer, encoding, **options)
    return StoredImage(buffer.getvalue(), "file")


def png_that_claims(width: int, height: int) -> StoredImage:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )
    return StoredImage(data, "file")


@pytest.mark.parametrize(("encoding", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_decode_to_the_exact_pixels(encoding: str, options: dict[str, object]) -> None:
    pixels = decode(stored(pil(PHOTO), encoding, **options))
    np.testing.assert_array_equal(pixels, PHOTO)
    assert pixels.flags.c_contiguous


def test_jpeg_decodes_to_nearly_the_pixels() -> None:
    flat = np.full((3, 16, 16), 0, np.uint8)
    flat[0], flat[1], flat[2] = 200, 100, 50
    np.testing.assert_allclose(decode(stored(pil(flat), "JPEG", quality=95)).astype(int), flat.astype(int), atol=3)


def test_grey_images_have_three_equal_channels() -> None:
    grey = stored(Image.fromarray(PHOTO[0]), "PNG")
    np.testing.assert_array_equal(decode(grey), np.stack([PHOTO[0]] * 3))


def test_transparency_is_dropped() -> None:
    rgba = pil(PHOTO).convert("RGBA")
    rgba.putalpha(Image.fromarray(RANDOM.integers(0, 256, (6, 9), dtype=np.uint8)))
    np.testing.assert_array_equal(decode(stored(rgba, "PNG")), PHOTO)


def test_palette_images_have_their_colours() -> None:
    image = Image.new("P", (4, 2))
    image.putpalette([10, 20, 30, 200, 150, 100])
    image.putpixel((3, 1), 1)
    pixels = decode(stored(image, "PNG"))
    assert pixels[:, 0, 0].tolist() == [10, 20, 30]
    assert pixels[:, 1, 3].tolist() == [200, 150, 100]


def test_cmyk_jpeg_has_its_colours() -> None:
    # No cyan, all magenta and yellow: red. Adobe writes the values inverted, which is the trap.
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    np.testing.assert_allclose(decode(stored(cmyk, "JPEG", quality=95))[:, 8, 8].astype(int), [255, 0, 0], atol=4)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, PHOTO),
        (2, PHOTO[:, :, ::-1]),
        (3, PHOTO[:, ::-1, ::-1]),
        (4, PHOTO[:, ::-1]),
        (5, PHOTO.transpose(0, 2, 1)),
        (6, np.rot90(PHOTO, -1, (1, 2))),
        (7, PHOTO.transpose(0, 2, 1)[:, ::-1, ::-1]),
        (8, np.rot90(PHOTO, 1, (1, 2))),
    ],
)
def test_images_are_turned_upright_as_exif_says(orientation: int, upright: UInt8Array) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(stored(pil(PHOTO), "PNG", exif=exif)), upright)


@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP", "BMP"])
def test_truncated_images_are_refused(encoding: str) -> None:
    noise = RANDOM.integers(0, 256, (3, 64, 64), dtype=np.uint8)
    whole = stored(pil(noise), encoding)
    assert decode(whole).shape == (3, 64, 64)
    with pytest.raises(DataError, match=r"corrupt|not an image"):
        decode(StoredImage(whole.data[: len(whole.data) // 2], "file"))


def test_png_with_flipped_pixel_bits_is_refused() -> None:
    data = bytearray(stored(pil(RANDOM.integers(0, 256, (3, 64, 64), dtype=np.uint8)), "PNG").data)
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(DataError, match="corrupt"):
        decode(StoredImage(bytes(data), "file"))


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"this is a text", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_bytes_that_are_no_image_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"not an image of a known format \(JPEG, PNG, WEBP, BMP, TIFF\)"):
        decode(StoredImage(data, "file"))


@pytest.mark.parametrize("encoding", ["GIF", "PPM", "ICO"])
def test_formats_outside_the_allow_list_are_refused(encoding: str) -> None:
    with pytest.raises(DataError, match="not an image of a known format"):
        decode(stored(pil(RANDOM.integers(0, 256, (3, 16, 16), dtype=np.uint8)), encoding))


@pytest.mark.parametrize("claims", [(8_000, 8_001), (13_400, 13_400)])  # above our limit, and above Pillow's own
def test_header_that_claims_too_many_pixels_is_refused_before_decoding(
    claims: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image.size))
    with pytest.raises(DataError, match="pixels"):
        decode(png_that_claims(*claims))
    assert decoded == []


def test_the_pixel_limit_is_the_largest_size_allowed() -> None:
    image = stored(pil(PHOTO), "PNG")
    assert decode(image, max_pixels=54).shape == (3, 6, 9)
    with pytest.raises(DataError, match="9 x 6 pixels; the limit is 53 in all"):
        decode(image, max_pixels=53)


def test_too_many_bytes_are_refused_before_opening() -> None:
    image = stored(pil(PHOTO), "PNG")
    assert decode(image, max_bytes=len(image.data)).shape == (3, 6, 9)
    with pytest.raises(DataError, match=f"{len(image.data)} bytes; the limit is {len(image.data) - 1}"):
        decode(image, max_bytes=len(image.data) - 1)


def test_raw_images_keep_their_pixels() -> None:
    np.testing.assert_array_equal(decode(raw_image(PHOTO)), PHOTO)
    np.testing.assert_array_equal(decode(raw_image(PHOTO[:1])), np.stack([PHOTO[0]] * 3))


@pytest.mark.parametrize(
    "shape", [(3, 6, 10), (3, 6, 8), (2, 9, 9), (1, 0, 162), (-3, -6, 9), (0, 0, 0), (3, 2**40, 2**40)]
)
def test_raw_images_of_a_wrong_shape_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match="raw image of shape"):
        decode(StoredImage(PHOTO.tobytes(), "raw", *shape))


def test_raw_images_obey_the_pixel_limit() -> None:
    with pytest.raises(DataError, match="9 x 6 pixels; the limit is 53"):
        decode(raw_image(PHOTO), max_pixels=53)


def test_source_id_is_the_digest_of_the_stored_bytes() -> None:
    image = stored(pil(PHOTO), "PNG")
    assert image.source_id == hashlib.blake2b(image.data, digest_size=16).digest()
    raw = hashlib.blake2b(digest_size=16)
    raw.update(b"uint8[3,6,9]")
    raw.update(PHOTO.tobytes())
    assert raw_image(PHOTO).source_id == raw.digest()


def test_source_id_tells_shapes_with_equal_bytes_apart() -> None:
    assert raw_image(PHOTO).source_id != raw_image(PHOTO.reshape(3, 9, 6)).source_id
    # Arrays in another memory order are the same image.
    assert raw_image(np.asfortranarray(PHOTO)).source_id == raw_image(PHOTO).source_id


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    square = RANDOM.integers(0, 256, (3, 8, 8), dtype=np.uint8)
    assert resize_and_crop(square, 8) is square


@pytest.mark.parametrize("transposed", [False, True])
def test_the_centre_square_is_cut_out(transposed: bool) -> None:
    bands = np.zeros((3, 8, 24), np.uint8)
    bands[0, :, :8], bands[1, :, 8:16], bands[2, :, 16:] = 255, 200, 255
    square = resize_and_crop(bands.transpose(0, 2, 1) if transposed else bands, 8)
    assert (square[0].max(), square[1].min(), square[2].max()) == (0, 200, 0)


@pytest.mark.parametrize(("height", "width"), [(6, 9), (9, 6), (1, 40), (333, 500), (7, 7)])
def test_the_result_is_square_and_keeps_flat_colours(height: int, width: int) -> None:
    flat = np.empty((3, height, width), np.uint8)
    flat[0], flat[1], flat[2] = 10, 128, 250
    expected = np.broadcast_to(np.array([10, 128, 250], np.uint8)[:, None, None], (3, 16, 16))
    np.testing.assert_array_equal(resize_and_crop(flat, 16), expected)


def test_shrinking_is_antialiased() -> None:
    # Columns alternate between black and white: without a low-pass filter the result would be one of the two.
    stripes = np.zeros((3, 64, 64), np.uint8)
    stripes[:, :, ::2] = 255
    np.testing.assert_allclose(resize_and_crop(stripes, 8)[:, 1:-1, 1:-1].astype(int), 127, atol=2)


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    decoded = decode(stored(Image.fromarray(ramp), "PNG"))
    np.testing.assert_array_equal(decoded[0], np.rint(ramp / 257).astype(np.uint8))
    np.testing.assert_array_equal(decoded[0], decoded[2])


def test_a_very_long_image_costs_no_more_than_its_square() -> None:
    long = np.broadcast_to(np.uint8(9), (3, 1, 1_000_000))
    square = resize_and_crop(np.ascontiguousarray(long), 32)
    assert square.shape == (3, 32, 32)
    assert set(square.ravel().tolist()) == {9}
