"""Fine-tuning trains a copy, with its own rates, on a part of the labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from genssl.errors import UserError
from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.configs import FinetuneConfig
from genssl.evaluators.probes.finetune import Finetune, labelled_part

CPU = torch.device("cpu")


class Convolutions(nn.Module):
    """A small network with batch norm and dropout, its weights drawn by a seed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.1), nn.Flatten()
        )
        self.unused = nn.Linear(3, 3)  # as a projector is
        draws = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draws) * 0.1

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


@pytest.fixture(scope="module")
def data(digits_train, digits_test) -> EvaluationData:
    return EvaluationData(digits_train, digits_test, "test")


def tuned(data: EvaluationData, module: nn.Module | None = None, **settings) -> tuple[float, dict]:
    judge = Finetune(FinetuneConfig(**{"epochs": 2, "min_steps": 1, "augmentation": "none", **settings}))
    found = dict(judge.run(FrozenEncoder(module or Convolutions(), CPU), data))
    assert set(found) == {"top1"}
    return found["top1"], judge.protocol


def test_it_learns_the_digits_and_the_callers_encoder_stays_as_it_was(data):
    module = Convolutions()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    accuracy, protocol = tuned(data, module, epochs=10)
    assert accuracy > 0.9
    assert protocol["trained_on"] == 1437
    assert protocol["steps"] == 110
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module.training


def test_encoder_and_head_have_rates_of_their_own(data, monkeypatch):
    """At encoder_lr 0 only the head learns, and the encoder's rate makes a difference."""
    copies = []
    taken = FrozenEncoder.copy_of_module
    monkeypatch.setattr(FrozenEncoder, "copy_of_module", lambda self: copies.append(taken(self)) or copies[-1])
    original = Convolutions()
    tuned(data, encoder_lr=0.0)
    tuned(data, encoder_lr=0.02)
    still, moved = (copy.layers[0].weight for copy in copies)
    assert torch.equal(still, original.layers[0].weight)
    assert (moved - original.layers[0].weight).norm() > 0.01
    assert copies[0].layers[1].running_mean.abs().sum() > 0


def test_it_is_the_same_again_and_leaves_torchs_stream_alone(data):
    module = Convolutions()
    state = torch.random.get_rng_state()
    first = tuned(data, module, epochs=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)  # dropout draws from a stream of its own
    assert tuned(data, module, epochs=1)[0] == first[0]


@pytest.mark.parametrize(("fraction", "per_class"), [(0.01, 1), (0.1, 14)])
def test_a_fraction_is_of_every_class_and_smaller_ones_lie_within(data, digits_train, fraction, per_class):
    rows, labels = labelled_part(digits_train, fraction, seed=0)
    counts = np.bincount(labels, minlength=10)
    assert counts.min() >= per_class
    assert counts.max() <= per_class + 1
    assert labels == [digits_train.label(row) for row in rows]
    assert set(rows) <= set(labelled_part(digits_train, 0.5, seed=0)[0])
    assert rows != labelled_part(digits_train, fraction, seed=1)[0]


def test_few_labels_are_seen_more_often(data):
    accuracy, protocol = tuned(data, label_fraction=0.1, min_steps=60)
    assert protocol["steps"] == 60
    assert sum(protocol["labels_per_class"]) == protocol["trained_on"] < 150
    assert accuracy > 0.7


def test_test_images_are_read_once_each(data, digits_train, digits_test):
    class Counted:
        name, class_names, image_size = "digits", digits_test.class_names, 8
        reads = 0

        def __len__(self) -> int:
            return len(digits_test)

        def label(self, row: int) -> int:
            return digits_test.label(row)

        def image(self, row: int):
            self.reads += 1
            return digits_test.image(row)

    counted = Counted()
    tuned(EvaluationData(digits_train, counted, "test"), epochs=2)
    assert counted.reads == len(digits_test)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_both_optimisers_beat_the_frozen_random_encoder(data, optimizer):
    rates = {"encoder_lr": 1e-3, "head_lr": 1e-3} if optimizer == "adamw" else {}
    assert tuned(data, optimizer=optimizer, epochs=5, **rates)[0] > 0.85


def test_a_loss_that_diverges_is_one_clear_error(data):
    with pytest.raises(
        UserError, match=r"evaluate\.finetune: the loss became nan .* lower encoder_lr \(it is 1e\+20\)"
    ):
        tuned(data, encoder_lr=1e20, head_lr=1e20)
