"""How much the variants of a source differ to the eye: mean LPIPS between them (StarGAN v2, arXiv 1912.01865)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from genssl.data.base import UInt8Array
from genssl.evaluators.base import EvaluationData, FrozenEncoder, as_float
from genssl.evaluators.metric_configs import LPIPSDiversityConfig
from genssl.evaluators.variants.compared import draw, facts, made, require, split_of
from genssl.evaluators.variants.lpips import SMALLEST, find_heads, find_weights, load_lpips

SOURCES = 16  # whose activations are in memory at a time


class LPIPSDiversity:
    """Judges the generator alone: the encoder plays no part."""

    Config = LPIPSDiversityConfig

    def __init__(self, config: LPIPSDiversityConfig) -> None:
        self._config = config
        self.protocol: dict[str, Any] = {}

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
