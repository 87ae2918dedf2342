"""The linear probe: each optimiser against scikit-learn, the many heads against one head in autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from genssl.errors import DataError, UserError
from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.configs import LinearProbeConfig
from genssl.evaluators.probes.linear_heads import LinearHeads, standardisation
from genssl.evaluators.probes.linear_probe import LinearProbe, split_off

CPU = torch.device("cpu")


class RandomFeatures(torch.nn.Module):
    """Random features of the pixels, of which a linear classifier can make much."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.weights = torch.nn.Parameter(torch.randn((192, 128), generator=draws) / 4)

    def encode(self, images):
        return (images.flatten(1) @ self.weights - 0.3).relu()


@pytest.fixture(scope="module")
def data(digits_train, digits_test) -> EvaluationData:
    return EvaluationData(digits_train, digits_test, "test")


@pytest.fixture(scope="module")
def by_scikit_learn(data) -> float:
    """Accuracy of logistic regression on standardised features, at the penalty that suits them."""
    encoder = FrozenEncoder(RandomFeatures(), CPU)
    train, test = encoder.features(data.train), encoder.features(data.test)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
    classifier.fit(train.features.numpy(), train.labels.numpy())
    return float(classifier.score(test.features.numpy(), test.labels.numpy()))


@pytest.mark.parametrize("optimizer", ["lbfgs", "sgd", "lars"])
def test_every_optimiser_is_within_half_a_point_of_scikit_learn(data, by_scikit_learn, optimizer):
    probe = LinearProbe(LinearProbeConfig(optimizer=optimizer))
    found = dict(probe.run(FrozenEncoder(RandomFeatures(), CPU), data))
    assert found["top1"] == pytest.approx(by_scikit_learn, abs=0.005)
    assert probe.protocol["tested_on"] == "test"
    assert probe.protocol["trained_on"] == 1437


def test_augmented_features_are_of_the_images_that_the_seed_draws(data):
    """Without augmentation they are the precomputed ones, so the whole training is the same."""
    settings = {"optimizer": "sgd", "epochs": 3, "learning_rates": [0.1], "weight_decays": [0.0]}
    encoder = FrozenEncoder(RandomFeatures(), CPU)
    precomputed = dict(LinearProbe(LinearProbeConfig(**settings)).run(encoder, data))
    still = LinearProbe(LinearProbeConfig(**settings, features="augmented", augmentation="none"))
    assert dict(still.run(encoder, data)) == precomputed
    cropped = LinearProbeConfig(**settings, features="augmented", augmentation={"preset": "crop_only"})
    one, other = (dict(LinearProbe(cropped).run(encoder, data)) for _ in range(2))
    assert one == other != precomputed


def in_autograd(x, y, *, rate, decay, rule, steps, first) -> tuple[torch.Tensor, torch.Tensor]:
    """One head by torch's gradients, float64, batch by batch; the updates written out as the docstring has them."""
    weights, bias = first.double().clone().requires_grad_(), torch.zeros(first.shape[1]).double().requires_grad_()
    momenta = [torch.zeros_like(weights), torch.zeros_like(bias)]
    for step in range(steps):
        loss = F.cross_entropy(x[step].double() @ weights + bias, y[step])
        gradient, of_bias = torch.autograd.grad(loss, [weights, bias])
        with torch.no_grad():
            update = gradient + decay * weights
            if rule == "lars":
                update *= 0.05 * weights.norm() / (gradient.norm() + decay * weights.norm())
            lr = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            for parameter, momentum, change in zip((weights, bias), momenta, (update, of_bias), strict=True):
                momentum.mul_(0.9).add_(change)
                parameter -= lr * momentum
    return weights, bias


@pytest.mark.parametrize("rule", ["sgd", "lars"])
def test_heads_learn_side_by_side_as_each_would_alone(rule):
    random = torch.Generator().manual_seed(1)
    x, y = torch.randn((12, 16, 5), generator=random), torch.randint(0, 3, (12, 16), generator=random)
    settings = [(0.1, 0.0), (0.1, 0.05), (1.0, 0.0), (0.003, 0.2)]
    heads = LinearHeads(
        dim=5,
        classes=3,
        rates=[rate for rate, _ in settings],
        decays=[decay for _, decay in settings],
        rule=rule,
        trust=0.05,
        mean=torch.zeros(5),
        deviation=torch.ones(5),
        steps=12,
        seed=0,
        device=CPU,
    )
    first = heads.weights[0].clone()
    assert all(torch.equal(head, first) for head in heads.weights)
    for features, labels in zip(x, y, strict=True):
        heads.step(features, labels)
    for head, (rate, decay) in enumerate(settings):
        weights, bias = in_autograd(x, y, rate=rate, decay=decay, rule=rule, steps=12, first=first)
        torch.testing.assert_close(heads.weights[head].double(), weights, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heads.biases[head].double(), bias, rtol=1e-4, atol=1e-5)
        expected = ((x.flatten(0, 1).double() @ weights + bias).argmax(dim=1) == y.flatten()).double().mean()
        assert heads.accuracies(x.flatten(0, 1), y.flatten())[head] == pytest.approx(expected.item())


def test_standardisation_is_of_the_rows_and_leaves_constants_alone():
    random = np.random.default_rng(0)
    features = random.standard_normal((300, 4)) * [1, 10, 0.1, 0] + [0, 5, 1, 7]
    rows = random.permutation(300)[:100]
    mean, deviation = standardisation(torch.from_numpy(features).float(), torch.from_numpy(rows))
    assert mean.numpy() == pytest.approx(features[rows].mean(axis=0), rel=1e-4)
    assert deviation[:3].numpy() == pytest.approx(features[rows].std(axis=0)[:3], rel=1e-4)
    assert deviation[3] == 1


def test_settings_are_chosen_on_train_and_rates_that_diverge_are_not(data):
    probe = LinearProbe(
        LinearProbeConfig(optimizer="sgd", epochs=5, learning_rates=[1e-6, 0.1], weight_decays=[0.0, 1e30])
    )
    found = dict(probe.run(FrozenEncoder(RandomFeatures(), CPU), data))
    assert (probe.protocol["learning_rate"], probe.protocol["weight_decay"]) == (0.1, 0.0)
    assert probe.protocol["chosen_on"].startswith("288 held-out train images")
    assert found["top1"] > 0.9
    alone = LinearProbe(LinearProbeConfig(optimizer="sgd", epochs=5, learning_rates=[0.1], weight_decays=[0.0]))
    assert dict(alone.run(FrozenEncoder(RandomFeatures(), CPU), data)) == found, "the fit on all of train is the same"
    assert alone.protocol["chosen_on"] == "nothing: there is one candidate"
    diverging = LinearProbe(LinearProbeConfig(optimizer="sgd", epochs=5, weight_decays=[1e30]))
    with pytest.raises(UserError, match="diverged with every one of the 6 settings"):
        dict(diverging.run(FrozenEncoder(RandomFeatures(), CPU), data))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 3}, "epochs has no effect with lbfgs"),
        ({"features": "augmented"}, "features has no effect with lbfgs"),
        ({"optimizer": "sgd", "penalties": [1.0]}, "penalties has no effect with sgd"),
        ({"optimizer": "sgd", "trust_coefficient": 0.001}, "trust_coefficient has no effect with sgd"),
        ({"optimizer": "lars", "augmentation": "none"}, "no effect on precomputed features"),
        ({"optimizer": "lars", "learning_rates": [0.0]}, "greater than 0"),
    ],
)
def test_a_setting_without_effect_is_an_error(settings, message):
    with pytest.raises(ValidationError, match=message):
        LinearProbeConfig(**settings)


def test_a_config_can_be_written_out_and_read_back():
    config = LinearProbeConfig(optimizer="sgd", features="augmented", epochs=7)
    assert LinearProbeConfig.model_validate(config.model_dump()) == config
    assert LinearProbeConfig.model_validate(LinearProbeConfig().model_dump()) == LinearProbeConfig()


def test_a_part_too_small_for_the_classes_is_one_clear_error():
    with pytest.raises(DataError, match=r"held_out: 0\.1 of 12 train images cannot be held out"):
        split_off(np.repeat(np.arange(6), 2), 0.1, seed=0)
