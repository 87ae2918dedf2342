"""Previews over parameters: one labelled grid, and a sentence for what cannot be drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genssl.cli.preview import varied_parameters
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import RequestRefusedError, UserError
from genssl.training import samples
from genssl.training.preview import preview

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load(Recipe, ROOT / "recipes" / "simclr_sd.yaml", ["train.threads=1"])


def test_every_combination_is_drawn_under_its_parameters(recipe, tmp_path, monkeypatch):
    drawn = {}
    whole = samples.write_grid

    def write(path, columns, title):
        drawn.update(columns=list(columns))
        whole(path, columns, title)

    monkeypatch.setattr(samples, "write_grid", write)
    preview(recipe, tmp_path / "grid.png", varied_parameters(["noise_level=0,900", "num_inference_steps=1,2"]))
    labels = [label for label, _ in drawn["columns"]]
    assert labels[:3] == ["source", "view 1", "view 2"]
    assert [label for label in labels[3:] if label] == [
        "noise level 0\nnum inference steps 1",
        "noise level 0\nnum inference steps 2",
        "noise level 900\nnum inference steps 1",
        "noise level 900\nnum inference steps 2",
    ]
    assert len(labels) == 3 + 4 * 2
    images = [np.stack(images).astype(float) for _, images in drawn["columns"]]
    near, far = (np.abs(images[column] - images[0]).mean() for column in (3, 7))
    assert near < far, "noise takes a variant away from its source"
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width > 900


def test_what_cannot_be_drawn_is_one_sentence(recipe, tmp_path):
    out = tmp_path / "grid.png"
    with pytest.raises(RequestRefusedError, match="stable_unclip has no parameter 'noise'; did you mean 'noise_level'"):
        preview(recipe, out, {"noise": [1]})
    with pytest.raises(UserError, match="13 combinations are too many for a picture"):
        preview(recipe, out, {"noise_level": list(range(13))})
    for text in ("noise_level", "noise_level=", "noise_level=a", "=3"):
        with pytest.raises(UserError, match="a parameter and its values are expected, such as noise_level=0,200,400"):
            varied_parameters([text])
    with pytest.raises(UserError, match="noise_level is given twice"):
        varied_parameters(["noise_level=1", "noise_level=2"])
    assert not out.exists()
