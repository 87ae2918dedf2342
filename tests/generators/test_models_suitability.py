"""What is said of a generator that is not for the images it is given, by the recipe's name for them and by sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from genssl.config.documents.document import read_document
from genssl.config.load import load, load_study, model_of
from genssl.config.recipe import Recipe
from genssl.config.study import Study
from genssl.generators.models import small_variants, trained_on

ROOT = Path(__file__).resolve().parents[2]
RECIPES = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if model_of(read_document(path)) is Recipe]
STUDIES = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if model_of(read_document(path)) is Study]
FOLDER = "dataset={name: folder, root: photos, image_size: 64}"


def test_built_in_models_say_what_they_were_trained_on():
    names = [f"builtin:digits-{name}" for name in ("unclip", "flow", "icgan")]
    assert [trained_on(name) for name in names] == ["digits"] * 3
    for name in ("builtin:", "builtin:none", "builtin:../digits-flow", "digits-flow", "my-flow", "owner/name", ""):
        assert trained_on(name) is None


@pytest.mark.parametrize("name", ["simclr_sd", "simclr_flow", "simclr_icgan"])
def test_a_recipe_says_that_its_built_in_generator_saw_other_images(name):
    (said,) = load(Recipe, ROOT / "recipes" / f"{name}.yaml", [FOLDER]).warnings()
    assert said.startswith("generator.model: builtin:digits-")
    assert "was trained on the data set digits alone" in said
    assert "dataset.name is folder; make one of your own images with `genssl train-generator " in said
    for fitting in (["generator={name: flow, model: my-flow}"], ["variants.source=none"]):
        assert load(Recipe, ROOT / "recipes" / f"{name}.yaml", [FOLDER, *fitting]).warnings() == []


def test_no_recipe_and_no_study_that_ships_is_warned_of():
    assert len(RECIPES) > 20
    assert len(STUDIES) > 3
    warnings = [text for path in RECIPES for text in load(Recipe, path).warnings()]
    warnings += [text for path in STUDIES for text in load_study(path).warnings()]
    assert [text for text in warnings if "trained on" in text] == []


def test_variants_are_small_where_they_are_smaller_than_the_views():
    assert small_variants(64, 64) is None
    assert small_variants(65, 64) is None
    assert "the variants have 63 pixels a side and the views 64" in str(small_variants(63, 64))
