"""A family of generators that a package of one's own brings, by a class in the registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from miniatures import ICGAN, problems, quiet, recipe

from genssl.config.generator_recipes.base import GeneratorRecipe
from genssl.generator_training.family import GeneratorTraining
from genssl.generator_training.run import train_generator
from genssl.generators.configs import ICGANConfig
from genssl.registry import TRAINABLE


class ConstantRecipe(GeneratorRecipe):
    family: Literal["constant"] = "constant"
    grey: int = 7


class ConstantTraining(GeneratorTraining[ConstantRecipe]):
    """Trains nothing."""

    about = "One grey."

    def prepare(self) -> list[str]:
        return [] if self.recipe.grey < 256 else ["grey: is more than 255"]

    def train(self, images) -> torch.nn.Module:
        return torch.nn.Linear(1, 1)

    def write(self, place: Path, network: torch.nn.Module) -> ICGANConfig:
        (place / "grey").write_text(str(self.recipe.grey))
        return ICGANConfig(model=str(place))


@pytest.fixture
def registered(monkeypatch) -> None:
    monkeypatch.setattr(TRAINABLE, "_entries", dict(TRAINABLE._entries))
    TRAINABLE.register("constant", config=ConstantRecipe)(ConstantTraining)


TEXT = "name: mine\nfamily: constant\ndataset: {name: digits}\nquality: none\ngrey: 9\nthreads: 1\n"


def test_a_registered_family_is_trained_from_a_recipe(registered, tmp_path):
    train_generator(recipe(TEXT), tmp_path / "out", quiet())
    assert (tmp_path / "out" / "grey").read_text() == "9"
    assert "One grey." in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "card.json").read_text())["recipe"]["family"] == "constant"


def test_its_sections_are_its_own(registered):
    assert problems(TEXT + "denoiser: {steps: 3}\n")[0].startswith("miniature.yaml:7: denoiser: unknown key")
    assert "allowed: constant, flow, icgan, stable_unclip" in problems(ICGAN.replace("icgan\n", "icgun\n", 1))[0]
