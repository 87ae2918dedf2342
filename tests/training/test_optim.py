"""Optimisers and schedule against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from genssl.config.recipe import OptimizerConfig, ScheduleConfig
from genssl.training.update import LARS, build_optimizer, lr_factor, peak_lr


@pytest.mark.parametrize("clip", [True, False])
def test_lars_follows_its_formula_over_two_steps(clip):
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    bias = nn.Parameter(torch.tensor([1.0]))
    lr, momentum, decay, eta = 0.5, 0.9, 0.1, 0.02 if clip else 3.0  # 3: a rate that would be clipped
    groups = [{"params": [weight]}, {"params": [bias], "weight_decay": 0.0, "adapt": False}]
    optimizer = LARS(groups, lr=lr, momentum=momentum, weight_decay=decay, trust_coefficient=eta, clip=clip)
    w, b, velocity_w, velocity_b = torch.tensor([[3.0, 4.0]]), 1.0, torch.zeros(1, 2), 0.0
    for gradient in (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])):
        weight.grad, bias.grad = gradient.clone(), torch.tensor([2.0])
        optimizer.step()
        trust = eta * w.norm() / (gradient.norm() + decay * w.norm())
        local = min(trust / lr, 1.0) if clip else trust
        velocity_w = momentum * velocity_w + local * (gradient + decay * w)
        w = w - lr * velocity_w
        velocity_b = momentum * velocity_b + 2.0
        b = b - lr * velocity_b
        assert torch.allclose(weight, w)
        assert bias.item() == pytest.approx(b)


def test_lars_adapts_without_weight_decay_and_survives_zero_gradients():
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = LARS([weight], lr=1.0, momentum=0.0, weight_decay=0.0, trust_coefficient=0.02)
    weight.grad = torch.tensor([[10.0, 0.0]])
    optimizer.step()
    assert weight[0, 0].item() == pytest.approx(3.0 - 0.02 * 5 / 10 * 10)
    weight.grad = torch.zeros(1, 2)
    optimizer.step()
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_biases_and_norms_have_no_weight_decay(name):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = build_optimizer(OptimizerConfig(name=name, lr=0.1, weight_decay=0.5), module, 256)
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert decay == {id(parameter): 0.5 if parameter.ndim > 1 else 0.0 for parameter in module.parameters()}


def test_the_linear_rule_scales_with_the_batch():
    assert peak_lr(OptimizerConfig(lr=0.3, lr_rule="linear"), 1024) == pytest.approx(1.2)
    assert peak_lr(OptimizerConfig(lr=0.3), 1024) == 0.3


def test_the_schedule_is_warm_up_then_half_a_cosine():
    schedule = ScheduleConfig(warmup_epochs=2)
    factors = [lr_factor(schedule, step, 10, 10) for step in range(100)]
    assert factors[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert factors[20] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 79 / 80)))
    assert lr_factor(ScheduleConfig(name="constant"), 99, 10, 10) == 1.0
