"""`genssl similarity` on two small encoders: the table, the files, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from genssl.backbones.configs import ResNet18Config
from genssl.backbones.resnet import build_resnet
from genssl.cli.training.similarity import similarity
from genssl.config.documents.dump import to_yaml
from genssl.encoders.load import load_encoder
from genssl.errors import UserError
from genssl.generators.conditioner import save_encoder

app = typer.Typer(rich_markup_mode=None)
app.command("similarity")(similarity)
app.command("other")(lambda: None)  # a second command, so that the first is called by its name


@pytest.fixture
def encoders(tmp_path, quick_recipe) -> tuple[str, str]:
    """Two backbones as runs leave them, of different width and random weights."""
    paths = []
    for seed, width in ((0, 4), (1, 6)):
        torch.manual_seed(seed)
        recipe = quick_recipe(f"backbone.width={width}")
        path = tmp_path / f"{seed}.safetensors"
        save_encoder(path, build_resnet(ResNet18Config(stem="small", width=width)), recipe.backbone, recipe=recipe.name)
        paths.append(str(path))
    return paths[0], paths[1]


def run(*arguments: str, width: str = "200") -> Result:
    return CliRunner().invoke(app, ["similarity", *arguments], env={"COLUMNS": width}, catch_exceptions=False)


QUICK = ("--dataset", "digits", "--images", "60", "--resamples", "100", "--device", "cpu")


def test_it_prints_a_table_with_intervals(encoders):
    done = run(*encoders, *QUICK)
    assert done.exit_code == 0
    rows = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if line.startswith("│")}
    assert list(rows) == ["CKA, debiased", "CKA, biased", "Procrustes distance", "with the paper's centring"]
    for name in ("CKA, debiased", "CKA, biased", "Procrustes distance"):
        cells = [cell.strip() for cell in rows[name].split("│")]
        low, high = map(float, cells[3].split(" .. "))
        assert low <= float(cells[2]) <= high
    assert "60 images of digits, test; 32 and 48 features" in done.stdout
    assert "100 resamples" in done.stdout


def test_few_images_of_many_features_are_warned_of(encoders):
    done = run(*encoders, "--dataset", "digits", "--images", "48", "--resamples", "100", "--device", "cpu")
    assert "no more images than features: only the debiased CKA means something on its own" in done.stdout
    assert "no more images" not in run(*encoders, *QUICK).stdout


def test_it_writes_the_numbers_and_the_layers(encoders, tmp_path):
    out = tmp_path / "deep" / "out"
    done = run(*encoders, *QUICK, "--out", str(out))
    assert done.exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["cka_layers.png", "similarity.json"]
    found = json.loads((out / "similarity.json").read_text())
    assert f"{found['cka_debiased']['value']:.4f}" in done.stdout
    assert f"{found['opd']['low']:.4f} .. {found['opd']['high']:.4f}" in done.stdout
    assert [encoder["name"] for encoder in found["encoders"]] == list(encoders)
    assert all(len(encoder["digest"]) == 32 for encoder in found["encoders"])
    assert found["dataset"] == {"name": "digits"}
    assert (found["images"], found["dimensions"], found["seed"]) == (60, [32, 48], 0)
    layers = found["layers"]
    assert layers["first"][:3] == ["conv1", "bn1", "relu"]
    assert layers["second"][-1] == "features"
    assert np.shape(layers["cka"]) == (len(layers["first"]), len(layers["second"]))
    with Image.open(out / "cka_layers.png") as picture:
        assert min(picture.size) > 300


def test_an_encoder_equals_itself(encoders, tmp_path):
    run(encoders[0], encoders[0], *QUICK, "--out", str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "similarity.json").read_text())
    assert found["cka_debiased"]["value"] == pytest.approx(1)
    assert found["opd"]["value"] == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(np.diag(found["layers"]["cka"]), 1, atol=1e-6)


def test_each_encoder_sees_images_of_its_size(encoders, tmp_path):
    """A folder is loaded at the size of each; torchvision's networks are made for 224 pixels."""
    folder = tmp_path / "photos"
    for number in range(25):
        path = folder / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    block = f"{{name: folder, root: {folder}, test_fraction: 0.9}}"
    arguments = ("--dataset", block, "--images", "20", "--resamples", "100", "--device", "cpu")
    done = run(encoders[0], "torchvision/squeezenet1_1", *arguments, "--out", str(tmp_path / "out"))
    assert done.exit_code == 0
    size = load_encoder(encoders[0], torch.device("cpu")).image_size or 32
    assert json.loads((tmp_path / "out" / "similarity.json").read_text())["sizes"] == [size, 224]
    fixed = block.replace("}", ", image_size: 48}")
    run(encoders[0], "torchvision/squeezenet1_1", "--dataset", fixed, *arguments[2:], "--out", str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "similarity.json").read_text())["sizes"] == [48, 48]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--split", "tset"), "--split tset: is not known; did you mean 'test'? allowed: test, train"),
        (("--dataset", "digit"), "'digit' is not one of the datasets; did you mean 'digits'?"),
        (("--device", "cpu"), "comes from a run, so there is no data set to see; name one: --dataset"),
    ],
)
def test_mistakes(encoders, tmp_path, arguments, message):
    with pytest.raises(UserError) as caught:
        run(*encoders, *arguments, "--out", str(tmp_path / "out"))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_directory(encoders, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="is a file; give a directory"):
        run(*encoders, *QUICK, "--out", str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_an_encoder_that_is_not_there(encoders, tmp_path):
    with pytest.raises(UserError, match="there is no such file or folder"):
        run(encoders[0], str(Path("nowhere")), *QUICK)


def test_two_networks_of_one_checkpoint(tmp_path):
    networks = [build_resnet(ResNet18Config(stem="small", width=4)).state_dict() for _ in range(2)]
    torch.save(dict(zip(("student", "teacher"), networks, strict=True)), tmp_path / "x.pth")
    blocks = [f"{{encoder: {tmp_path / 'x.pth'}, prefix: {name}}}" for name in ("teacher", "student")]
    done = run(*blocks, *QUICK, "--out", str(tmp_path / "out"))
    assert done.stdout.count("statistics: imagenet (assumed)") == 2
    found = json.loads((tmp_path / "out" / "similarity.json").read_text())
    assert [encoder["prefix"] for encoder in found["encoders"]] == ["teacher.", "student."]
    assert found["cka_biased"]["value"] < 0.999
    assert run(str(tmp_path / "x.pth"), blocks[0], *QUICK).stdout.count("1.0000") >= 2, "the teacher is the default"


def test_the_data_set_of_a_run_is_the_default(encoders, tmp_path, quick_recipe):
    """Of a run directory: its encoder, and a recipe that names the digits."""
    directory = tmp_path / "run"
    directory.mkdir()
    Path(encoders[0]).rename(directory / "encoder.safetensors")
    (directory / "recipe.yaml").write_text(to_yaml(quick_recipe("backbone.width=4")))
    done = run(encoders[1], str(directory), "--images", "40", "--resamples", "100", "--device", "cpu")
    assert done.exit_code == 0
    assert "40 images of digits, test" in done.stdout
