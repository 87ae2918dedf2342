"""Recipes that say whose hyper-parameters they have have them: settings, and the loss to its scale.

Settings stand here as solo-learn (vturrisi/solo-learn, 9187ea3, scripts/pretrain/cifar), the paper's released code
(VectorInstitute/GenerativeSSL, ce99451) and lightly (lightly-ai/lightly, e8d317f) have them; losses are written here as
their formulas are there. Of both, nothing is taken from genssl.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.generators.configs import UNCLIP_PRESETS
from genssl.methods.base import Views
from genssl.registry import METHODS
from genssl.training.update import build_optimizer
from genssl.views.augment import Augment

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CIFAR = ("simclr", "byol", "barlow_twins", "moco", "nnclr", "simsiam", "vicreg")
IMAGENET = ("simclr", "byol", "barlow_twins", "moco", "simsiam")
FOLLOWING = [f"{folder}/{name}" for folder in ("cifar10", "cifar100") for name in CIFAR]
FOLLOWING += [*(f"imagenet/{name}" for name in IMAGENET), "imagenette/simclr"]


def recipe_of(name: str, *overrides: str) -> Recipe:
    return load(Recipe, RECIPES / f"{name}.yaml", list(overrides))


def header_of(name: str) -> str:
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


# ---- settings

# Brightness, contrast, saturation and hue; probability of blur; smallest crop; of solarisation in view 1 and in view 2.
SYMMETRIC = ((0.8, 0.8, 0.8, 0.2), 0.5, 0.08, (0.0, 0.0))
SYMMETRIC_WEAK = ((0.4, 0.4, 0.4, 0.1), 0.5, 0.08, (0.0, 0.0))
ASYMMETRIC = ((0.4, 0.4, 0.2, 0.1), 0.0, 0.08, (0.0, 0.2))


@dataclass
class Solo:
    """One of solo-learn's files for CIFAR: what differs between them."""

    optimizer: tuple[str, float, float]  # name, lr for 256 images, weight decay
    widths: tuple[int, int, int | None]  # hidden and output of the projector, hidden of the predictor
    augmentation: tuple[Any, float, float, tuple[float, float]]
    method: dict[str, float] = field(default_factory=dict)


SOLO = {
    "simclr": Solo(("lars", 0.4, 1e-4), (2048, 256, None), SYMMETRIC, {"temperature": 0.2}),
    "byol": Solo(("lars", 1.0, 1e-5), (4096, 256, 4096), ASYMMETRIC, {"momentum_start": 0.99, "momentum_end": 1.0}),
    "barlow_twins": Solo(
        ("lars", 0.3, 1e-4), (2048, 2048, None), ASYMMETRIC, {"loss_scale": 0.1, "off_diagonal_weight": 0.0051}
    ),
    "moco": Solo(
        ("sgd", 0.3, 1e-4),
        (2048, 256, None),
        SYMMETRIC_WEAK,
        {"temperature": 0.2, "queue_size": 32768, "momentum_start": 0.99, "momentum_end": 0.999},
    ),
    "nnclr": Solo(("lars", 0.4, 1e-5), (2048, 256, 4096), ASYMMETRIC, {"temperature": 0.2, "queue_size": 65536}),
    "simsiam": Solo(("sgd", 0.5, 1e-5), (2048, 2048, 512), SYMMETRIC_WEAK),
    # Weights 25, 25 and 1 there; the variance term, of which there is the sum and here the mean, is tested below.
    "vicreg": Solo(
        ("lars", 0.3, 1e-4),
        (2048, 2048, None),
        ((0.4, 0.4, 0.2, 0.1), 0.0, 0.2, (0.1, 0.1)),
        {"invariance_weight": 25.0, "covariance_weight": 1.0},
    ),
}


@pytest.mark.parametrize("folder", ["cifar10", "cifar100"])
@pytest.mark.parametrize("name", CIFAR)
def test_cifar_recipes_have_solo_learns_settings(name, folder):
    recipe, solo = recipe_of(f"{folder}/{name}"), SOLO[name]
    optimizer, method, train = recipe.optimizer, recipe.method.model_dump(), recipe.train
    assert recipe.dataset.name == folder
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == solo.optimizer
    assert (optimizer.lr_rule, optimizer.momentum) == ("linear", 0.9)
    if optimizer.name == "lars":
        assert (optimizer.trust_coefficient, optimizer.clip) == (0.02, True)
    widths = (method["projector_hidden_dim"], method["projector_output_dim"], method.get("predictor_hidden_dim"))
    assert widths == solo.widths
    assert {key: method[key] for key in solo.method} == solo.method
    assert method["batch_statistics"] == "per_view"
    assert (train.epochs, train.batch_size, train.accumulate, train.precision) == (1000, 256, 1, "fp16")
    assert (recipe.schedule.name, recipe.schedule.warmup_epochs, recipe.seed) == ("cosine", 10, 5)
    assert recipe.backbone.name == "resnet18"
    jitter, blur, smallest, solarize = solo.augmentation
    for view in (0, 1):
        made = recipe.views.augmentation.of_view(view)
        assert (made.brightness, made.contrast, made.saturation, made.hue) == jitter
        assert (made.jitter_probability, made.grayscale_probability, made.flip_probability) == (0.8, 0.2, 0.5)
        assert (made.crop_scale, made.crop_ratio) == ((smallest, 1.0), (3 / 4, 4 / 3))
        assert (made.blur_probability, made.solarize_probability) == (blur, solarize[view])
        assert blur == 0 or made.blur_sigma == (0.1, 2.0)


def test_the_imagenette_recipe_has_lightlys_settings():
    recipe = recipe_of("imagenette/simclr")
    optimizer, method, train = recipe.optimizer, recipe.method.model_dump(), recipe.train
    assert (optimizer.name, optimizer.lr, optimizer.lr_rule, optimizer.weight_decay, optimizer.momentum) == (
        *("sgd", 0.06, "linear", 5e-4),
        0.9,
    )
    assert (method["projector_hidden_dim"], method["projector_output_dim"], method["temperature"]) == (512, 128, 0.5)
    assert (train.epochs, train.batch_size, recipe.schedule.warmup_epochs) == (800, 256, 0)
    assert (recipe.dataset.image_size, recipe.backbone.name) == (128, "resnet18")  # type: ignore[attr-defined]
    made = recipe.views.augmentation
    assert made.second is None
    assert (made.brightness, made.contrast, made.saturation, made.hue) == (0.4, 0.4, 0.4, 0.1)  # 0.5 x .8, .8, .8, .2
    assert (made.crop_scale, made.blur_probability, made.blur_sigma) == ((0.08, 1.0), 0.5, (0.1, 2.0))


# ---- losses


class Given(nn.Module):
    """A backbone whose features are its input."""

    feature_dim = 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def features(seed: int, n: int = 8) -> torch.Tensor:
    return 0.7 * torch.randn((n, Given.feature_dim), generator=torch.Generator().manual_seed(seed))


def method_of(name: str) -> Any:
    """Returns a recipe's method without its heads: projections are the images, and predictions a linear map of them."""
    recipe = recipe_of(name)
    narrow = {key: Given.feature_dim for key in type(recipe.method).model_fields if key.endswith("output_dim")}
    narrow |= {"queue_size": 16} if "queue_size" in type(recipe.method).model_fields else {}
    method = METHODS.get(recipe.method.name)(recipe.method.model_copy(update=narrow), Given())
    for part in ("projector", "target_projector", "key_projector"):
        if hasattr(method, part):
            setattr(method, part, nn.Identity())
    if hasattr(method, "predictor"):
        torch.manual_seed(0)
        method.predictor = nn.Linear(Given.feature_dim, Given.feature_dim)
    return method


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=1, keepdim=True)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (unit(a) * unit(b)).sum(dim=1).mean()


def solo_simclr(z: list[torch.Tensor], temperature: float = 0.2, **_: Any) -> torch.Tensor:
    both = unit(torch.cat(z))
    n = len(z[0])
    likeness = (both @ both.T / temperature).exp()
    total = torch.zeros(())
    for i in range(2 * n):
        positive = likeness[i, (i + n) % (2 * n)]
        negative = sum(likeness[i, k] for k in range(2 * n) if k % n != i % n)
        total = total - (positive / (positive + negative)).log() / (2 * n)
    return total


def solo_byol(z: list[torch.Tensor], p: list[torch.Tensor], **_: Any) -> torch.Tensor:
    return (2 - 2 * cosine(p[1], z[0])) + (2 - 2 * cosine(p[0], z[1]))


def solo_simsiam(z: list[torch.Tensor], p: list[torch.Tensor], **_: Any) -> torch.Tensor:
    return -cosine(p[0], z[1]) / 2 - cosine(p[1], z[0]) / 2


def solo_barlow(z: list[torch.Tensor], scale: float = 0.1, **_: Any) -> torch.Tensor:
    first, second = ((x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-5).sqrt() for x in z)
    difference = (first.T @ second / len(first) - torch.eye(Given.feature_dim)).square()
    kept = torch.eye(Given.feature_dim) + 0.0051 * (1 - torch.eye(Given.feature_dim))
    return scale * (kept * difference).sum()


def solo_vicreg(z: list[torch.Tensor], **_: Any) -> torch.Tensor:
    loss = 25 * (z[0] - z[1]).square().mean()
    for x in z:
        loss = loss + 25 * (1 - (x.var(dim=0) + 1e-4).sqrt()).clamp(min=0).mean()  # the sum over the views
        covariance = torch.cov(x.T)
        loss = loss + (covariance - covariance.diagonal().diag()).square().sum() / Given.feature_dim
    return loss


def solo_moco(z: list[torch.Tensor], queue: torch.Tensor, **_: Any) -> torch.Tensor:
    total = torch.zeros(())
    for q, k in ((unit(z[0]), unit(z[1])), (unit(z[1]), unit(z[0]))):
        logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / 0.2
        total = total - logits.log_softmax(dim=1)[:, 0].mean() / 2
    return total


def solo_nnclr(z: list[torch.Tensor], p: list[torch.Tensor], queue: torch.Tensor, **_: Any) -> torch.Tensor:
    total = torch.zeros(())
    for this, other in ((0, 1), (1, 0)):
        neighbours = queue[(unit(z[this]) @ queue.T).argmax(dim=1)]
        logits = neighbours @ unit(p[other]).T / 0.2
        total = total - logits.log_softmax(dim=1).diagonal().mean() / 2
    return total


LOSSES: dict[str, Any] = {
    **dict(
        zip(CIFAR, (solo_simclr, solo_byol, solo_barlow, solo_moco, solo_nnclr, solo_simsiam, solo_vicreg), strict=True)
    ),
    "imagenet/barlow_twins": lambda z, **given: solo_barlow(z, scale=0.048),
    "imagenette/simclr": lambda z, **given: solo_simclr(z, temperature=0.5),
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_a_recipes_loss_is_that_of_its_source(name):
    method = method_of(name)
    z = [features(1), features(2)]
    images = [x[:, :, None, None] for x in z]
    p = [method.predictor(x) for x in z] if hasattr(method, "predictor") else []
    queue = method.queue.keys.clone() if hasattr(method, "queue") else None
    formula = LOSSES.get(name) or LOSSES[name.partition("/")[2]]
    loss = method.step(Views(pair=(images[0], images[1]))).loss
    torch.testing.assert_close(loss, formula(z, p=p, queue=queue), rtol=1e-5, atol=1e-6)


# ---- what headers say


@pytest.mark.parametrize("name", FOLLOWING)
def test_headers_name_the_deviations_that_the_code_has(name):
    header, recipe = header_of(name), recipe_of(name)
    method = METHODS.get(recipe.method.name)(recipe.method, Given())
    assert re.search(r"Deviations from .* that change results:", header)
    assert "Images go in as 0..1, there normalised by" in header  # nothing between views and backbone normalises
    assert ("bilinear filter, there by a bicubic one" in header) == (not name.startswith("imagenette"))
    groups = build_optimizer(recipe.optimizer, nn.BatchNorm1d(4), 256).param_groups
    assert groups[1]["weight_decay"] == 0.0
    # LARS leaves biases and norms alone there too.
    assert ("No weight decay on biases and norms" in header) == (recipe.optimizer.name == "sgd")
    assert ("The stem pads by 1" in header) == name.startswith("cifar")
    assert ("The warm-up begins at" in header) == (recipe.schedule.warmup_epochs > 0)
    blur = Augment(recipe.views.augmentation.of_view(0), recipe.dataset.image_size)  # type: ignore[attr-defined]
    narrow = blur.config.blur_probability > 0 and blur.blur_radius < 3 * blur.config.blur_sigma[1]
    if narrow:
        assert f"The blur's kernel is {2 * blur.blur_radius + 1} pixels wide" in header
    else:
        assert "blur's kernel" not in header
    batch_norm = any(isinstance(part, nn.BatchNorm1d) for part in method.projector)
    assert ("The projector has batch norm after its hidden layer" in header) == (
        recipe.method.name == "simclr" and batch_norm and not name.startswith("imagenette")
    )
    assert ("no bias in their last layer" in header) == (recipe.method.name == "byol")
    assert ("One queue holds the keys of both views" in header) == (recipe.method.name == "moco")
    assert ("predictor's learning rate follows the schedule" in header) == (recipe.method.name == "simsiam")
    assert ("momentum's schedule is a step ahead" in header) == hasattr(recipe.method, "momentum_start")


def test_no_file_that_ships_advises_float16_for_stable_diffusion_2():
    """A preset of genssl says that the model overflows in it; the advice is a block that loads, and has no warning."""
    assert {preset["dtype"] for preset in UNCLIP_PRESETS.values()} == {"bfloat16"}
    advised = 0
    for path in [*RECIPES.rglob("*.yaml"), *(RECIPES.parent / "servers").glob("*.yaml")]:
        text = " ".join(line.lstrip("# ") for line in path.read_text().splitlines())
        assert "dtype: float16" not in text, path
        for block in re.findall(r"'(generator=\{name: stable_unclip, model: FOLDER-OR-HUB-ID[^']*)'", text):
            recipe = load(Recipe, path, [block, "variants.source=stored", "variants.store=x", "variants.per_image=10"])
            assert recipe.generator is not None
            assert recipe.generator.warnings() == []
            advised += 1
            (warning,) = load(Recipe, path, [block.replace("bfloat16", "float16")]).generator.warnings()
            assert warning.startswith("dtype: float16 overflows in Stable Diffusion 2")
    assert advised == 6
