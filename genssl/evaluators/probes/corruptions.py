"""The fifteen common corruptions of ImageNet-C (Hendrycks and Dietterich 2019, arXiv 1903.12261), for any image size.

The strengths of the five severities are the paper's where its released code has them for this size, and in between
where it has not. That code has two tables: ImageNet-C's for 224 pixels and CIFAR-10-C's for 32. Here

- a strength without a length (noise, contrast, quality, ...) is taken from the table of 32 pixels up to that size, from
  that of 224 pixels from there on, and interpolated geometrically over the logarithm of the size in between;
- a length (radius of a blur, distance of a displacement) is ImageNet-C's in parts of the image, so in pixels it is
  scaled by size / 224.

The corruptions are our own implementations and deviate where `corruption_operations` says so, so the accuracies are
comparable between encoders judged by genssl, and not with published ImageNet-C or CIFAR-10-C errors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from genssl.data.base import UInt8Array
from genssl.evaluators.probes import corruption_operations as operations

FloatArray = npt.NDArray[np.float64]
Operation = Callable[[FloatArray, np.random.Generator, FloatArray], FloatArray]

SEVERITIES = (1, 2, 3, 4, 5)
FAMILIES: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
CORRUPTIONS = tuple(name for names in FAMILIES.values() for name in names)

_SMALL, _LARGE = 32, 224

# Per corruption one row a severity, of the parameters that its operation takes: at 32 pixels, and at 224.
_STRENGTHS: dict[str, tuple[list[list[float]], list[list[float]]]] = {
    "gaussian_noise": ([[0.04], [0.06], [0.08], [0.09], [0.10]], [[0.08], [0.12], [0.18], [0.26], [0.38]]),
    "shot_noise": ([[500], [250], [100], [75], [50]], [[60], [25], [12], [5], [3]]),
    "impulse_noise": ([[0.01], [0.02], [0.03], [0.05], [0.07]], [[0.03], [0.06], [0.09], [0.17], [0.27]]),
    "zoom_blur": ([[0.05], [0.10], [0.15], [0.20], [0.25]], [[0.10], [0.15], [0.20], [0.24], [0.30]]),
    # Mean and deviation of the flakes' field, its threshold, and the share of the image under the haze.
    "snow": (
        [
            [0.1, 0.2, 0.6, 0.95],
            [0.1, 0.2, 0.5, 0.9],
            [0.15, 0.3, 0.55, 0.9],
            [0.25, 0.3, 0.6, 0.85],
            [0.3, 0.3, 0.65, 0.8],
        ],
        [
            [0.1, 0.3, 0.5, 0.8],
            [0.2, 0.3, 0.5, 0.7],
            [0.55, 0.3, 0.9, 0.7],
            [0.55, 0.3, 0.85, 0.65],
            [0.55, 0.3, 0.85, 0.55],
        ],
    ),
    # The frost's share of image plus frost: c1 / (c0 + c1) of the paper's weights (c0, c1).
    "frost": ([[0.167], [0.231], [0.308], [0.320], [0.375]], [[0.286], [0.429], [0.500], [0.519], [0.556]]),
    # Thickness; 2.75 is ours: the paper's severity 4 is rougher than 3, and no thicker.
    "fog": ([[0.2], [0.5], [0.75], [1], [1.5]], [[1.5], [2], [2.5], [2.75], [3]]),
    "brightness": ([[0.05], [0.10], [0.15], [0.20], [0.30]], [[0.1], [0.2], [0.3], [0.4], [0.5]]),
    "contrast": ([[0.75], [0.5], [0.4], [0.3], [0.15]], [[0.4], [0.3], [0.2], [0.1], [0.05]]),
    "pixelate": ([[0.95], [0.90], [0.85], [0.75], [0.65]], [[0.6], [0.5], [0.4], [0.3], [0.25]]),
    "jpeg_compression": ([[80], [65], [58], [50], [40]], [[25], [18], [15], [10], [7]]),
}

# Lengths in pixels of an image of 224.
_LENGTHS: dict[str, list[list[float]]] = {
    "defocus_blur": [[3], [4], [6], [8], [10]],
    # Deviation of the blur, and the distance: the paper's, times the root of its number of passes.
    "glass_blur": [[0.7, 1.41], [0.9, 2], [1, 3.46], [1.1, 4.24], [1.5, 5.66]],
    "motion_blur": [[10, 3], [15, 5], [15, 8], [15, 12], [20, 15]],
    # Ours: root mean square displacement; the paper's severities 1 and 2 are of another kind than 3 to 5.
    "elastic_transform": [[1.12], [1.68], [2.24], [3.36], [4.48]],
}


def strength(name: str, severity: int, size: int) -> FloatArray:
    """Returns the parameters of a corruption at a severity 1..5 for images of `size` pixels a side."""
    if name in _LENGTHS:
        return np.array(_LENGTHS[name][severity - 1]) * size / _LARGE
    small, large = (np.array(table[severity - 1], dtype=float) for table in _STRENGTHS[name])
    share = min(max(math.log(size / _SMALL) / math.log(_LARGE / _SMALL), 0.0), 1.0)
    between: FloatArray = small ** (1 - share) * large**share
    return between


def corrupt(images: UInt8Array, name: str, severity: int, seed: int = 0) -> UInt8Array:
    """Returns corrupted images.

    What is random is drawn for each image from a stream named by the seed, the corruption and the image's pixels. So
    it depends neither on the rest of the batch nor on the order, and all severities share it: each does more of the
    same.

    Args:
        images: uint8 [N, 3, S, S].
        name: one of CORRUPTIONS.
        severity: 1 to 5.
        seed: of the draws.

    Returns:
        uint8 [N, 3, S, S].
    """
    assert images.dtype == np.uint8
    operation: Operation = getattr(operations, name)
    parameters = strength(name, severity, images.shape[-1])
    corrupted = np.empty_like(images)
    for row, image in enumerate(images):
        digest = hashlib.blake2b(f"{seed}\x1f{name}\x1f".encode() + image.tobytes(), digest_size=16).digest()
        random = np.random.default_rng(int.from_bytes(digest, "little"))
        values = operation(image / 255, random, parameters)
        corrupted[row] = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return corrupted
