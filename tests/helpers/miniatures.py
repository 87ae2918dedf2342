"""Trainings of generators that take a second, and little to judge them on; for the tests beside this file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from genssl.config.documents.document import parse_document
from genssl.config.generator_recipes.base import GeneratorRecipe
from genssl.config.validate import validate
from genssl.errors import ConfigError
from genssl.generators.models import BUILTIN
from genssl.quality import measures as generator_quality

FLOW = f"""
name: miniature
family: flow
dataset: {{name: digits}}
conditioner: {{run: {BUILTIN / "digits-flow"}}}
flow: {{block_out_channels: [16, 16], steps: 6, batch_size: 64}}
threads: 1
"""
ICGAN = f"""
name: miniature
family: icgan
dataset: {{name: digits}}
conditioner: {{run: {BUILTIN / "digits-icgan"}}}
generator: {{channels: [16, 16], feature_width: 8, noise_chunk: 4, attention: [0]}}
discriminator: {{channels: [16]}}
adversarial: {{steps: 6, batch_size: 8, translation: 0.125}}
threads: 1
"""
UNCLIP = """
name: miniature
family: stable_unclip
dataset: {name: digits}
image_encoder: {hidden_size: 16, num_layers: 1, num_heads: 2, embedding_dim: 16, epochs: 1}
autoencoder: {block_out_channels: [8, 8], epochs: 1}
denoiser: {block_out_channels: [16, 16], steps: 6}
threads: 1
"""


def recipe(text: str) -> GeneratorRecipe:
    return validate(GeneratorRecipe, parse_document(text, "miniature.yaml"))


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        recipe(text)
    return caught.value.problems


def quiet() -> Console:
    return Console(file=io.StringIO())


def judge_little(patch: pytest.MonkeyPatch) -> None:
    """The settings of `SWEEPS`, thousands of images each, are for real trainings."""
    for name in list(generator_quality.SWEEPS):
        patch.setitem(generator_quality.SWEEPS, name, generator_quality.Sweep({}, ({},)))
    patch.setitem(generator_quality.EFFORTS, "quick", generator_quality.Effort(32, 200, 1e8))
    patch.setattr(generator_quality, "VARIANTS", 2)
