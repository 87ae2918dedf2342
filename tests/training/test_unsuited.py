"""Commands that meet a generator which is not for their images say so, once, before they spend time on it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from genssl.cli.main import app
from genssl.offline.pregenerate import Shard, pregenerate
from genssl.training.preview import preview
from genssl.training.run import run

TRAINED, SMALL = "was trained on the data set digits alone", "pixels a side and the views"


class Told:
    """Keeps what it is told of a run, a pre-generation or a picture."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def __getattr__(self, name: str):
        return lambda *given, **named: None

    @property
    def warnings(self) -> list[str]:
        return [note for note in self.notes if TRAINED in note or SMALL in note]


@pytest.fixture
def folder_of(photos):
    def block(image_size: int) -> str:
        return f"dataset={{name: folder, root: '{photos}', image_size: {image_size}}}"

    return block


@pytest.fixture
def unknown_generator(monkeypatch):
    """The built-in generator as one that somebody has trained: nothing is known of what it saw."""
    monkeypatch.setattr("genssl.generators.configs.trained_on", lambda model: None)


COMMON = ("variants.source=in_process", "train.batch_size=8", "evaluate=[]", "variants.buckets=[8]")


def test_a_run_warns_of_small_variants(quick_recipe, folder_of, unknown_generator, tmp_path):
    told = Told()
    run(quick_recipe(folder_of(16), *COMMON), tmp_path / "run", told)
    (said,) = told.warnings
    assert said.startswith("warning: the variants have 8 pixels a side and the views 16")


@pytest.mark.slow
def test_a_run_of_stored_variants_warns_of_small_ones(quick_recipe, folder_of, unknown_generator, tmp_path):
    filling, told = Told(), Told()
    pregenerate(quick_recipe(folder_of(16), *COMMON), tmp_path / "store", variants=1, report=filling)
    stored = ("variants.source=stored", f"variants.store={tmp_path / 'store'}", "variants.per_image=1")
    run(quick_recipe(folder_of(16), *COMMON, *stored), tmp_path / "run", told)
    assert len(filling.warnings) == len(told.warnings) == 1
    assert "the variants have 8 pixels a side and the views 16" in filling.warnings[0]
    assert told.warnings == filling.warnings


@pytest.mark.slow
def test_variants_as_large_as_the_views_are_not_warned_of(quick_recipe, folder_of, unknown_generator, tmp_path):
    told = Told()
    run(quick_recipe(folder_of(8), *COMMON), tmp_path / "run", told)
    pregenerate(quick_recipe(*COMMON), tmp_path / "store", variants=1, report=told, shard=Shard(0, 200))
    preview(quick_recipe(*COMMON), tmp_path / "picture.png", sources=2, report=told.note)
    assert told.warnings == []


def test_a_built_in_generator_on_other_images_is_warned_of_once(quick_recipe, folder_of, tmp_path):
    told = Told()
    recipe = quick_recipe(folder_of(16), *COMMON)
    assert sum(TRAINED in text for text in recipe.warnings()) == 1  # which the command prints
    run(recipe, tmp_path / "run", told)
    assert told.warnings == []
    for vary in ([], ["noise_level=0,300"]):
        preview(recipe, tmp_path / "picture.png", vary, sources=2, report=told.note)
        assert [TRAINED in note for note in told.warnings] == [True]
        told.notes.clear()
    pregenerate(recipe, tmp_path / "store", variants=1, report=told)
    assert [TRAINED in note for note in told.warnings] == [True]


def test_the_picture_command_says_it_on_standard_error(folder_of, tmp_path):
    recipe = str(Path(__file__).resolve().parents[2] / "recipes" / "simclr_flow.yaml")
    out = str(tmp_path / "picture.png")
    done = CliRunner().invoke(app, ["preview", recipe, folder_of(16), *COMMON, "--sources", "1", "--out", out])
    assert done.exit_code == 0, done.output
    assert done.stderr.count(TRAINED) == 1
    assert done.stdout == f"{out}: written\n"
