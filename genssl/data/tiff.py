"""Looks into a TIFF before a decoder does: its tags may ask for far more memory than its pixels take."""

from __future__ import annotations

import struct

from genssl.errors import DataError

HEADERS = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}
FIRST_BYTES = (b"II", b"MM")
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
TILE_WIDTH, TILE_HEIGHT, PARTS = 322, 323, (273, 324)  # parts are strips or tiles
MOST_PARTS = 100_000


def check_tiff(data: bytes, max_pixels: int) -> None:
    """Checks the first page of a TIFF: that its tags fit into the file, and its tiles into the limit.

    A file can name the same bytes as the values of thousands of tags, all of which a decoder reads; and a few pixels
    can lie in a tile of any size.

    Args:
        data: the file; anything else than a TIFF is let pass.
        max_pixels: a tile has at most so many.

    Raises:
        DataError: if not, or if there is no first page.
    """
    if not data.startswith(FIRST_BYTES):
        return
    if data[:4] not in HEADERS:
        raise DataError("the image is corrupt: it begins as a TIFF does and is none")
    order, big = HEADERS[data[:4]]
    entry = struct.Struct(f"{order}HH{'Q8s' if big else 'I4s'}")
    try:
        (start,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, 8 if big else 4)
        (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, start)
        first = start + (8 if big else 2)
        if count > (len(data) - first) // entry.size:
            raise struct.error
        tags = [entry.unpack_from(data, first + number * entry.size) for number in range(count)]
    except (struct.error, OverflowError):
        raise DataError("the image is corrupt: the list of its tags is not in the file") from None
    sizes = [TYPE_BYTES.get(kind, 0) * number for _, kind, number, _ in tags]
    if sum(size for size in sizes if size > (8 if big else 4)) > len(data):
        raise DataError("the image is corrupt: its tags have more bytes than the file")
    if (parts := max((number for tag, _, number, _ in tags if tag in PARTS), default=0)) > MOST_PARTS:
        raise DataError(f"the image lies in {parts:,} strips or tiles; the limit is {MOST_PARTS:,}: save it anew")
    sides: dict[int, int] = {}
    for tag, kind, _, value in tags:
        if tag in (TILE_WIDTH, TILE_HEIGHT) and kind in NUMBERS:
            sides[tag] = max(sides.get(tag, 0), struct.unpack_from(order + NUMBERS[kind], value)[0])
    if (width := sides.get(TILE_WIDTH, 0)) * (height := sides.get(TILE_HEIGHT, 0)) > max_pixels or width > max_pixels:
        raise DataError(f"the image's tiles have {width} x {height} pixels; the limit is {max_pixels:,} in all")
