"""Alignment and uniformity on the unit sphere (Wang and Isola 2020, arXiv 2005.10242)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from genssl.base.devices import stream
from genssl.data.base import UInt8Array
from genssl.evaluators.base import EvaluationData, EvaluatorBase, FrozenEncoder, as_float
from genssl.evaluators.configs import AlignmentUniformityConfig
from genssl.evaluators.representation.rankme import drawn_rows, require_two
from genssl.views.augment import Augment

IMAGES = 256  # encoded, and asked of the generator, at a time
CHUNK = 1024  # rows of the matrix of distances at a time


class AlignmentUniformity(EvaluatorBase[AlignmentUniformityConfig]):
    """How close the views of an image are, and how evenly the images fill the sphere; lower is better for both.

    A pair of real views is two standard views of an image. A pair of a real view and a generated one is the first of
    them and a standard view of the image's variant, by the same draw as the second: what the two alignments differ by
    is the variant's.
    """

    Config = AlignmentUniformityConfig

    def check(self, data: EvaluationData) -> None:
        """Raises DataError if there is one image only."""
        require_two(data.test if self._config.split == "test" else data.train, "evaluate.alignment_uniformity")

    def run(self, encoder: FrozenEncoder, data: EvaluationData) -> Iterator[tuple[str, float]]:
        """Yields alignment and uniformity of real views, and those with variants where there is a generator.

        Names: "alignment_real_real", "uniformity_real", "alignment_real_variant", "uniformity_variant".
        """
        config = self._config
        dataset = data.test if config.split == "test" else data.train
        rows = drawn_rows(dataset, config.images, "alignment_uniformity", config.seed)
        augment = Augment(config.augmentation, dataset.image_size)

        def view(number: int, start: int, images: UInt8Array) -> torch.Tensor:
            floats = as_float(torch.from_numpy(images).to(encoder.device))
            draws = stream("alignment_uniformity augment", config.seed, number, start)
            return encoder.encode(augment(floats, draws))

        first, second, generated = [], [], []
        for start in range(0, len(rows), IMAGES):
            part = rows[start : start + IMAGES]
            images = torch.stack([torch.from_numpy(dataset.image(row)) for row in part]).numpy()
            first.append(view(0, start, images))
            second.append(view(1, start, images))
            if data.variants is not None:
                generated.append(view(1, start, data.variants(dataset, part, config.variant_index)))
        self.protocol = {
            "images": len(rows),
            "split": data.test_name if config.split == "test" else "train",
            "alpha": config.alpha,
            "t": config.t,
            "augmentation": config.augmentation.settings(),
            "seed": config.seed,
            "variant_index": config.variant_index if generated else None,
        }
        real = torch.cat(first)
        yield "alignment_real_real", alignment(real, torch.cat(second), config.alpha)
        yield "uniformity_real", uniformity(real, config.t)
        if generated:
            yield "alignment_real_variant", alignment(real, torch.cat(generated), config.alpha)
            yield "uniformity_variant", uniformity(torch.cat(generated), config.t)


def alignment(x: torch.Tensor, y: torch.Tensor, alpha: float = 2.0) -> float:
    """Returns the mean of |x_i - y_i|^alpha over pairs of rows of x and y float [N, D], scaled to unit length.

    Section 4.1; 0 is best, 2^alpha worst.
    """
    x, y = F.normalize(x.double(), dim=1), F.normalize(y.double(), dim=1)
    return float((x - y).norm(dim=1).pow(alpha).mean())


def uniformity(x: torch.Tensor, t: float = 2.0) -> float:
    """Returns log of the mean of exp(-t |x_i - x_j|^2) over pairs i < j of rows of x float [N, D], at unit length.

    Section 4.1; 0 is worst (one point), -4 t is what no set reaches. Memory is bounded by chunks of 1,024 rows.
    """
    x = F.normalize(x.double(), dim=1)
    logs = []
    for start in range(0, len(x), CHUNK):
        part = x[start : start + CHUNK]
        exponents = -t * (2 - 2 * part @ x.T).clamp(min=0)  # of unit vectors the squared distance is 2 - 2 cos
        own = torch.arange(len(part))
        exponents[own, start + own] = -math.inf
        logs.append(exponents.flatten().logsumexp(dim=0))
    return float(torch.stack(logs).logsumexp(dim=0)) - math.log(len(x) * (len(x) - 1))
