"""What a data set gives is shown, and sent, as the data set `folder` reads its file; or refused in a sentence."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from genssl import GenerativeViews
from genssl.client.images import stored_image
from genssl.data.base import StoredImage
from genssl.data.decode import decode
from genssl.errors import DataError

RANDOM = np.random.default_rng(11)
COLOUR = RANDOM.integers(0, 256, (9, 14, 3), dtype=np.uint8)
DEEP = (RANDOM.integers(0, 65536, (9, 14))).astype(np.uint16)


def view_of(item: Any, **settings: Any) -> np.ndarray:
    """The real view of a data set of this item, uint8 [3, H, W]."""
    views = GenerativeViews([item], lambda images, indices: None, policy="none", **settings)
    return (views[0][0] * 255).round().byte().numpy()


def file_of(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if image.mode in ("CMYK", "I;16B") else "PNG", **options)
    return buffer.getvalue()


def palette_with_transparency() -> Image.Image:
    image = Image.fromarray(COLOUR).quantize(16)
    image.info["transparency"] = 3
    return image


PICTURES = {
    "16-bit grey": Image.fromarray(DEEP),
    "16-bit grey, the other byte order": Image.fromarray(DEEP.astype(">u2")),
    "grey": Image.fromarray(COLOUR[..., 0]),
    "1-bit": Image.fromarray(COLOUR).convert("1"),
    "grey with transparency": Image.fromarray(COLOUR).convert("LA"),
    "RGBA": Image.fromarray(COLOUR).convert("RGBA"),
    "palette": Image.fromarray(COLOUR).quantize(16),
    "palette with transparency": palette_with_transparency(),
    "CMYK": Image.fromarray(COLOUR).convert("CMYK"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_read_as_its_file_and_its_source_is_what_is_shown(name: str) -> None:
    picture = PICTURES[name]
    data = file_of(picture)
    expected = decode(StoredImage(data, "file"))
    for given in (picture, Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(view_of(given), expected)
        np.testing.assert_array_equal(decode(stored_image(given)), expected)


def test_a_ramp_of_sixteen_bits_is_not_white() -> None:
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    shown = view_of(Image.fromarray(ramp))
    assert abs(shown.mean() - 127) < 1
    assert len(np.unique(shown)) > 250


def test_torchvisions_folder_gives_pictures_as_they_are_with_pillows_own_loader(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number in range(2):
        (tmp_path / "a" / f"{number}.png").write_bytes(file_of(PICTURES["16-bit grey"]))
    folder = datasets.ImageFolder(tmp_path, loader=Image.open)
    views = GenerativeViews(folder, lambda images, indices: None, policy="none")  # type: ignore[arg-type, return-value]
    first, _, labels = next(iter(torch.utils.data.DataLoader(views, 2, num_workers=1)))
    expected = decode(StoredImage((tmp_path / "a" / "0.png").read_bytes(), "file"))
    np.testing.assert_array_equal((first[0] * 255).round().byte().numpy(), expected)
    assert labels.tolist() == [0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("pixels", [COLOUR, DEEP], ids=["colour", "16-bit grey"])
def test_a_picture_is_turned_as_its_exif_says(orientation: int, pixels: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(Image.fromarray(pixels), exif=exif)
    expected = decode(StoredImage(data, "file"))
    opened = Image.open(io.BytesIO(data))
    before = opened.copy()
    np.testing.assert_array_equal(view_of(opened), expected)
    np.testing.assert_array_equal(decode(stored_image(opened)), expected)
    assert opened.size == before.size, "the data set's own picture is left as it is"
    assert opened.tobytes() == before.tobytes()


@pytest.mark.parametrize("turned", [False, True])
def test_a_picture_that_is_no_longer_as_opened_is_taken_as_it_stands(turned: bool) -> None:
    """Pillow hands the tag on to what was converted or turned, and whoever did that may have followed it already."""
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = Image.open(io.BytesIO(file_of(Image.fromarray(COLOUR), exif=exif)))
    changed = opened.transpose(Image.Transpose.ROTATE_270) if turned else opened.convert("RGB")
    np.testing.assert_array_equal(view_of(changed), np.array(changed).transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pictures_of_numbers_without_a_white_are_refused(mode: str) -> None:
    picture = Image.fromarray(DEEP.astype(np.int32 if mode == "I" else np.float32))
    with pytest.raises(DataError, match=rf"^row 0 of the data set: .* \(mode {mode}\).* 8 or 16 bits a channel"):
        view_of(picture)
    with pytest.raises(DataError, match=rf"^image 0: .* \(mode {mode}\)"):
        stored_image(picture)


@pytest.mark.parametrize("grey", [False, True])
def test_arrays_and_tensors_of_every_order_are_one_image(grey: bool) -> None:
    pixels = COLOUR[..., :1] if grey else COLOUR
    forms = [pixels, pixels.transpose(2, 0, 1), torch.from_numpy(pixels), torch.from_numpy(pixels).permute(2, 0, 1)]
    forms += [pixels[..., 0]] if grey else []
    expected = np.broadcast_to(pixels.transpose(2, 0, 1), (3, 9, 14))
    for form in forms:
        np.testing.assert_array_equal(view_of(form), expected)
        np.testing.assert_array_equal(decode(stored_image(form)), expected)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (DEEP, r"has the dtype uint16; uint8 in 0..255 is wanted: for values in 0..65535, \(x / 257\).round\(\)"),
        (DEEP / 65535, r"has the dtype float64; .* for values in 0..1, \(x \* 255\).round\(\)"),
        (torch.rand(3, 4, 4), r"has the dtype float32; .* take the transforms off the data set"),
        (torch.rand(3, 4, 4).to(torch.bfloat16), "has the dtype bfloat16; "),
        (torch.zeros(3, 4, 4, dtype=torch.uint16), "has the dtype uint16; "),
        (COLOUR > 9, "has the dtype bool; "),
        ("photo.jpg", "is a str; allowed: "),
    ],
)
def test_other_types_are_refused_in_a_sentence_that_names_the_row(image: Any, said: str) -> None:
    with pytest.raises(TypeError, match=f"^row 0 of the data set {said}"):
        view_of(image)


@pytest.mark.parametrize("shape", [(4, 4, 4), (2, 4, 4), (4, 4, 4, 3), (0, 4, 3), (4,)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^row 0 of the data set has the shape \["):
        view_of(np.zeros(shape, np.uint8))


# ---- Items that are dicts ----


class HuggingFace:
    """Rows as `datasets.Dataset` gives them, a batch of which is a list of dicts."""

    def __init__(self, key: str = "image", **rest: Any) -> None:
        self.key, self.rest = key, rest

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {self.key: Image.fromarray(COLOUR + row), **self.rest}

    def __getitems__(self, rows: list[int]) -> list[dict[str, Any]]:
        return [self[row] for row in rows]


def grey_variants(images: Any, indices: Any) -> np.ndarray:
    assert all(isinstance(image, Image.Image) for image in images)
    return np.full((len(images), 3, 9, 14), 77, np.uint8)


@pytest.mark.parametrize("key", ["image", "img"])
def test_a_dict_gives_its_image_by_key_and_the_rest_follows_the_views(key: str) -> None:
    settings = {} if key == "image" else {"image_key": key}
    views = GenerativeViews(HuggingFace(key, label=3, caption="a"), grey_variants, **settings)
    first, second, rest = next(iter(torch.utils.data.DataLoader(views, 2)))
    np.testing.assert_array_equal((first[1] * 255).round().byte().numpy(), COLOUR.transpose(2, 0, 1) + 1)
    assert (second * 255).round().unique().tolist() == [77]
    assert rest["label"].tolist() == [3, 3]
    assert rest["caption"] == ["a", "a"]


def test_a_dict_of_an_image_alone_gives_the_views_alone() -> None:
    assert len(GenerativeViews(HuggingFace(), grey_variants)[0]) == 2


def test_a_dict_without_the_key_is_told_which_it_has() -> None:
    views = GenerativeViews(HuggingFace("img", label=3), grey_variants)
    with pytest.raises(ValueError, match=r"dicts without the key 'image'; they have 'img', 'label': .* image_key="):
        views[0]
