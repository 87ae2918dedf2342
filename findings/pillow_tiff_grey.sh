#!/usr/bin/env bash
# Pillow 13.0.0: a grey TIFF in which zero is white is turned around if it has 8 bits, and left as it is if it has 16; one
# of 12 bits opens as mode I;16, with a white of 4095 and not 65535.
#
# TIFF says by PhotometricInterpretation whether zero is black (1) or white (0), at every depth; scanners and radiography
# write 0. Pillow reads both kinds as one mode, and nothing in mode or info tells them apart afterwards: of 16 bits the
# values are the file's, so the image is its own negative. A guess that mode L and mode I;16 of the same picture agree up
# to a factor is wrong. The 12-bit file, read by the rule for I;16 that is right for every other file, is nearly black.
# Both must be asked of `image.tag_v2` (262 and 258), which `copy()` and `convert()` do not keep.
#
# Seen, of the picture black, grey, white:
#    8 bits, zero is black: L     [0, 100, 255]          zero is white: L     [255, 155, 0]
#   16 bits, zero is black: I;16  [0, 25700, 65535]      zero is white: I;16  [0, 25700, 65535]
#   12 bits, zero is black: I;16  [0, 1606, 4095]
#
# Exits with 1 if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "pillow==13.0.0"
"$folder/venv/bin/python" - <<'PYTHON'
import io
import struct

import PIL
from PIL import Image

print("Pillow", PIL.__version__)


def values(bits: int, photometric: int, pixels: bytes) -> tuple[str, list[int]]:
    """Writes a TIFF of three pixels in one strip, and reads it."""
    tags = {256: 3, 257: 1, 258: bits, 259: 1, 262: photometric, 277: 1, 278: 1, 279: len(pixels)}
    tags[273] = 8 + 2 + 12 * (len(tags) + 1) + 4
    data = b"II*\0" + struct.pack("<IH", 8, len(tags))
    data += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    with Image.open(io.BytesIO(data + bytes(4) + pixels)) as image:
        return image.mode, [image.getpixel((x, 0)) for x in range(3)]


found = {}
for bits, pixels in (8, bytes([0, 100, 255])), (16, struct.pack("<HHH", 0, 25700, 65535)):
    for photometric in (1, 0):
        found[bits, photometric] = values(bits, photometric, pixels)
found[12, 1] = values(12, 1, bytes([0x00, 0x06, 0x46, 0xFF, 0xF0]))
for (bits, photometric), (mode, shown) in found.items():
    print(f"{bits:2} bits, zero is {'black' if photometric else 'white'}: {mode:5} {shown}")
as_seen = found == {
    (8, 1): ("L", [0, 100, 255]),
    (8, 0): ("L", [255, 155, 0]),
    (16, 1): ("I;16", [0, 25700, 65535]),
    (16, 0): ("I;16", [0, 25700, 65535]),
    (12, 1): ("I;16", [0, 1606, 4095]),
}
raise SystemExit(0 if as_seen else 1)
PYTHON
