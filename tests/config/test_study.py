"""Studies: arms as overrides, what makes them incomparable, and errors with file:line."""

from __future__ import annotations

from pathlib import Path

import pytest

from genssl.config.load import load_study
from genssl.config.study import STORE_OF_STUDY, LoadedStudy
from genssl.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "recipes" / "simclr_sd.yaml"
STUDIES = [ROOT / "recipes" / "online_vs_offline.yaml", *sorted((ROOT / "recipes" / "studies").glob("*.yaml"))]

TEXT = f"""
name: small
recipe: {BASE}
set: {{train.epochs: 5}}
seeds: [0, 1]
metric: knn/top1
reference: none
arms:
  - name: none
    set: {{variants.source: none}}
  - name: stored-3
    set: {{variants.source: stored, variants.per_image: 3}}
  - name: online
"""


def load(tmp_path: Path, text: str, *overrides: str, **options: object) -> LoadedStudy:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return load_study(path, overrides, **options)


def problems(tmp_path: Path, text: str, *overrides: str, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides, **options)
    return str(caught.value)


def test_arms_are_overrides_of_the_base(tmp_path):
    loaded = load(tmp_path, TEXT)
    assert [item.arm.name for item in loaded.arms] == ["none", "stored-3", "online"]
    assert [item.recipe.variants.source for item in loaded.arms] == ["none", "stored", "online"]
    assert {item.recipe.train.epochs for item in loaded.arms} == {5}
    assert [item.stored_variants for item in loaded.arms] == [0, 3, 0]
    assert str(loaded.arm("stored-3").recipe.variants.store) == STORE_OF_STUDY
    assert loaded.against(loaded.arm("online").arm) == ["none"]
    assert loaded.against(loaded.arm("none").arm) == []


def test_settings_from_the_command_line_are_for_every_arm_but_weaker_than_an_arms_own(tmp_path):
    loaded = load(tmp_path, TEXT, "train.epochs=7", "variants.per_image=2", seeds=[5])
    assert {item.recipe.train.epochs for item in loaded.arms} == {7}
    assert loaded.arm("online").recipe.variants.per_image == 2
    assert loaded.arm("stored-3").recipe.variants.per_image == 3
    assert loaded.seeds == [5]


def test_the_short_form(tmp_path):
    text = TEXT + "quick: {seeds: [0], set: {train.epochs: 3}}\n"
    assert load(tmp_path, text).seeds == [0, 1]
    quick = load(tmp_path, text, quick=True)
    assert (quick.seeds, quick.base.train.epochs, quick.quick) == ([0], 3, True)
    assert "has no short form" in problems(tmp_path, TEXT, quick=True)


def test_an_arm_may_replace_a_whole_block(tmp_path):
    text = TEXT.replace("  - name: online\n", "  - name: online\n    set: {evaluate: [{name: knn, k: 3}]}\n")
    assert [config.name for config in load(tmp_path, text).arm("online").recipe.evaluate] == ["knn"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("reference: none", "reference: nothing", "study.yaml:8: arms: reference: there is no arm 'nothing'"),
        ("  - name: online", "  - name: none", "more than one arm is called none"),
        ("train.epochs: 5", "train.epohcs: 5", "study.yaml:4: train.epohcs: unknown key; did you mean 'epochs'?"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "a seed stands more than once"),
        ("seeds: [0, 1]", "seeds: []", "seeds"),
        ("metric: knn/top1", "metric: kn/top1", "no evaluator of the base recipe gives 'kn/top1'; did you mean 'knn'?"),
        ("variants.source: stored, variants.per_image: 3", "variants.source: stored", "variants.per_image is fresh"),
        ("variants.source: none", "variants.source: nun", "arm none: "),
        ("  - name: online", "  - name: online\n    set: {train.epochs: 6}", "compared at equal optimiser steps"),
        ("  - name: online", "  - name: online\n    wall_clock_of: none", "needs an arm with the same settings"),
        ("  - name: online", "  - name: online\n    control_of: none", "must read a store of this study"),
        ("  - name: online", "  - name: online\n    against: [nobody]", "against of online: there is no arm 'nobody'"),
        ("  - name: online", "  - name: online\n    lable: x", "unknown key; did you mean 'label'?"),
        ("seeds: [0, 1]", "seeds: [0, 1]\nheadline: [none]", "two arms are expected, or none"),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path, old, new, said):
    assert old in TEXT
    assert said in problems(tmp_path, TEXT.replace(old, new))


def test_a_mistake_in_every_arm_is_told_of_every_arm(tmp_path):
    said = problems(tmp_path, TEXT, "backbone.width=x")
    assert "override 'backbone.width=x'" in said


def test_a_base_recipe_that_is_not_there(tmp_path):
    assert "no such file" in problems(tmp_path, TEXT.replace(str(BASE), "nowhere.yaml"))


def test_an_arm_as_long_as_another_needs_one_with_its_settings(tmp_path):
    text = TEXT + "  - {name: longer, wall_clock_of: online, set: {variants.source: none}}\n"
    loaded = load(tmp_path, text)
    assert loaded.as_fast_as(loaded.arm("longer").arm).arm.name == "none"
    both = text + "  - {name: longest, wall_clock_of: longer, set: {variants.source: none}}\n"
    assert "takes its length from another arm itself" in problems(tmp_path, both)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
@pytest.mark.parametrize("quick", [False, True])
def test_shipped_studies_load(path, quick):
    loaded = load_study(path, quick=quick)
    assert loaded.study.title
    assert not loaded.warnings() or path.stem == "probability_sweep"
