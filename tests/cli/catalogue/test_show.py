"""`genssl show` says what a recipe's numbers come to."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from genssl.cli.main import app
from genssl.config.documents.document import parse_document
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.config.validate import validate
from genssl.training.update import peak_lr

RECIPES = Path(__file__).resolve().parents[3] / "recipes"


def show(*arguments: str, ranks: str = "1") -> tuple[str, list[str]]:
    """Returns the YAML and the comments."""
    result = CliRunner(env={"WORLD_SIZE": ranks}).invoke(app, ["show", *arguments])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines(keepends=True)
    comments = [line[2:].rstrip("\n") for line in lines if line.startswith("# ")]
    return "".join(line for line in lines if not line.startswith("# ")), comments


# Of the paper's released code: what solo-learn makes of lr, batch, devices and accumulation.
@pytest.mark.parametrize(
    ("name", "peak"), [("simclr", 1.2), ("simsiam", 0.5), ("byol", 12.8), ("barlow_twins", 0.8), ("moco", 0.3)]
)
def test_imagenet_recipes_have_the_released_codes_learning_rates(name, peak):
    path = RECIPES / "imagenet" / f"{name}.yaml"
    recipe = load(Recipe, path)
    assert peak_lr(recipe.optimizer, recipe.train.batch_size) == pytest.approx(peak)
    _, comments = show(str(path), ranks="4")
    batch = recipe.train.batch_size
    assert comments[0] == (
        f"learning rate at its peak: {peak:g} ({recipe.optimizer.lr:g} * {batch} / 256), after 10 epochs of warm-up"
    )


def test_the_batch_of_a_rank_and_of_a_micro_batch():
    _, comments = show(str(RECIPES / "imagenet" / "byol.yaml"), ranks="4")
    assert comments[1] == "batch per rank: 4096 images, in 16 micro-batches of 256 (16384 over 4 ranks)"
    _, comments = show(str(RECIPES / "simclr_sd.yaml"))
    assert comments == [
        "learning rate at its peak: 0.002 (optimizer.lr as it is), after 2 epochs of warm-up",
        "batch per rank: 128 images (128 over 1 rank)",
    ]
    _, comments = show(str(RECIPES / "simclr_sd.yaml"), ranks="3")
    assert comments[1] == "batch per rank: 128 images do not divide among 3 ranks in 1 micro-batch"


def test_what_is_printed_is_the_recipe():
    path = RECIPES / "cifar10" / "byol.yaml"
    text, _ = show(str(path), "train.epochs=70")
    assert validate(Recipe, parse_document(text, "shown")) == load(Recipe, path, ["train.epochs=70"])


def test_other_files_have_no_comments():
    assert show(str(RECIPES / "linear_probe" / "paper.yaml"))[1] == []
    assert show(str(RECIPES / "generators" / "digits_flow.yaml"))[1] == []
