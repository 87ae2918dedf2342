"""A file of one kind, given where another is expected, is called what it is, with the command that takes it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from genssl.config.generator_recipes.base import GeneratorRecipe
from genssl.config.load import load, load_study, require_no_document
from genssl.config.protocol import Protocol
from genssl.config.recipe import Recipe
from genssl.config.server import ServerFile
from genssl.config.study import Study
from genssl.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    Recipe: ("recipes/simclr_sd.yaml", "a recipe of a training run", "genssl run"),
    GeneratorRecipe: ("recipes/generators/digits_unclip.yaml", "a recipe of a generator", "genssl train-generator"),
    Study: ("recipes/studies/methods.yaml", "a study", "genssl compare"),
    ServerFile: ("servers/digits_unclip.yaml", "a server file", "genssl serve-generator"),
    Protocol: ("recipes/linear_probe/paper.yaml", "an evaluation protocol", "genssl evaluate RUN --protocol"),
}


@pytest.mark.parametrize(
    ("wanted", "given"), list(itertools.permutations(KINDS, 2)), ids=lambda model: model.__name__.lower()
)
def test_every_kind_in_place_of_every_other(wanted, given):
    path, called, command = ROOT / KINDS[given][0], *KINDS[given][1:]
    with pytest.raises(ConfigError) as caught:
        _ = load_study(path) if wanted is Study else load(wanted, path)
    expected = f"{path}: is {called}, and {KINDS[wanted][1]} is expected here; the command for it is: {command} {path}"
    assert caught.value.problems == [expected]


@pytest.mark.parametrize("model", KINDS, ids=lambda model: model.__name__.lower())
def test_every_kind_in_its_own_place(model):
    path = ROOT / KINDS[model][0]
    assert load_study(path) if model is Study else load(model, path)
    assert load(model, path)


def test_a_family_that_is_left_out_leaves_a_recipe_of_a_generator(tmp_path):
    text = (ROOT / KINDS[GeneratorRecipe][0]).read_text().replace("family: stable_unclip\n", "")
    (tmp_path / "mine.yaml").write_text(text)
    assert load(GeneratorRecipe, tmp_path / "mine.yaml").family == "stable_unclip"
    with pytest.raises(ConfigError, match="is a recipe of a generator, and a recipe of a training run is expected"):
        load(Recipe, tmp_path / "mine.yaml")


def test_what_is_of_no_kind_is_told_by_its_keys(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: x\nbanana: 1\n")
    for model in KINDS:
        with pytest.raises(ConfigError, match="banana: unknown key"):
            load(model, tmp_path / "mine.yaml")


def test_the_base_of_a_study_is_a_recipe_of_a_run(tmp_path):
    study = (ROOT / KINDS[Study][0]).read_text()
    base = next(line for line in study.splitlines() if line.startswith("recipe: "))
    (tmp_path / "study.yaml").write_text(study.replace(base, f"recipe: {ROOT / KINDS[GeneratorRecipe][0]}"))
    with pytest.raises(ConfigError, match="is a recipe of a generator, and a recipe of a training run is expected"):
        load_study(tmp_path / "study.yaml")


def test_a_recipe_is_no_weights(tmp_path):
    with pytest.raises(ConfigError, match="is a study, and an encoder is expected here; the command for it is: "):
        require_no_document(ROOT / KINDS[Study][0], "an encoder")
    require_no_document(tmp_path / "weights.pth", "an encoder")
    require_no_document(tmp_path / "nowhere.yaml", "an encoder")  # what is not there is for others to tell
