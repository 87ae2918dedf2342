#!/usr/bin/env bash
# Pillow 13.0.0: Image.resize of the same pixels to the same size gives other values than Pillow 12.0.0.
#
# A bicubic resize is two passes, along rows and along columns, and the values between them are rounded and clipped to
# 0..255, so that their order shows. Up to Pillow 12 the width is always resized first. Pillow 13 resizes the height
# first where that seems to be cheaper, as with tall images: their resized pixels differ by up to 21 of 255 (noise, the
# worst case). torchvision resizes the width first, so what agreed with Pillow to 1 (CLIP's preprocessing in its two
# backends) does not any more. Whoever pins down an order resizes in two calls, one axis each.
#
# Seen (largest difference of one resize to two calls in that order):
#   12.0.0: 264 x 737 to 224 x 625: width first 0, height first 21;  737 x 264 to 625 x 224: width first 0, height first 20
#   13.0.0: 264 x 737 to 224 x 625: width first 21, height first 0;  737 x 264 to 625 x 224: width first 0, height first 20
#
# Exits with 1 if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/look.py" <<'PYTHON'
import sys

import numpy as np
import PIL
from PIL import Image

BICUBIC = Image.Resampling.BICUBIC


def apart(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max())


found = []
for width, height, wide, tall in ((264, 737, 224, 625), (737, 264, 625, 224)):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    whole = image.resize((wide, tall), BICUBIC)
    first = apart(whole, image.resize((wide, height), BICUBIC).resize((wide, tall), BICUBIC))
    second = apart(whole, image.resize((width, tall), BICUBIC).resize((wide, tall), BICUBIC))
    print(f"{PIL.__version__}: {width} x {height} to {wide} x {tall}: width first {first}, height first {second}")
    found += [first, second]
sys.exit(found != [int(number) for number in sys.argv[1:]])
PYTHON
for version in 12.0.0 13.0.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q --disable-pip-version-check "pillow==$version" "numpy==2.4.6"
done
"$folder/12.0.0/bin/python" "$folder/look.py" 0 21 0 20
"$folder/13.0.0/bin/python" "$folder/look.py" 21 0 0 20
