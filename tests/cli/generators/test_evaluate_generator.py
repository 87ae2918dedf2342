"""`genssl evaluate-generator`: the card of real variants, beside standard augmentations, and mistakes."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from genssl.cli.generators.evaluate_generator import evaluate_generator
from genssl.errors import UserError
from genssl.quality.judges import Pixels

app = typer.Typer(rich_markup_mode=None)
app.command("evaluate-generator")(evaluate_generator)
app.command("other")(lambda: None)  # a second command, so that the first is called by its name

RECIPE = "recipes/simclr_icgan.yaml"  # the cheapest generator: one forward pass


def run(*arguments: str) -> Result:
    arguments = ("evaluate-generator", RECIPE, *arguments)
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "80"}, catch_exceptions=False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("quality")
    done = run("--vary", "truncation=0.3,0.7,2", "--out", str(out))
    assert done.exit_code == 0
    return done.stdout, json.loads((out / "quality.json").read_text()), out


def test_every_setting_stands_beside_real_images_and_standard_augmentations(measured):
    text, card, out = measured
    names = [row["setting"] for row in card["rows"]]
    # 0.7 is the recipe's own, and is not measured twice
    assert names == ["real images", "standard augmentations", "the recipe's", "truncation 0.3", "truncation 2"]
    with (out / "quality.csv").open() as file:
        assert [row["setting"] for row in csv.DictReader(file)] == names
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert max(len(line) for line in text.splitlines() if "┃" in line or "│" in line) <= 80
    assert card["protocol"] | {"sources": 360, "images_a_set": 180, "measured_on": "test"} == card["protocol"]
    assert card["protocol"]["judge"]["name"] == "pixels"


def test_the_numbers_rank_what_is_known(measured):
    real, standard, own, less, more = measured[1]["rows"]
    assert own["label_agreement"] >= 0.88
    assert own["label_agreement"] > standard["label_agreement"] + 0.1
    assert real["label_agreement"] > own["label_agreement"]
    assert less["vendi_per_source"] < own["vendi_per_source"] < more["vendi_per_source"] < real["vendi_per_source"]
    assert less["distance_within_source"] < own["distance_within_source"] < more["distance_within_source"]
    for row in (standard, own, less, more):
        assert 0 < row["cosine"] < 1
        assert 0 <= row["retrieval@1"] <= 1
        assert row["variants_per_second"] > 0
        assert row["frechet"] > real["frechet"] or row["recall"] < real["recall"]


def test_few_sources_are_warned_of_and_training_sources_only_taken_when_asked(tmp_path):
    done = run(
        "--sources", "40", "--variants", "2", "--split", "train", "--vary", "truncation=0.7", "--out", str(tmp_path)
    )
    card = json.loads((tmp_path / "quality.json").read_text())
    assert card["protocol"]["measured_on"] == "train (not held out)"
    assert card["rows"][0]["nearest_train_distance"] == pytest.approx(0, abs=1e-2)  # they are training images
    assert "20 images a set are no more than the 64 dimensions" in done.stdout.replace("\n", " ")
    assert any("training sources" in warning for warning in card["warnings"])


def test_a_judge_that_is_the_generators_own_conditioner_is_named_as_such(tmp_path):
    judge = "{encoder: builtin:digits-icgan}"  # a name and its block are one
    run("--judge", judge, "--sources", "40", "--vary", "truncation=0.7", "--out", str(tmp_path))
    card = json.loads((tmp_path / "quality.json").read_text())
    assert card["protocol"]["judge"]["kind"] == "generator"
    assert any("own conditioner" in warning for warning in card["warnings"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--vary", "noise_level=0,200"], "icgan has no such parameter"),
        (["--vary", "truncation"], "such as noise_level=0,200,400"),
        (["--vary", "truncation=nan"], "finite number"),
        (["generator=null", "variants.source=none"], "has no generator"),
        (["--sources", "5"], "5 held-out sources are too few"),
        (["--judge", "nowhere"], "there is no such file or folder"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_written(tmp_path, arguments, said):
    with pytest.raises(UserError, match=said):
        run(*arguments, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_pixels_of_a_grey_image_are_as_far_apart_with_one_channel_as_with_three():
    images = torch.from_numpy(np.random.default_rng(0).random((2, 1, 8, 8)).astype(np.float32)).repeat(1, 3, 1, 1)
    one, three = (Pixels(8, grey=grey).encode(images) for grey in (True, False))
    assert one.shape == (2, 64)
    assert three.shape == (2, 192)
    torch.testing.assert_close(torch.cdist(one, one), torch.cdist(three, three))
