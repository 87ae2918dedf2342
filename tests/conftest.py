"""Real parts that many tests use: the digits, the built-in generator, a recipe that is quick to run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from short_runs import RECIPE, SHORT

from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.data.configs import DigitsConfig
from genssl.data.digits import Digits
from genssl.generators.configs import StableUnCLIPConfig

ROOT = Path(__file__).resolve().parent.parent
pytest_plugins = ["server_fixtures"]
BUILTIN = "builtin:digits-unclip"


def pytest_configure() -> None:
    torch.set_num_threads(1)  # test processes and the servers they start share two cores


@pytest.fixture(scope="session")
def digits_train() -> Digits:
    return Digits(DigitsConfig(), "train")


@pytest.fixture(scope="session")
def digits_test() -> Digits:
    return Digits(DigitsConfig(), "test")


@pytest.fixture(scope="session")
def unclip():
    """The built-in generator with the settings of recipes/simclr_sd.yaml, in this process."""
    from genssl.generators.diffusion.stable_unclip import StableUnCLIP

    config = StableUnCLIPConfig(model=BUILTIN, num_inference_steps=2, guidance_scale=1.0, noise_level=300)
    return StableUnCLIP(config, torch.device("cpu"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of twenty-four images, 24 x 20 pixels, of two classes that differ in brightness."""
    root: Path = tmp_path_factory.mktemp("photos")
    draws = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (root / name).mkdir()
        for number in range(12):
            pixels = np.clip(draws.normal(level, 20, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture
def quick_recipe():
    """Returns a function that loads recipes/simclr_sd.yaml cut down to seconds, with overrides on top."""

    def make(*overrides: str) -> Recipe:
        return load(Recipe, RECIPE, [*SHORT, "evaluate=[knn]", *overrides])

    return make
