"""The picture of `genssl preview --vary`."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from genssl.cli.varied import varied_parameters
from genssl.errors import UserError
from genssl.generators.parameters import ADAPTIVE_NAME
from genssl.quality.grid import write_groups
from genssl.training.preview import parse_vary, preview


def test_values_are_numbers_ranges_and_adaptive():
    vary = parse_vary("noise_level=0, 200,100..400,adaptive")
    assert vary.name == "noise_level"
    assert vary.values == {
        "0": {"noise_level": 0},
        "200": {"noise_level": 200},
        "100..400": {"noise_level": 100, "noise_level.max": 400},
        "adaptive": {"noise_level": 0, ADAPTIVE_NAME: 1},
    }


@pytest.mark.parametrize("text", ["noise_level", "=3", "noise_level=1,,2", "noise_level=low", "truncation=adaptive"])
def test_what_is_no_list_of_values_is_refused(text):
    with pytest.raises(UserError, match="--vary"):
        parse_vary(text)


def test_columns_are_what_they_are_labelled_and_differ_in_nothing_else(quick_recipe, tmp_path, monkeypatch):
    drawn = {}

    def watched(path, groups, title, note):
        drawn.update({group.heading: group for group in groups})
        write_groups(path, groups, title, note)

    monkeypatch.setattr("genssl.training.preview.write_groups", watched)
    out = tmp_path / "picture.png"
    preview(quick_recipe(), out, ["guidance_scale=1,2..8", "noise_level=0,300,adaptive"], sources=3)
    plain, guided = "guidance_scale 1, noise_level", "guidance_scale 2..8, noise_level"
    assert list(drawn) == ["source", "standard views", "variants", plain, guided]
    levels = dict(drawn[plain].columns)
    own = drawn["variants"].columns[0][1]
    assert np.array_equal(levels["300"], own), "the recipe's own value gives the recipe's own variant"
    assert not np.array_equal(levels["0"], own)
    assert not np.array_equal(dict(drawn[guided].columns)["300"], own)
    assert {note for one in (plain, guided) for note in drawn[one].notes["adaptive"]} <= {
        "0",
        "100",
        "200",
        "300",
        "400",
    }
    assert drawn[plain].notes.keys() == {"adaptive"}
    with Image.open(out) as picture:
        width, height = picture.size
        assert width > 10 * 0.9 * 150
        assert height > 3 * 0.9 * 150
        pixels = np.asarray(picture.convert("L"))
    assert (pixels[:, [0, -1]] == 255).all(), "nothing runs over the edge"


@pytest.mark.parametrize(
    ("vary", "said"),
    [
        (["noise=1"], "--vary: stable_unclip has no parameter 'noise'; did you mean 'noise_level'"),
        (["noise_level=5000"], r"--vary: parameter noise_level: 5000 is outside"),
        (["noise_level=" + ",".join(map(str, range(33)))], "33 combinations are too many for a picture"),
        (["noise_level=1", "noise_level=2"], "noise_level is given twice"),
    ],
)
def test_what_the_generator_cannot_do_is_told_and_nothing_written(quick_recipe, tmp_path, vary, said):
    with pytest.raises(UserError, match=said):
        preview(quick_recipe(), tmp_path / "picture.png", vary)
    assert not list(tmp_path.iterdir())


def test_a_recipe_without_generator_has_nothing_to_vary(quick_recipe, tmp_path):
    with pytest.raises(UserError, match="the recipe has no generator"):
        preview(quick_recipe("variants.source=none", "generator=null"), tmp_path / "picture.png", ["noise_level=1"])


def test_plain_values_on_a_command_line():
    assert varied_parameters(["noise_level=1,2"]) == {"noise_level": [1, 2]}
    for text in ("noise_level", "noise_level=", "noise_level=a", "=3"):
        with pytest.raises(UserError, match="a parameter and its values are expected, such as noise_level=0,200,400"):
            varied_parameters([text])
    with pytest.raises(UserError, match="noise_level is given twice"):
        varied_parameters(["noise_level=1", "noise_level=2"])
