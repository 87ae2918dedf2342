"""One corruption each, of one image; `corruptions` has the strengths and the draws.

Every function takes (image float [3, S, S] in [0, 1], random stream, parameters) and returns float [3, S, S], which the
caller clips. Deviations from ImageNet-C's released code (Hendrycks and Dietterich 2019) stand in the docstrings. Two
are general: borders are mirrored, and kernels take fractions of a pixel, so that small images are blurred at all.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

FloatArray = npt.NDArray[np.float64]
GREY = np.array([0.299, 0.587, 0.114])[:, None, None]
FROST_TINT = np.array([0.80, 0.90, 1.00])[:, None, None]


def gaussian_noise(x: FloatArray, random: np.random.Generator, parameters: FloatArray) -> FloatArray:
    """Adds normal noise of standard deviation parameters[0]."""
    return np.asarray(x + parameters[0] * random.standard_normal(x.shape))


def shot_noise(x: FloatArray, random: np.random.Generator, parameters: FloatArray) -> FloatArray:
    """Counts photons: Poisson, of mean parameters[0] at white."""
    return np.asarray(random.poisson(x * parameters[0]) / parameters[0])


def impulse_noise(x: FloatArray, random: np.random.Generator, parameters: FloatArray) -> FloatArray:
    """Sets a share parameters[0] of the values to 0 or 1, half of them each."""
    hit, salt = random.random(x.shape) < parameters[0], random.random(x.shape) < 0.5
    return np.where(hit, salt.astype(float), x)


def defocus_blur(x: FloatArray, random: np.random.Generator, parameters: FloatArray) -> FloatArray:
    """Averages over a disc of radius parameters[0] pixels, of the linearly interpolated image."""
    radii = np.sqrt((np.arange(8) + 0.5) / 8) * parameters[0]  # rings of equal area
    angles = np.arange(32) * (2 * np.pi / 32)
    points = np.stack([np.outer(radii, np.sin(angles)).ravel(), np.outer(radii, np.cos(angles)).ravel()], axis=1)
    return _average(x, points, np.ones(len(points)))


def glass_blur(x: FloatArray, random: np.random.Generator, parameters: FloatArray) -> FloatArray:
    """Blurs, lets every pixel look at a random place within parameters[1] pixels, and blurs again.

    Deviation: a draw of places in place of passes of pixel swaps; the blurs' deviation is parameters[0].
    """
    sigma, distance = parameters
    offsets = random.uniform(-distance, distance, (2, *x.shape[1:]))
    return _gaussian(_displaced(_gaussian(x, sigma), offsets), sigma)


def motion_blur(x: FloatArray, random: np.random.Generator, parameters: FloatArray) -> FloatArray:
    """Averages along a line of parameters[0] pixels with weights of a half Gaussian of deviation parameters[1].

    The angle is uniform within 45 degrees of the horizontal, as in the paper.
    """
    return _motion(x, parameters[0], parameters[1], random.uniform(-np.pi / 4, np.pi / 4))


def zoom_blur(x: FloatArray, random: np.random.Generator, parameters: FloatArray) -> FloatArray:
    """Averages the image and its enlargements about the centre by eleven factors from 1 to 1 + parameters[0]."""
    size = x.shape[1]
    at = np.arange(size) - (size - 1) / 2
    total = x.copy()
    factors = np.linspace(1, 1 + parameters[0], 11)
    for factor in factors:
        matrix = _interpolation(at / factor + (size - 1) / 2, size)
        total += matrix @ x @ matrix.T
    return np.asarray(total / (len(factors) + 1))


def snow(x: FloatArray, random: np.random.Generator, parameters: FloatArray) -> FloatArray:
    """Whitens the image and lets flakes fall.

    Flakes are where a normal field of mean parameters[0] and deviation parameters[1] is above parameters[2]; they are
    drawn out in a direction within 45 degrees of the vertical, and a second layer is the first one turned by half.
    parameters[3] of the image is left, the rest is at least half white. Deviation: one size of flakes, 3 / 224 of the
    image and at least a pixel, and one length of their motion, 12 / 224.
    """
    mean, deviation, threshold, kept = parameters
    size = x.shape[1]
    coarse = max(2, round(size / max(1.0, 3 * size / 224)))
    to_size = _interpolation(np.linspace(0, coarse - 1, size), coarse)
    field = mean + deviation * (to_size @ random.standard_normal((coarse, coarse)) @ to_size.T)
    flakes = np.clip(np.where(field < threshold, 0, field), 0, 1)[None]
    angle = random.uniform(np.pi / 4, 3 * np.pi / 4)
    flakes = _motion(flakes, 12 * size / 224, 6 * size / 224, angle)
    hazy = np.maximum(x, (x * GREY).sum(axis=0, keepdims=True) * 1.5 + 0.5)
    return np.asarray(kept * x + (1 - kept) * hazy + flakes + flakes[:, ::-1, ::-1])


def frost(x: FloatArray, random: np.random.Generator, parameters: FloatArray) -> FloatArray:
    """Mixes in crystals with the share parameters[0].

    Deviation: the paper pastes photographs of frost, which are not ours to ship; here the crystals are ridges of two
    fractal fields, bluish white. And the weights of image and frost add up to 1, so that every severity is farther from
    the image than the one before.
    """
    size = x.shape[1]
    ridges = [1 - np.abs(2 * _fractal(size, 1.6, random) - 1) for _ in range(2)]
    crystals = np.maximum(*ridges) ** 2
    return np.asarray((1 - parameters[0]) * x + parameters[0] * crystals * FROST_TINT)


def fog(x: FloatArray, random: np.random.Generator, parameters: FloatArray) -> FloatArray:
    """Adds a fractal field times parameters[0] and scales the sum to the image's brightest value.

    Deviation: octaves of interpolated noise, each half as strong as the one before at every severity, in place of the
    diamond-square algorithm with a roughness a severity.
    """
    brightest = max(x.max(), 1 / 255)
    mist = parameters[0] * _fractal(x.shape[1], 2.0, random)
    return np.asarray((x + mist) * brightest / (brightest + parameters[0]))


def brightness(x: FloatArray, random: np.random.Generator, parameters: FloatArray) -> FloatArray:
    """Adds parameters[0] to the value in HSV, up to 1; hue and saturation stay."""
    value = x.max(axis=0, keepdims=True)
    raised = np.minimum(value + parameters[0], 1)
    # Black has no colour, so it becomes grey.
    return np.asarray(np.where(value > 0, x * (raised / np.where(value > 0, value, 1)), raised))


def contrast(x: FloatArray, random: np.random.Generator, parameters: FloatArray) -> FloatArray:
    """Scales the distance to each channel's mean by parameters[0]."""
    means = x.mean(axis=(1, 2), keepdims=True)
    return np.asarray((x - means) * parameters[0] + means)


def elastic_transform(x: FloatArray, random: np.random.Generator, parameters: FloatArray) -> FloatArray:
    """Moves pixels by a smooth random field whose root mean square is parameters[0] pixels.

    Deviation: a field of one smoothness, deviation 3 % of the image and at least three quarters of a pixel; no affine
    map besides.
    """
    size = x.shape[1]
    field = ndimage.gaussian_filter(
        random.uniform(-1, 1, (2, size, size)), sigma=(0, *2 * (max(0.75, 0.03 * size),)), mode="reflect"
    )
    return _displaced(x, field * (parameters[0] / np.sqrt((field**2).mean())))


def pixelate(x: FloatArray, random: np.random.Generator, parameters: FloatArray) -> FloatArray:
    """Averages over square cells of 1 / parameters[0] pixels.

    Deviation: where that is no whole number, the results of the two nearest whole ones are mixed in proportion, since
    cells of whole pixels would give small images the same severity twice. Cells at the far border may be cut off.
    """
    side = 1 / float(parameters[0])
    below = int(side)
    return (1 - (side - below)) * _cells(x, below) + (side - below) * _cells(x, below + 1)


def jpeg_compression(x: FloatArray, random: np.random.Generator, parameters: FloatArray) -> FloatArray:
    """Compresses to JPEG at quality parameters[0], rounded, with Pillow's default subsampling of colour."""
    pixels = np.rint(x * 255).astype(np.uint8).transpose(1, 2, 0)
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "JPEG", quality=round(float(parameters[0])))
    with Image.open(stored, formats=["JPEG"]) as image:
        return np.asarray(image).transpose(2, 0, 1) / 255


def _gaussian(x: FloatArray, sigma: float) -> FloatArray:
    """Blurs every channel; sampled at three points a pixel, since a Gaussian below half a pixel is not one sampled."""
    reach = np.linspace(-3 * sigma, 3 * sigma, 2 * max(3, int(np.ceil(9 * sigma))) + 1)
    kernel = _kernel(np.stack([reach, np.zeros_like(reach)], axis=1), np.exp(-(reach**2) / (2 * sigma**2)))[:, 1:2]
    blurred = ndimage.correlate(x, kernel[None], mode="mirror")
    return np.asarray(ndimage.correlate(blurred, kernel.T[None], mode="mirror"))


def _motion(x: FloatArray, length: float, sigma: float, angle: float) -> FloatArray:
    along = np.linspace(0, length, 2 * int(np.ceil(length)) + 9)
    points = np.stack([along * np.sin(angle), along * np.cos(angle)], axis=1)
    return _average(x, points, np.exp(-(along**2) / (2 * sigma**2)))


def _average(x: FloatArray, points: FloatArray, weights: FloatArray) -> FloatArray:
    """Returns the weighted mean of the linearly interpolated image shifted by points [P, 2], pixels (down, right)."""
    return np.asarray(ndimage.correlate(x, _kernel(points, weights)[None], mode="mirror"))


def _kernel(points: FloatArray, weights: FloatArray) -> FloatArray:
    """Returns the kernel [down, right], of odd sides, that averages the linearly interpolated image over points."""
    reach = np.floor(np.abs(points)).astype(int).max(axis=0) + 1
    kernel = np.zeros(2 * reach + 1)
    low = np.floor(points).astype(int)
    share = points - low
    for down in (0, 1):
        for right in (0, 1):
            part = np.abs(1 - down - share[:, 0]) * np.abs(1 - right - share[:, 1]) * weights
            rows, columns = low[:, 0] + down + reach[0], low[:, 1] + right + reach[1]
            inside = part > 0
            np.add.at(kernel, (rows[inside], columns[inside]), part[inside])
    return np.asarray(kernel / kernel.sum())


def _displaced(x: FloatArray, offsets: FloatArray) -> FloatArray:
    """Returns the image where each pixel shows what lies offsets [2, S, S] (down, right) pixels from it."""
    at = np.indices(x.shape[1:]) + offsets
    return np.stack([ndimage.map_coordinates(channel, at, order=1, mode="mirror") for channel in x])


def _cells(x: FloatArray, side: int) -> FloatArray:
    of = np.arange(x.shape[1]) // side
    together = (of[:, None] == of).astype(float)
    matrix = together / together.sum(axis=1, keepdims=True)
    return np.asarray(matrix @ x @ matrix.T)


def _interpolation(at: FloatArray, size: int) -> FloatArray:
    """Returns the matrix [len(at), size] of linear interpolation at places 0 .. size - 1."""
    low = np.clip(np.floor(at).astype(int), 0, max(size - 2, 0))
    matrix = np.zeros((len(at), size))
    rows = np.arange(len(at))
    matrix[rows, low] = 1 - (at - low)
    matrix[rows, np.minimum(low + 1, size - 1)] += at - low
    return matrix


@lru_cache(maxsize=64)
def _octave(points: int, size: int) -> FloatArray:
    return _interpolation(np.linspace(0, points - 1, size), points)


def _fractal(size: int, decay: float, random: np.random.Generator) -> FloatArray:
    """Returns a field [size, size] in [0, 1]: octaves of noise, each finer by 2 and weaker by `decay`."""
    field = np.zeros((size, size))
    amplitude, cells = 1.0, 1
    while cells < 2 * size:
        matrix = _octave(cells + 1, size)
        field += amplitude * (matrix @ random.uniform(-1, 1, (cells + 1, cells + 1)) @ matrix.T)
        amplitude, cells = amplitude / decay, 2 * cells
    field -= field.min()
    return np.asarray(field / max(field.max(), 1e-12))
