"""The optimiser step: nothing more than the plain one by default, and what every switch does."""

from __future__ import annotations

import pytest
import torch
from short_runs import run_and_read, without_pictures
from torch import nn

from genssl.base.devices import seeded_initialisation
from genssl.config.recipe import Recipe, TrainConfig
from genssl.errors import UserError
from genssl.evaluators.splits import load_splits
from genssl.methods.base import StepOutput, Views
from genssl.registry import BACKBONES, METHODS
from genssl.training.supply.steps import view_plan
from genssl.training.update import Update, build_optimizer, chunks, lr_factor
from genssl.views.augmentations import Augmentations
from genssl.views.compose import compose_views

CPU = torch.device("cpu")


def test_by_default_a_run_is_the_plain_loop_to_the_bit(quick_recipe, tmp_path, monkeypatch):
    """Pins the default path: what monitors, checkpoints, precision and ranks add must not touch the weights."""
    without_pictures(monkeypatch)
    recipe = quick_recipe("variants.source=none", "evaluate=[]", "monitor.knn_every_epochs=1", "train.batch_size=287")
    run_and_read(recipe, tmp_path / "out")
    trained = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["method"]
    expected = plain_loop(recipe)
    assert all(torch.equal(trained[name], value) for name, value in expected.items())


def plain_loop(recipe: Recipe) -> dict[str, torch.Tensor]:
    """The training of a recipe without variants, written down once more."""
    train = load_splits(recipe).train
    plan, augmentations = view_plan(recipe, len(train)), Augmentations(recipe.views, train.image_size)
    with seeded_initialisation("model", recipe.seed):
        backbone = BACKBONES.get(recipe.backbone.name)(recipe.backbone)
        method = METHODS.get(recipe.method.name)(recipe.method, backbone)
    method.train()
    optimizer = build_optimizer(recipe.optimizer, method, recipe.train.batch_size)
    for step in range(plan.steps_per_epoch):
        step_plan = plan.step(0, step)
        sources = torch.stack([torch.from_numpy(train.image(int(row))) for row in step_plan.rows])
        views = compose_views(step_plan, sources, None, augmentations, recipe.seed, CPU)
        for group in optimizer.param_groups:
            group["lr"] = recipe.optimizer.lr * lr_factor(recipe.schedule, step, plan.steps_per_epoch, 1)
        optimizer.zero_grad()
        method.step(views).loss.backward()
        optimizer.step()
    return method.state_dict()


class Regression(nn.Module):
    """A method whose loss is a mean over rows, so that micro-batches change nothing."""

    def __init__(self) -> None:
        super().__init__()
        with seeded_initialisation("regression"):
            self.layer = nn.Conv2d(3, 4, 3)
            self.dropout = nn.Dropout(0.0)
        self.seen: list[tuple[torch.Size, torch.dtype, bool]] = []

    def step(self, views: Views) -> StepOutput:
        images = views.pair[0]
        output = self.layer(self.dropout(images))
        self.seen.append((images.shape, output.dtype, images.is_contiguous(memory_format=torch.channels_last)))
        return StepOutput(loss=output.float().square().mean(), metrics={"rows": float(len(images))})


def step(dropout: float = 0.0, name: int = 0, **settings: object) -> tuple[Regression, float, dict[str, float]]:
    method = Regression()
    method.dropout.p = dropout
    config = TrainConfig(epochs=1, batch_size=8, **settings)
    update = Update(method, torch.optim.SGD(method.parameters(), lr=1.0), config, CPU)
    images = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    weights = torch.arange(8.0)
    loss, metrics = update(Views(pair=(images, images.flip(0)), pair_weights=weights), 0.1, 7, name)
    return method, loss, metrics


def test_micro_batches_add_up_to_the_batch():
    whole, loss, _ = step()
    parts, same, metrics = step(accumulate=4)
    assert [shape[0] for shape, _, _ in parts.seen] == [2, 2, 2, 2]
    assert torch.allclose(whole.layer.weight, parts.layer.weight, atol=1e-7)
    assert loss == pytest.approx(same)
    assert metrics == {"rows": 2.0}


def test_a_part_has_its_rows_of_everything():
    rows = torch.arange(6.0)
    images = rows.view(6, 1, 1, 1).expand(6, 3, 2, 2)
    views = Views(pair=(images, -images), generated=(2 * images,), crops=(3 * images,), pair_weights=rows)
    second = chunks(views, 3)[1]
    for part, factor in ((second.pair[0], 1), (second.pair[1], -1), (second.generated[0], 2), (second.crops[0], 3)):
        assert part[:, 0, 0, 0].tolist() == [factor * 2.0, factor * 3.0]
    assert second.pair_weights.tolist() == [2.0, 3.0]


def test_the_norm_of_the_gradient_is_clipped():
    before = Regression().layer.weight
    free, clipped = step()[0], step(clip_grad_norm=0.01)[0]
    assert (free.layer.weight - before).norm() > 0.01 * 0.1
    moved = torch.cat([(clipped.layer.weight - before).flatten(), clipped.layer.bias - Regression().layer.bias])
    assert moved.norm().item() == pytest.approx(0.01 * 0.1, rel=1e-3)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_lower_precision_is_of_the_forward_pass_alone(precision, dtype):
    exact, loss, _ = step()
    method, near, _ = step(precision=precision)
    assert method.seen[0][1] == dtype
    assert method.layer.weight.dtype == torch.float32
    assert near == pytest.approx(loss, rel=0.02)
    assert torch.allclose(exact.layer.weight, method.layer.weight, atol=0.02)


def test_channels_last_reaches_the_method():
    method, loss, _ = step(channels_last=True)
    assert method.seen[0][2]
    assert loss == pytest.approx(step()[1])


def test_dropout_depends_on_the_step_alone():
    first = step(dropout=0.5)[1]
    torch.rand(3)
    assert step(dropout=0.5)[1] == first
    assert step(dropout=0.5, name=1)[1] != first


def test_unequal_micro_batches_are_refused(quick_recipe):
    with pytest.raises(UserError, match=r"train.accumulate: .*batch_size 128 does not divide into 3 micro-batches"):
        quick_recipe("train.accumulate=3")


@pytest.mark.parametrize("setting", ["channels_last", "compile"])
def test_a_backbone_that_would_crash_torch_is_refused(quick_recipe, setting):
    with pytest.raises(UserError, match=rf"train: train.{setting} needs backbone.width 8 or more, found 4"):
        quick_recipe(f"train.{setting}=true")
    assert quick_recipe(f"train.{setting}=true", "backbone.width=8")


@pytest.mark.slow
def test_a_compiled_backbone_trains_alike(quick_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))  # others' were made for other CPUs
    losses = []
    for compiled in ("false", "true"):
        recipe = quick_recipe(
            "variants.source=none",
            "evaluate=[]",
            "train.batch_size=478",
            "backbone.width=8",
            f"train.compile={compiled}",
        )
        run_and_read(recipe, tmp_path / compiled)
        losses.append(torch.load(tmp_path / compiled / "checkpoint.pt", weights_only=True)["method"])
    assert losses[0].keys() == losses[1].keys()
    weight = "backbone.conv1.weight"
    name = weight if weight in losses[0] else next(iter(losses[0]))
    assert torch.allclose(losses[0][name], losses[1][name], atol=1e-2)
