"""Every recipe of a run that ships with genssl takes two steps, on images of its own kind and with a narrow network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from short_runs import run_and_read

from genssl.config.documents.document import read_document
from genssl.config.load import load, model_of
from genssl.config.recipe import Recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ALL = sorted(path for path in RECIPES.rglob("*.yaml") if model_of(read_document(path)) is Recipe)
QUICK = ["train.epochs=1", "schedule.warmup_epochs=0", "train.threads=1", "train.workers=0", "train.precision=fp32"]
QUICK += ["evaluate=[]", "monitor.images=8", "monitor.knn_every_epochs=null", "backbone.width=8"]
DEFAULT = ("imagenet/byol", "cifar10/barlow_twins")
BATCH = 8  # of 16 images and a few, so an epoch has two steps


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """Sixteen train and four validation images of two classes, in ImageNet's layout."""
    root: Path = tmp_path_factory.mktemp("data") / "imagenet"
    draws = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for wnid in ("n01440764", "n02102040"):
            (root / split / wnid).mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / wnid / f"{wnid}_{number}.JPEG")
    classes = {"n01440764": ("tench",), "n02102040": ("English springer",)}
    torch.save((classes, ["n01440764", "n02102040"] * 2), root / "meta.bin")
    return root


def small(recipe: Recipe) -> list[str]:
    """Returns overrides that make a recipe's method small; what they name exists in its block."""
    limits = {"queue_size": 16, "num_prototypes": 32}
    settings = recipe.method.model_dump()
    overrides = [f"method.{name}=16" for name in settings if name.endswith("_dim")]
    return overrides + [f"method.{name}={limit}" for name, limit in limits.items() if name in settings]


def two_steps(path: Path, out: Path, *overrides: str) -> list[dict[str, Any]]:
    """Runs a recipe for an epoch of two steps and returns the rows of its log."""
    recipe = load(Recipe, path, [*QUICK, *small(load(Recipe, path)), *overrides])
    run_and_read(recipe, out)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_there_are_recipes_of_every_kind():
    folders = {path.parent.relative_to(RECIPES).as_posix() for path in ALL}
    assert {".", "imagenet", "cifar10", "cifar100", "imagenette", "photos"} <= folders


# Of the paper's released code: optimiser, learning rate for 256 images, weight decay, trust coefficient and clipping of
# LARS, images a step, micro-batches, widths of projector and predictor, and what else the method has.
RELEASED: dict[str, tuple[Any, ...]] = {
    "simclr": ("lars", 0.3, 1e-6, (0.02, True), 1024, 1, (4096, 512, None), {"temperature": 0.2}),
    "simsiam": ("sgd", 0.5, 1e-5, None, 256, 1, (4096, 4096, 512), {}),
    "byol": (
        "lars",
        0.2,
        1.5e-6,
        (0.001, False),
        16384,
        16,
        (4096, 256, 4096),
        {"momentum_start": 0.99, "momentum_end": 1.0},
    ),
    "barlow_twins": (
        "lars",
        0.8,
        1.5e-6,
        (0.001, False),
        256,
        1,
        (4096, 4096, None),
        {"off_diagonal_weight": 0.0051, "loss_scale": 0.048},
    ),
    "moco": (
        "sgd",
        0.3,
        3e-5,
        None,
        256,
        1,
        (2048, 256, None),
        {"queue_size": 65536, "temperature": 0.2, "momentum_start": 0.99, "momentum_end": 0.999},
    ),
}
SYMMETRIC = ((0.5, 0.0), (0.5, 0.0))  # probability of blur and solarisation, view by view
ASYMMETRIC = ((1.0, 0.0), (0.1, 0.2))
JITTER = {"simclr": (0.8, 0.8, 0.8, 0.2), "moco": (0.4, 0.4, 0.4, 0.1)}


@pytest.mark.parametrize("name", RELEASED)
def test_imagenet_recipes_have_the_released_codes_settings(name):
    recipe = load(Recipe, RECIPES / "imagenet" / f"{name}.yaml")
    optimizer, method, train = recipe.optimizer, recipe.method.model_dump(), recipe.train
    lars = (optimizer.trust_coefficient, optimizer.clip) if optimizer.name == "lars" else None
    widths = (
        method["projector_hidden_dim"],
        method["projector_output_dim"],
        method.get("predictor_hidden_dim"),
    )
    released = RELEASED[name]
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay, lars) == released[:4]
    assert (train.batch_size, train.accumulate, widths) == released[4:7]
    assert {key: method[key] for key in released[7]} == released[7]
    assert (optimizer.lr_rule, recipe.schedule.name, recipe.schedule.warmup_epochs, train.epochs) == (
        "linear",
        "cosine",
        10,
        100,
    )
    assert (recipe.views.policy, recipe.views.probability, recipe.backbone.name) == ("second", 1.0, "resnet50")
    pair = recipe.views.augmentation
    views = [pair.of_view(view) for view in (0, 1)]
    expected = SYMMETRIC if name in JITTER else ASYMMETRIC
    assert tuple((view.blur_probability, view.solarize_probability) for view in views) == expected
    for view in views:
        jitter = (view.brightness, view.contrast, view.saturation, view.hue)
        assert jitter == JITTER.get(name, (0.4, 0.4, 0.2, 0.1))
        assert (view.crop_scale, view.jitter_probability, view.grayscale_probability) == ((0.08, 1.0), 0.8, 0.2)
        assert view.flip_probability == 0.5


def chosen(paths: list[Path]) -> list[Any]:
    """Of a folder of a paper-scale data set one recipe is run by default and the others with the slow tests."""
    marked = []
    for path in paths:
        name = path.relative_to(RECIPES).with_suffix("").as_posix()
        slow = name.startswith(("imagenet", "cifar")) and name not in DEFAULT
        marked.append(pytest.param(path, marks=[pytest.mark.slow] if slow else [], id=name))
    return marked


@pytest.mark.parametrize("path", chosen([path for path in ALL if path.parent.name == "imagenet"]))
def test_an_imagenet_recipe_on_a_miniature_of_imagenet(path, imagenet, tmp_path):
    accumulated = ["train.accumulate=2"] if load(Recipe, path).train.accumulate > 1 else []
    settings = [f"dataset.root={imagenet}", "dataset.image_size=32", f"train.batch_size={BATCH}", *accumulated]
    (row,) = two_steps(path, tmp_path / "run", *settings)
    assert row["step"] == 2
    assert np.isfinite(row["loss"])


@pytest.mark.parametrize("path", chosen([path for path in ALL if path.parent.name != "imagenet"]))
def test_another_recipe_on_the_digits(path, tmp_path):
    """Recipes of the digits see some of them; the others see them in place of images that are not here."""
    recipe = load(Recipe, path)
    settings = ["train.validation_fraction=0.985", f"train.batch_size={BATCH}"]
    if recipe.dataset.name != "digits":
        settings.append("dataset={name: digits}")
    if getattr(recipe.generator, "model", None) == "my-flow":  # which is the user's
        settings.append("generator.model=builtin:digits-flow")
    if recipe.variants.source == "online":
        settings += ["variants.source=in_process", "variants.buckets=[8]"]
    (row,) = two_steps(path, tmp_path / "run", *settings)
    assert row["step"] == 2
    assert np.isfinite(row["loss"])
    assert (row["variants_generated"] > 0) == recipe.uses_variants()
