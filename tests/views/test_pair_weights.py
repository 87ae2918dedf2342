"""Pairs with like foregrounds and unlike backgrounds count more, by GenView's formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genssl.backbones.configs import ResNet18Config
from genssl.backbones.resnet import build_resnet
from genssl.base.devices import seeded_initialisation
from genssl.config.views import PairWeightsConfig
from genssl.errors import ConfigError, GeneratorError
from genssl.generators.conditioner import save_encoder
from genssl.methods.base import Views
from genssl.views.pair_weights import PairWeights, foreground_direction, pair_quality

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run directory as far as it matters here."""
    config = ResNet18Config(width=4, stem="small")
    path = tmp_path_factory.mktemp("run")
    with seeded_initialisation("pair weights"):
        save_encoder(path / "encoder.safetensors", build_resnet(config), config, image_size="8")
    return path


def naive(first: np.ndarray, second: np.ndarray, direction: np.ndarray, gamma: float) -> np.ndarray:
    """One pair after the other, one position after the other, in float64."""
    scores = []
    for one, other in zip(first, second, strict=True):
        means = []
        for maps in (one, other):
            tokens = maps.reshape(len(maps), -1).T
            projection = np.array([token @ direction for token in tokens])
            mask = (projection - projection.min()) / (projection.max() - projection.min())
            means.append([sum(w * token for w, token in zip(part, tokens, strict=True)) for part in (mask, 1 - mask)])
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(means[0], means[1], strict=True)]
        scores.append(np.exp(gamma * (cosines[0] - cosines[1])))
    return np.array(scores) / np.mean(scores)


def test_quality_is_the_formula():
    draws = torch.Generator().manual_seed(0)
    first, second = (torch.randn((7, 5, 4, 6), generator=draws) for _ in range(2))
    direction = torch.nn.functional.normalize(torch.randn(5, generator=draws), dim=0)
    score = torch.exp(2.0 * pair_quality(first, second, direction))
    expected = naive(first.double().numpy(), second.double().numpy(), direction.double().numpy(), 2.0)
    assert (score / score.mean()).numpy() == pytest.approx(expected, rel=1e-4)


def scene(inside: tuple[float, ...], outside: tuple[float, ...]) -> torch.Tensor:
    """A map [4, 6, 6] of which the first channel says foreground, and the others what is there."""
    maps = torch.empty((4, 6, 6))
    maps[:] = torch.tensor([0.0, *outside]).view(4, 1, 1)
    maps[:, 2:4, 2:4] = torch.tensor([1.0, *inside]).view(4, 1, 1)
    return maps


def test_the_foreground_is_found_whatever_the_sign():
    draws = torch.Generator().manual_seed(1)
    maps = torch.stack([scene((0, 0, 0), (0, 0, 0)) for _ in range(20)])
    maps += 0.05 * torch.randn(maps.shape, generator=draws)
    assert foreground_direction(maps)[0] > 0.98
    flipped = maps * torch.tensor([-1.0, 1, 1, 1]).view(1, 4, 1, 1)
    assert foreground_direction(flipped)[0] < -0.98


def test_like_foregrounds_and_unlike_backgrounds_are_best():
    cat, dog, grass, sand = (3.0, 0, 0), (0, 3.0, 0), (0, 0, 3.0), (3.0, 0, 3.0)
    first = torch.stack([scene(cat, grass)] * 4)
    second = torch.stack([scene(cat, sand), scene(cat, grass), scene(dog, sand), scene(dog, grass)])
    best, same, other, worst = pair_quality(first, second, torch.tensor([1.0, 0, 0, 0])).tolist()
    assert best > same > worst
    assert best > other > worst
    assert same == pytest.approx(0, abs=1e-4)


def test_weights_have_mean_one_and_no_gradient(folder, digits_train):
    weigh = PairWeights(PairWeightsConfig(encoder=folder, gamma=3.0), digits_train, CPU)
    images = torch.from_numpy(np.stack([digits_train.image(row) for row in range(24)])).float() / 255
    views = Views(pair=(images, images.flip(3).requires_grad_()))
    weights = weigh(views).pair_weights
    assert weights is not None
    assert weights.shape == (24,)
    assert not weights.requires_grad
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
    assert float(weights.std()) > 0.01
    same = weigh(Views(pair=(images, images))).pair_weights
    assert same is not None
    assert same.numpy() == pytest.approx(1, abs=1e-3), "a pair of equal views is as good as any other"
    again = PairWeights(PairWeightsConfig(encoder=folder, gamma=3.0), digits_train, CPU)(views).pair_weights
    assert again is not None
    assert torch.equal(weights, again)


def test_an_encoder_of_fewer_stages_judges_by_those_it_has(digits_train, tmp_path):
    config = ResNet18Config(width=4, stem="small", stages=1)
    save_encoder(tmp_path / "encoder.safetensors", build_resnet(config), config, image_size="8")
    images = torch.from_numpy(np.stack([digits_train.image(row) for row in range(8)])).float() / 255
    weights = PairWeights(PairWeightsConfig(encoder=tmp_path), digits_train, CPU)(Views(pair=(images, images.flip(3))))
    assert weights.pair_weights is not None
    assert float(weights.pair_weights.std()) > 0


def test_what_cannot_judge_is_told(folder, digits_train, tmp_path):
    with pytest.raises(GeneratorError, match="cannot be read"):
        PairWeights(PairWeightsConfig(encoder=tmp_path), digits_train, CPU)
    config = ResNet18Config(width=4, stem="imagenet")
    save_encoder(tmp_path / "encoder.safetensors", build_resnet(config), config, image_size="8")
    with pytest.raises(ConfigError, match=r"resnet18 has no feature map of 4x4 for images of 8 pixels"):
        PairWeights(PairWeightsConfig(encoder=tmp_path), digits_train, CPU)
