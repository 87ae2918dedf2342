"""GenView's quality-driven weights: pairs that agree in the foreground and differ in the background count more.

Li et al. 2024, "GenView" (arXiv 2403.12003), in the form of its released code. Deviations: the frozen encoder is one
that genssl trained, where GenView takes CLIP's ConvNeXt; the direction that tells foreground from background comes from
images of the run's own training set; and since the sign of a principal component is arbitrary, foreground is the side
that the middle of the images is on, on average.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from genssl.base.gather import mean_over_ranks
from genssl.config.views import PairWeightsConfig
from genssl.data.base import ImageDataset
from genssl.errors import ConfigError
from genssl.generators.conditioner import FILE, load_encoder
from genssl.methods.base import Views

STAGES = ("layer1", "layer2", "layer3", "layer4")
SMALLEST_MAP = 4  # a side; below it, a mask has no room to tell foreground from background
IMAGES, AT_ONCE = 256, 64  # for the principal component
EPSILON = 1e-7


def foreground_direction(maps: torch.Tensor) -> torch.Tensor:
    """Returns the first principal component, float [D] of length 1, of feature maps float [N, D, h, w].

    It is that of all their positions, and points to the foreground.
    """
    positions = maps.movedim(1, 3).reshape(-1, maps.shape[1]).double()
    direction: torch.Tensor = torch.linalg.eigh(torch.cov(positions.T)).eigenvectors[:, -1]
    projection = torch.einsum("ndhw,d->hw", maps.double(), direction)
    rows, columns = (side // 4 for side in projection.shape)
    middle = projection[rows : projection.shape[0] - rows, columns : projection.shape[1] - columns]
    return (direction if middle.mean() >= projection.mean() else -direction).to(maps)


def pair_quality(first: torch.Tensor, second: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Returns how much more alike the foregrounds of two views are than their backgrounds, float [B] in [-2, 2].

    That is the cosine of the foregrounds' mean features minus that of the backgrounds', of feature maps float [B, D, h,
    w]. Foreground is a soft mask, the projection on `direction`, float [D], scaled to 0..1 over each map; background is
    the rest.
    """
    parts = []
    for maps in (first, second):
        projection = torch.einsum("bdhw,d->bhw", maps, direction).flatten(1)
        low, high = projection.min(dim=1, keepdim=True).values, projection.max(dim=1, keepdim=True).values
        mask = (projection - low) / (high - low + EPSILON)
        for weights in (mask, 1 - mask):
            share = weights / (weights.sum(dim=1, keepdim=True) + EPSILON)
            parts.append(torch.einsum("bdn,bn->bd", maps.flatten(2), share))
    return F.cosine_similarity(parts[0], parts[2]) - F.cosine_similarity(parts[1], parts[3])


class PairWeights:
    """Weighs the pairs of a batch by exp(gamma quality), scaled to mean 1 over the global batch.

    Feature maps are those of the encoder's last stage that are at least 4x4; the views are judged as augmented.

    Args:
        config: the encoder's run directory, and gamma.
        dataset: of the run; images spread evenly over it give the direction of the foreground.
        device: of the views.

    Raises:
        GeneratorError: if the folder holds no encoder.
        ConfigError: if the encoder has no feature maps, or none that large.
    """

    def __init__(self, config: PairWeightsConfig, dataset: ImageDataset, device: torch.device) -> None:
        backbone, block, _ = load_encoder(config.encoder / FILE)
        stages = [getattr(backbone, stage) for stage in STAGES if hasattr(backbone, stage)]
        if not stages:
            raise ConfigError([f"views.pair_weights.encoder: {block.name} has no feature maps; give that of a ResNet"])
        self._backbone = backbone.to(device).eval().requires_grad_(False)
        self._name, self._gamma, self._device = block.name, config.gamma, device
        self._maps: list[torch.Tensor] = []
        for stage in stages:
            stage.register_forward_hook(lambda module, given, result: self._maps.append(result))
        rows = np.unique(np.linspace(0, len(dataset) - 1, min(IMAGES, len(dataset))).astype(int))
        parts = []
        for start in range(0, len(rows), AT_ONCE):
            images = np.stack([dataset.image(int(row)) for row in rows[start : start + AT_ONCE]])
            parts.append(self._feature_maps(torch.from_numpy(images).to(device).float() / 255))
        self._direction = foreground_direction(torch.cat(parts))

    def __call__(self, views: Views) -> Views:
        """Returns the views with `pair_weights` float [B]; no gradient flows through them."""
        first, second = (self._feature_maps(view) for view in views.pair)
        score = torch.exp(self._gamma * pair_quality(first, second, self._direction))
        return replace(views, pair_weights=score / mean_over_ranks(score.mean()))

    @torch.no_grad()
    def _feature_maps(self, images: torch.Tensor) -> torch.Tensor:
        self._maps.clear()
        self._backbone(images)
        large = [maps for maps in self._maps if min(maps.shape[2:]) >= SMALLEST_MAP]
        self._maps.clear()
        if not large:
            raise ConfigError(
                [
                    f"views.pair_weights.encoder: {self._name} has no feature map of {SMALLEST_MAP}x{SMALLEST_MAP} for "
                    f"images of {images.shape[-1]} pixels; give an encoder with stem: small, or larger images"
                ]
            )
        return large[-1]
