"""Variants of what lies between a source and its neighbours: spherical interpolation of embeddings before decoding.

After Gen-SIS (arXiv 2412.01672), which decodes interpolated embeddings of two images. Here the second image is a near
neighbour in a bank, drawn by the variant's seed, so that what lies between is still about one thing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from genssl.errors import RequestRefusedError
from genssl.generators.base import EmbedsForeground, GeneratesExactly, Generator, check_defaults
from genssl.generators.parameters import Parameters
from genssl.generators.retrieval.bank import open_bank
from genssl.generators.retrieval.configs import InterpolationConfig

AMOUNT, NEIGHBOURS = "interpolation", "interpolation_neighbours"
VERSION = "interpolation/1"


class Interpolated:
    """A generator whose rows are conditioned on an embedding between the source's and a neighbour's.

    It has two parameters more: `interpolation`, 0 (the source) to 1 (the neighbour), and `interpolation_neighbours`.

    Raises:
        GeneratorError: if the bank's embeddings were kept for another conditioner.
        DataError: if its images cannot be had.
    """

    def __init__(self, generator: Generator, config: InterpolationConfig, device: torch.device) -> None:
        self._inner = generator
        self.preprocess, self.embed = generator.preprocess, generator.embed
        spec = generator.spec
        self._bank = open_bank(config, generator.preprocess, generator.embed, spec.fingerprint, device, spec.former)
        low = config.amount if isinstance(config.amount, float) else config.amount[0]
        bank = self._bank.digest
        self.spec = spec.derived(
            lambda name: hashlib.blake2b(VERSION.encode() + name + bank, digest_size=16).digest(),
            defaults=spec.defaults | {AMOUNT: low, NEIGHBOURS: config.neighbours},
        )
        if isinstance(generator, EmbedsForeground):
            self.embed_with_foreground = generator.embed_with_foreground
        check_defaults(self, spec.model)

    def check(self, parameters: Parameters) -> None:
        """Raises RequestRefusedError for an amount outside 0..1, too many neighbours, or as the generator."""
        if not 0 <= parameters[AMOUNT] <= 1:
            raise RequestRefusedError(f"parameter {AMOUNT}: {parameters[AMOUNT]} is outside 0..1")
        if not 1 <= parameters[NEIGHBOURS] < len(self._bank):
            raise RequestRefusedError(
                f"parameter {NEIGHBOURS}: {parameters[NEIGHBOURS]} is outside 1..{len(self._bank) - 1}"
            )
        self._inner.check(_without(parameters))

    def batch_key(self, parameters: Parameters) -> tuple[object, ...]:
        """See the generator's; amounts and neighbours may differ within a batch."""
        return self._inner.batch_key(_without(parameters))

    def generate(
        self, embeddings: torch.Tensor, seeds: Sequence[int], parameters: Sequence[Parameters], **hooks: Any
    ) -> torch.Tensor:
        """Makes one image a row; see `Generator.generate`."""
        between, plain = self._between(embeddings, seeds, parameters)
        return self._inner.generate(between, seeds, plain, **hooks)

    def generate_exact(
        self, embeddings: torch.Tensor, seeds: Sequence[int], parameters: Sequence[Parameters], **hooks: Any
    ) -> torch.Tensor:
        """Does as `generate`; see `GeneratesExactly`."""
        between, plain = self._between(embeddings, seeds, parameters)
        exact = self._inner.generate_exact if isinstance(self._inner, GeneratesExactly) else self._inner.generate
        return exact(between, seeds, plain, **hooks)

    def _between(
        self, embeddings: torch.Tensor, seeds: Sequence[int], parameters: Sequence[Parameters]
    ) -> tuple[torch.Tensor, list[Parameters]]:
        """Returns the embeddings [B, D] that rows are conditioned on, and the parameters of the generator itself."""
        between = []
        for embedding, seed, row in zip(embeddings, seeds, parameters, strict=True):
            amount = float(row[AMOUNT])
            if amount > 0:
                neighbour = self._bank.drawn(embedding, int(row[NEIGHBOURS]), seed)
                embedding = slerp(embedding, self._bank.embedding(neighbour), amount)
            between.append(embedding)
        return torch.stack(between), [_without(row) for row in parameters]


def slerp(first: torch.Tensor, second: torch.Tensor, amount: float) -> torch.Tensor:
    """Interpolates the directions of two embeddings [D] along the great circle, and their lengths linearly.

    Of opposite directions, between which no circle is the shortest, the chord is taken.
    """
    a, b = first.double(), second.double()
    length = torch.lerp(a.norm(), b.norm(), amount)
    a, b = F.normalize(a, dim=0), F.normalize(b, dim=0)
    angle = torch.arccos((a @ b).clamp(-1, 1))
    if torch.sin(angle) < 1e-6:
        mixed = torch.lerp(a, b, amount)
    else:
        mixed = (torch.sin((1 - amount) * angle) * a + torch.sin(amount * angle) * b) / torch.sin(angle)
    return (length * F.normalize(mixed, dim=0)).float()


def _without(parameters: Parameters) -> Parameters:
    return {name: value for name, value in parameters.items() if name not in (AMOUNT, NEIGHBOURS)}
