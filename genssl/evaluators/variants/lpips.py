"""LPIPS, the learned perceptual distance of image patches (Zhang et al. 2018, arXiv 1801.03924), on AlexNet."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import AlexNet_Weights

from genssl.data.base import UInt8Array
from genssl.errors import UserError
from genssl.evaluators.base import EvaluationData, EvaluatorBase, FrozenEncoder, as_float
from genssl.evaluators.configs import LPIPSDiversityConfig
from genssl.evaluators.variants.compared import draw, facts, made, require, split_of

MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1], as in the authors' code
CONVOLUTIONS = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1))
POOLED = (0, 1)  # convolutions whose output is pooled before the next
SMALLEST = 64  # pixels; below, the last maps of AlexNet have next to no room
HEADS = Path("functional", "image", "lpips_models", "alex.pth")
FETCH = 'python -c "from torchvision.models import *; alexnet(weights=AlexNet_Weights.IMAGENET1K_V1)"'


class LPIPS(nn.Module):
    """Distance of images: weighted squared differences of unit-length activations, averaged over space, summed.

    Version 0.1 of the authors' code, with linear heads. `load_lpips` makes it with its weights.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (inputs, outputs, kernel, stride, padding) in enumerate(CONVOLUTIONS):
            layers += [nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.ReLU()]
            layers += [nn.MaxPool2d(3, 2)] if number in POOLED else []
        self.features = nn.Sequential(*layers)  # numbered as torchvision's
        self.heads = nn.ParameterList(torch.empty(outputs) for _, outputs, *_ in CONVOLUTIONS)

    def activations(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Returns five maps [B, C, h, w], each pixel of length 1, of images float [B, 3, H, W] in [0, 1].

        Images below 64 pixels are enlarged to that, bilinearly.
        """
        if min(images.shape[-2:]) < SMALLEST:
            images = F.interpolate(images, size=(SMALLEST, SMALLEST), mode="bilinear", align_corners=False)
        mean, std = (images.new_tensor(one).view(3, 1, 1) for one in (MEAN, STD))
        x, found = (2 * images - 1 - mean) / std, []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x / (x.square().sum(dim=1, keepdim=True) + 1e-8).sqrt())
        return found

    def forward(self, first: list[torch.Tensor], second: list[torch.Tensor]) -> torch.Tensor:
        """Returns the distances float [B] of images, given their activations."""
        distances = [
            torch.einsum("bchw,c->bhw", (one - other).square(), head).mean(dim=(1, 2))
            for one, other, head in zip(first, second, self.heads, strict=True)
        ]
        return torch.stack(distances).sum(dim=0)


def load_lpips(weights: Path | None = None) -> LPIPS:
    """Returns LPIPS with AlexNet's ImageNet weights and the authors' heads, which torchmetrics ships.

    Nothing is downloaded.

    Args:
        weights: torchvision's file of AlexNet; by default the one that torch.hub keeps.

    Raises:
        UserError: if torchmetrics is not installed, or the file is absent or another.
    """
    heads, path = find_heads(), find_weights(weights)
    backbone, linear = _read(path, "evaluate.lpips_diversity.weights"), _read(heads, "evaluate.lpips_diversity")
    state = {name: value for name, value in backbone.items() if name.startswith("features.")}
    with torch.device("meta"):  # no weights are drawn, only to be overwritten
        network = LPIPS()
    try:
        state |= {f"heads.{number}": linear[f"lin{number}.model.1.weight"].flatten() for number in range(5)}
        network.load_state_dict(state, assign=True)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"evaluate.lpips_diversity.weights: {path} is not torchvision's AlexNet ({reason}); get it with: {FETCH}"
        ) from None
    return network.eval().requires_grad_(False)


def find_heads() -> Path:
    """Returns the file of the linear heads; raises UserError without torchmetrics."""
    found = importlib.util.find_spec("torchmetrics")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "evaluate.lpips_diversity: LPIPS needs torchmetrics, which is not installed; run "
            "`pip install 'genssl[metrics]'`, or leave this evaluator out"
        )
    path = Path(found.submodule_search_locations[0]) / HEADS
    if not path.is_file():
        raise UserError(
            f"evaluate.lpips_diversity: the installed torchmetrics has no {HEADS}; run "
            "`pip install --upgrade 'genssl[metrics]'`"
        )
    return path


def find_weights(weights: Path | None) -> Path:
    """Returns the file of AlexNet; raises UserError if it is not there."""
    kept = Path(torch.hub.get_dir()) / "checkpoints" / Path(AlexNet_Weights.IMAGENET1K_V1.url).name
    path = (weights or kept).expanduser()
    if not path.is_file():
        raise UserError(
            f"evaluate.lpips_diversity.weights: torchvision's AlexNet weights are not in {path}; get them with: {FETCH}"
        )
    return path


def _read(path: Path, setting: str) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"it holds a {type(state).__name__}")
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{setting}: {path} cannot be read as weights ({reason}); get it again") from None
    return state


SOURCES = 16  # whose activations are in memory at a time


class LPIPSDiversity(EvaluatorBase[LPIPSDiversityConfig]):
    """Judges the generator alone: the encoder plays no part."""

    Config = LPIPSDiversityConfig

    def check(self, data: EvaluationData) -> None:
        """Raises DataError without variants or a second image, and UserError if LPIPS cannot be had."""
        require(self._config, data, 2)
        find_heads()
        find_weights(self._config.weights)

    def run(self, encoder: FrozenEncoder, data: EvaluationData) -> Iterator[tuple[str, float]]:
        """Yields mean distances, 0 for equal images.

        Names: "diversity", between the variants of a source; "to_source", between a source and its variants;
        "between_sources", between real images, in the random order of the draw.
        """
        config = self._config
        rows = draw(config, data, config.images)
        network = load_lpips(config.weights).to(encoder.device)
        split = split_of(config, data)
        sources = np.stack([split.image(row) for row in rows])
        variants = [np.concatenate(list(made(config, data, rows, index))) for index in range(config.variants)]
        self.protocol = {
            "distance": f"LPIPS 0.1 on AlexNet; images below {SMALLEST} pixels enlarged to that",
            "images": len(rows),
            "variants_of_a_source": config.variants,
            **facts(config, data),
        }
        with torch.inference_mode():
            yield from distances(network.activations, network, sources, variants, encoder.device)


def distances(
    activations: Callable[[torch.Tensor], list[torch.Tensor]],
    distance: Callable[[list[torch.Tensor], list[torch.Tensor]], torch.Tensor],
    sources: UInt8Array,
    variants: Sequence[UInt8Array],
    device: torch.device,
) -> Iterator[tuple[str, float]]:
    """Yields the means that `LPIPSDiversity.run` does.

    Args:
        activations: of images float [B, 3, H, W] in [0, 1]: whatever `distance` takes.
        distance: of two batches of activations, float [B].
        sources: uint8 [N, 3, H, W], in a random order.
        variants: of every source, M arrays like `sources`.
        device: where it is computed.
    """
    within, to_source, between, before = [], [], [], None
    for start in range(0, len(sources), SOURCES):
        real, *made_of = (
            activations(as_float(torch.from_numpy(images[start : start + SOURCES]).to(device)))
            for images in (sources, *variants)
        )
        within += [distance(one, other) for one, other in combinations(made_of, 2)]
        to_source += [distance(real, one) for one in made_of]
        # The neighbours in a random order; the last image of a part meets the first of the next.
        between.append(distance([one[:-1] for one in real], [one[1:] for one in real]))
        if before is not None:
            between.append(distance(before, [one[:1] for one in real]))
        before = [one[-1:] for one in real]
    for name, found in (("diversity", within), ("to_source", to_source), ("between_sources", between)):
        yield name, float(torch.cat(found).double().mean())
