"""What every method must do: gradients, state, generated views, determinism, and learning."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from toys import SMALL, draw_views, make

from genssl.backbones.configs import ResNet18Config
from genssl.backbones.resnet import build_resnet
from genssl.base.devices import stream
from genssl.errors import ConfigError
from genssl.methods.base import Views

METHOD = pytest.mark.parametrize("name", SMALL)
MOMENTUM = {"byol": "target_", "moco": "key_", "dino": "teacher_"}


def resnet() -> nn.Module:
    return build_resnet(ResNet18Config(stem="small", width=4))


def train(method: Any, steps: range, total: int, *, lr: float = 0.05, n: int = 8, **view_settings: Any) -> list[float]:
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr)  # no momentum of its own: the method's state is all there is
    losses = []
    for step in steps:
        loss = method.step(draw_views(n, step, **view_settings)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step((step + 1) / total)
        losses.append(loss.item())
    return losses


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


# ---- Gradients ----


@METHOD
def test_every_trained_parameter_gets_a_gradient_and_momentum_networks_none(name):
    method = make(name, resnet)
    method.step(draw_views(7, crops=2 * (name == "dino"))).loss.backward()
    for key, parameter in method.named_parameters():
        momentum = name in MOMENTUM and key.startswith(MOMENTUM[name])
        assert parameter.requires_grad != momentum, key
        assert (parameter.grad is None) if momentum else (parameter.grad.abs().sum() > 0), key


@pytest.mark.parametrize("name", ["simsiam", "byol", "moco", "nnclr", "dino"])
def test_no_gradient_flows_through_the_stopped_branch(name, monkeypatch):
    """Where a stop-gradient is missing, the loss has a gradient with respect to its targets."""
    module = sys.modules[type(make(name)).__module__]
    function = {"simsiam": "negative_cosine", "byol": "byol", "moco": "info_nce", "nnclr": "nnclr", "dino": "dino"}[
        name
    ]
    loss = getattr(module, function)
    targets_and_sources = []

    def spy(first: torch.Tensor, second: torch.Tensor, *rest: Any) -> torch.Tensor:
        targets_and_sources.append((first, second) if name in ("nnclr", "dino") else (second, first))
        return loss(first, second, *rest)

    monkeypatch.setattr(module, function, spy)
    make(name).step(draw_views(5, generated=1))
    assert len(targets_and_sources) >= 3
    assert all(source.requires_grad and not target.requires_grad for target, source in targets_and_sources)


def test_simsiam_without_its_stop_gradient_has_another_gradient():
    """The analytic gradient of one direction with the target held fixed, against the method's."""
    method, views = make("simsiam", batch_statistics="shared").double(), draw_views(5)
    views = Views(tuple(view.double() for view in views.pair))
    method.step(views).loss.backward()
    weight = method.backbone.layers[0].weight
    ours = weight.grad.clone()

    def gradient(*, stopped: bool) -> torch.Tensor:
        z = method.projector(method.backbone(torch.cat(views.pair)))
        p1, p2 = method.predictor(z).chunk(2)
        z1, z2 = (z.detach() if stopped else z).chunk(2)
        loss = -(torch.cosine_similarity(p1, z2).mean() + torch.cosine_similarity(p2, z1).mean()) / 2
        return torch.autograd.grad(loss, weight)[0]

    torch.testing.assert_close(ours, gradient(stopped=True))
    assert not torch.allclose(ours, gradient(stopped=False), rtol=0.1)


# ---- State ----


@METHOD
def test_equal_seeds_make_equal_methods_and_leave_the_global_stream_alone(name):
    before = torch.random.get_rng_state()
    first, second, other = make(name), make(name), make(name, seed=1)
    assert equal(first.state_dict(), second.state_dict())
    assert not equal(first.state_dict(), other.state_dict())
    for method in (first, second):
        train(method, range(2), 4)
    assert equal(first.state_dict(), second.state_dict())
    assert torch.equal(torch.random.get_rng_state(), before)


@METHOD
def test_two_halves_with_a_state_dict_between_are_the_whole_bit_for_bit(name, tmp_path):
    """lightly's MoCo bank is not in its state dict: there a resumed run goes on with random negatives."""
    whole, first = make(name, resnet), make(name, resnet)
    expected = train(whole, range(6), 6, n=7)
    losses = train(first, range(3), 6, n=7)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make(name, resnet, seed=5)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    losses += train(second, range(3, 6), 6, n=7)
    assert losses == expected
    assert equal(second.state_dict(), whole.state_dict())


@METHOD
def test_a_step_changes_nothing_but_running_statistics(name):
    method = make(name, resnet)
    before = copy.deepcopy(method.state_dict())
    method.step(draw_views(6))
    changed = {key for key, value in method.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(key.rsplit(".", 1)[-1] in ("running_mean", "running_var", "num_batches_tracked") for key in changed)


@METHOD
def test_encode_returns_backbone_features(name):
    method = make(name, resnet).eval()
    images = torch.rand(3, 3, 8, 8)
    assert method.encode(images).shape == (3, method.feature_dim) == (3, 32)
    assert torch.equal(method.encode(images), method.backbone(images))


# ---- Views ----


@METHOD
def test_real_and_generated_views_share_one_batch_of_statistics(name):
    """Forwards of their own would normalise each kind apart, and the running statistics would fit neither."""
    for batch_statistics, batches in (("shared", [12]), ("per_view", [4, 4, 4])):
        method, seen = make(name, resnet, batch_statistics=batch_statistics), []
        method.backbone.bn1.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(len(inputs[0])))
        method.step(draw_views(4, generated=1))
        assert seen == batches


@METHOD
def test_generated_views_are_compared_with_the_first_view_with_their_weight(name):
    """The added loss is the weighted mean of what the method gives the pairs (first, generated)."""
    views = draw_views(6, generated=2)
    light, heavy = (make(name, generated_weight=weight).double() for weight in (0.5, 2.0))
    double = Views(*(tuple(view.double() for view in some) for some in (views.pair, views.generated)))

    def loss(method: Any, views: Views) -> float:
        return method.eval().step(views).loss.item()  # eval: the pairs' batch norms see other batches

    plain = loss(light, replace(double, generated=()))
    if name == "dino":  # one direction only: the teacher sees no generated view
        first = double.pair[0]
        teacher = light.teacher_head(light.teacher_backbone(first)) / light.teacher_temperature
        added = []
        for view in double.generated:
            student = light.head(light.backbone(view)) / light.config.student_temperature
            added.append(nn.functional.cross_entropy(student, teacher.softmax(1)).item())
    else:
        added = [loss(light, Views((double.pair[0], view))) for view in double.generated]
    assert loss(light, double) == pytest.approx(plain + 0.5 * sum(added) / 2, rel=1e-6)
    assert loss(heavy, double) == pytest.approx(plain + 2.0 * sum(added) / 2, rel=1e-6)
    metrics = light.step(double).metrics
    assert metrics["loss_pair"] == pytest.approx(plain, rel=1e-6)
    assert metrics["loss_generated"] == pytest.approx(sum(added) / 2, rel=1e-6)


def test_multi_positive_simclr_has_all_views_of_a_source_as_positives():
    method, views = make("simclr", multi_positive=True), draw_views(5, generated=2)
    z = method.projector(method.backbone(torch.cat([*views.pair, *views.generated])))
    z = nn.functional.normalize(z, dim=1)
    logits = (z @ z.T / method.config.temperature).fill_diagonal_(float("-inf"))
    positives = torch.eye(5).repeat(4, 4).fill_diagonal_(0) / 3
    log_p = logits.log_softmax(1).masked_fill(torch.eye(20, dtype=torch.bool), 0)
    expected = -(positives * log_p).sum(1).mean()
    torch.testing.assert_close(method.step(views).loss, expected)


@METHOD
def test_a_pair_of_weight_zero_does_not_count(name):
    """Where a method has negatives or statistics of the batch, the source is still among them."""
    weights = torch.tensor([2.0, 2, 0, 0])
    views = replace(draw_views(4), pair_weights=weights)
    method = make(name).double()
    double = replace(views, pair=tuple(view.double() for view in views.pair), pair_weights=weights.double())
    some = replace(double, pair=tuple(view[:2] for view in double.pair), pair_weights=None)
    weighted, plain = (method.eval().step(one).loss.item() for one in (double, some))
    if name in ("simclr", "nnclr", "vicreg"):  # negatives, or the batch's variances
        assert weighted != pytest.approx(plain)
        equally = replace(double, pair_weights=None)
        assert weighted != pytest.approx(method.step(equally).loss.item())
    else:
        assert weighted == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in SMALL if name != "dino"])
def test_crops_are_refused_rather_than_ignored(name):
    with pytest.raises(ConfigError, match=f"^method {name}: cannot use the small views of multi-crop; use method dino"):
        make(name).step(draw_views(4, crops=2))


# ---- Learning ----


def toy_batch(step: int, n: int = 32, num_sources: int = 512) -> Views:
    """Two noisy views of some of the fixed sources."""
    sources = torch.rand((num_sources, 3, 8, 8), generator=stream("sources"))
    generator = stream("batch", step)
    chosen = sources[torch.randperm(num_sources, generator=generator)[:n]]
    first, second = (chosen + 0.15 * torch.randn(chosen.shape, generator=generator) for _ in range(2))
    return Views((first, second))


def learn(method: Any, steps: int, lr: float, num_sources: int = 512) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        loss = method.step(toy_batch(step, num_sources=num_sources)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step((step + 1) / steps)
        losses.append(loss.item())
    return losses


def spread(method: Any) -> float:
    """Standard deviation of unit features over the sources: 0 when collapsed, at most 1."""
    with torch.no_grad():
        features = nn.functional.normalize(method.encode(toy_batch(-1, 512).pair[0]), dim=1)
    return float(features.std(dim=0).norm())


@pytest.mark.parametrize("name", [name for name in SMALL if name != "dino"])
def test_the_loss_falls_and_the_features_do_not_collapse(name):
    method = make(name, **({"queue_size": 256} if name == "moco" else {}))
    losses = learn(method, 120, lr=0.001 if name == "moco" else 0.002)
    # Not the first ten: a queue of random keys is easier than one of real ones.
    assert sum(losses[-10:]) < sum(losses[10:20])
    assert spread(method) > 0.1


@pytest.mark.slow
def test_dinos_outputs_become_distinct_and_certain():
    """Its loss starts low, since at first all outputs agree, rises to log K, and falls after some hundred steps.

    The entropy of the mean output minus the mean entropy, the information that outputs have about their source, is 0
    in both kinds of collapse.
    """
    temperatures = {"teacher_temperature_start": 0.02, "teacher_temperature": 0.04, "teacher_warmup": 0.3}
    sizes = {"num_prototypes": 64, "projector_hidden_dim": 64, "bottleneck_dim": 32}
    method = make("dino", momentum_start=0.99, **temperatures, **sizes)
    learn(method, 2500, lr=5e-4, num_sources=64)
    with torch.no_grad():
        images = toy_batch(-1, 64, num_sources=64).pair[0]
        logits = method.teacher_head(method.teacher_backbone(images)) - method.centre
    p = (logits / method.teacher_temperature).softmax(dim=1)

    def entropy(p: torch.Tensor) -> torch.Tensor:
        return torch.special.entr(p).sum(dim=-1)

    assert entropy(p.mean(dim=0)) - entropy(p).mean() > 0.3
