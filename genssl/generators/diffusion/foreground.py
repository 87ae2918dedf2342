"""How much of a source is foreground, from the feature map of a vision transformer.

GenView (arXiv 2403.12003, section 3.2) takes the first principal component of CLIP's patch features, scaled to 0..1, as
a map of the foreground. It fits the component on a sample of the data set; here it is fitted on the image's own
patches, so that the number depends on nothing but the source, and its sign, which is then open, is the one that puts
less of the border into the foreground.
"""

from __future__ import annotations

import torch

THRESHOLD = 0.5  # of the scaled component, from which on a patch is foreground


def foreground_ratio(patches: torch.Tensor) -> torch.Tensor:
    """Returns the part of patches that are foreground.

    Args:
        patches: float [B, h * w, C], features of a square map, row by row.

    Returns:
        float32 [B] in 0..1, on the CPU; 0 for a map without any contrast.
    """
    side = round(patches.shape[1] ** 0.5)
    assert side * side == patches.shape[1], "the feature map is square"
    centred = patches.cpu().double()
    centred = centred - centred.mean(dim=1, keepdim=True)
    # The scores on the first component are the first eigenvector of the Gram matrix, up to scale.
    values, vectors = torch.linalg.eigh(centred @ centred.transpose(1, 2))
    scores = vectors[:, :, -1]
    low, high = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
    scaled = (scores - low) / (high - low).clamp(min=1e-12)
    grid = torch.zeros(side, side, dtype=torch.bool)
    grid[[0, -1]] = True
    grid[:, [0, -1]] = True
    border = grid.flatten()
    if not border.all():
        outward = scaled[:, border].mean(dim=1) > scaled[:, ~border].mean(dim=1)
        scaled = torch.where(outward[:, None], 1 - scaled, scaled)
    ratio = (scaled > THRESHOLD).float().mean(dim=1)
    return torch.where(values[:, -1] > 1e-9, ratio, torch.zeros_like(ratio))
