"""Training a flow: the same every time, whole or not at all, taken up after a kill, and of use to a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from miniatures import judge_little, problems, quiet
from miniatures import recipe as parsed
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from genssl.base.ranks import ALONE
from genssl.cli.main import app
from genssl.config.generator_recipes.base import GeneratorRecipe
from genssl.config.generator_recipes.flow import FlowRecipe
from genssl.errors import ConfigError, DataError, UserError
from genssl.generator_training import stage_progress
from genssl.generator_training.conditioner import nearest_neighbours
from genssl.generator_training.loop import Checkpoints, Loop, fit
from genssl.generator_training.rows import Draws, Images
from genssl.generator_training.run import train_generator
from genssl.generators.configs import FlowConfig
from genssl.generators.flow import Flow
from genssl.training.progress import RunProgress
from genssl.training.run import run
from genssl.variants.engine import VariantEngine

MINIATURE = """
name: miniature
family: flow
dataset: {name: digits}
conditioner:
  backbone: {name: resnet18, stem: small, width: 4}
  epochs: 1
  projector_hidden_dim: 16
flow: {block_out_channels: [16, 16], steps: 6, batch_size: 64}
threads: 1
"""


def recipe(text: str = MINIATURE) -> GeneratorRecipe:
    return parsed(text)


@pytest.fixture(autouse=True)
def little_to_judge(monkeypatch) -> None:
    judge_little(monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generators") / "miniature"
    with pytest.MonkeyPatch.context() as patch:
        judge_little(patch)
        train_generator(recipe(), folder, quiet())
    return folder


# ---- The choice of a family ----


def test_the_family_chooses_the_recipe():
    assert isinstance(recipe(), FlowRecipe)
    assert type(recipe("name: x\ndataset: {name: digits}\n")).__name__ == "StableUnCLIPRecipe"


def test_an_unknown_family_is_told_at_its_line():
    assert problems(MINIATURE.replace("family: flow", "family: flwo")) == [
        "miniature.yaml:3: family: 'flwo' is not allowed; did you mean 'flow'? allowed: flow, icgan, stable_unclip"
    ]


def test_a_section_of_another_family_is_an_unknown_key():
    assert problems(MINIATURE + "denoiser: {steps: 3}\n")[0].startswith("miniature.yaml:11: denoiser: unknown key")


def test_a_named_block_within_a_section_is_validated_by_what_it_names():
    assert problems(MINIATURE.replace("width: 4", "widht: 4"))[0].startswith(
        "miniature.yaml:6: conditioner.backbone.widht: unknown key; did you mean 'width'?"
    )
    assert problems(MINIATURE.replace("resnet18", "resnet19"))[0].startswith(
        "miniature.yaml:6: conditioner.backbone.name: 'resnet19' is not one of the backbones; did you mean"
    )


@pytest.mark.parametrize("conditioner", ["{epochs: 3}", "{run: runs/x, backbone: {name: resnet18}}"])
def test_the_encoder_comes_from_one_place(conditioner):
    text = MINIATURE.partition("conditioner:")[0] + f"conditioner: {conditioner}\n"
    assert "give one of them" in problems(text)[0]


# ---- Training ----


def test_the_folder_holds_no_pickle_and_says_what_it_is(trained):
    assert {path.name for path in trained.iterdir()} == {
        "unet.safetensors",
        "encoder.safetensors",
        "config.json",
        "card.json",
        "quality.json",
        "README.md",
    }
    assert [path.name for path in trained.parent.iterdir()] == ["miniature"]
    card = json.loads((trained / "card.json").read_text())
    expected = {"name": "digits", "split": "train", "images": 1437, "corrupt_left_out": 0, "labels_used": False}
    assert card["dataset"] == expected
    assert card["recipe"]["flow"]["steps"] == 6
    assert "{name: flow, model: DIR}" in (trained / "README.md").read_text()


def test_training_again_gives_the_same_weights_and_leaves_the_global_stream_alone(trained, tmp_path):
    torch.rand(3)
    before = torch.random.get_rng_state()
    train_generator(recipe(), tmp_path / "again", quiet())
    assert torch.equal(torch.random.get_rng_state(), before)
    for path in trained.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    other = recipe(MINIATURE + "seed: 1\n")
    train_generator(other, tmp_path / "other", quiet())
    weights = [load_file(folder / "unet.safetensors") for folder in (trained, tmp_path / "other")]
    assert not torch.equal(weights[0]["conv_in.weight"], weights[1]["conv_in.weight"])


def test_the_encoder_of_a_run_can_be_the_conditioner(trained, tmp_path):
    """A generator's folder has the encoder in the format of a run directory."""
    text = MINIATURE.partition("conditioner:")[0] + f"conditioner: {{run: {trained}}}\nflow: {{steps: 1}}\nthreads: 1\n"
    train_generator(recipe(text), tmp_path / "out", quiet())
    ours, given = (load_file(folder / "encoder.safetensors") for folder in (tmp_path / "out", trained))
    assert all(torch.equal(ours[name], given[name]) for name in given)


def test_neighbours_are_the_most_similar_others():
    embeddings = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    found = nearest_neighbours(embeddings, 3, torch.device("cpu"))
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    for row in range(50):
        order = sorted((i for i in range(50) if i != row), key=lambda i: -float(unit[row] @ unit[i]))
        assert found[row].tolist() == order[:3]


def test_validation_measures_on_a_part_of_train(tmp_path):
    quality = train_generator(recipe(MINIATURE + "validation_fraction: 0.5\n"), tmp_path / "out", quiet())
    assert quality["measured_on"] == "validation (0.5 of train)"
    assert json.loads((tmp_path / "out" / "card.json").read_text())["dataset"]["images"] == 719


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[16, 16]", "[16, 8]", r"flow.block_out_channels: \[16, 8\] are not all multiples of 8 and at least 16"),
        ("[16, 16]", "[16, 16, 16, 16, 16]", "5 levels do not fit images of 8 pixels"),
        ("steps: 6", "steps: 6, target: neighbours, neighbours: 2000", "flow.neighbours: 2000 is more than"),
        ("backbone: {name: resnet18, stem: small, width: 4}", "run: /nowhere", "has no encoder.safetensors"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_training(tmp_path, old, new, message):
    with pytest.raises(ConfigError, match=message):
        train_generator(recipe(MINIATURE.replace(old, new)), tmp_path / "out", quiet())
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_names_the_step(tmp_path):
    with pytest.raises(UserError, match=r"flow: the loss became (nan|inf) at step \d+; lower its lr"):
        train_generator(recipe(MINIATURE.replace("steps: 6", "steps: 60, lr: 1.0e+18")), tmp_path / "out", quiet())
    assert list(tmp_path.iterdir()) == []


# ---- Interruptions ----


def fitted(folder: Path, stop_after: int | None = None) -> torch.Tensor:
    """Fits a line with noise in its loss, saving after every step; returns weights and their average.

    A training that is stopped has saved the step before the one of that number.
    """
    draws = Draws("line")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 1)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return (module(rows.float().view(-1, 1).expand(-1, 4)) - draws.normal(len(rows))).square().mean()

    def report(stage: str, step: int, *rest) -> None:
        if step - 1 == stop_after:
            raise KeyboardInterrupt

    loop = Loop(torch.device("cpu"), Checkpoints(folder, every_seconds=0), report)
    average = loop.averaged(module)
    lengths = SimpleNamespace(batch_size=4, lr=0.1)
    try:
        fit("line", module, loss_of, lengths, draws, loop, count=10, steps=20, average=average, ema_decay=0.5)
    except KeyboardInterrupt:
        assert stop_after is not None
    return torch.cat([module.weight.data, average.weight.data])


@pytest.mark.parametrize("stop_after", [0, 1, 7, 19])
def test_a_stage_that_was_cut_off_ends_with_the_same_weights(tmp_path, stop_after):
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    whole = fitted(tmp_path / "whole")
    fitted(tmp_path / "cut", stop_after=stop_after)
    assert torch.equal(fitted(tmp_path / "cut"), whole)


def test_an_interrupted_training_is_taken_up_by_the_same_command_alone(trained, tmp_path, monkeypatch):
    def interrupt(*arguments, **settings) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("genssl.generator_training.run.measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_generator(recipe(), tmp_path / "out", quiet())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "out"]
    with pytest.raises(UserError, match="unfinished training of another recipe"):
        train_generator(recipe(MINIATURE + "seed: 1\n"), tmp_path / "out", quiet())
    note = tmp_path / ".out.partial" / "recipe.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"genssl": "0.1.0"}))  # an earlier version began it
    train_generator(recipe(), tmp_path / "out", quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "unet.safetensors").read_bytes() == (trained / "unet.safetensors").read_bytes()
    assert "resumed" not in json.loads((tmp_path / "out" / "card.json").read_text()), "only the measuring was left"


def test_a_file_that_cannot_be_read_costs_no_steps(tmp_path, monkeypatch):
    """It is gone in the middle of the training, as from a network drive; when it is back, the same command goes on."""
    photos, random = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for number in range(80):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(photos / f"{number:02}.png")
    monkeypatch.setattr(Images.__init__, "__defaults__", (0,))
    monkeypatch.setattr(Checkpoints.__init__, "__defaults__", (0.0, ALONE))
    text = MINIATURE.replace("{name: digits}", f"{{name: folder, root: {photos}, labels: none, image_size: 16}}")
    text = text.replace("batch_size: 64", "batch_size: 16").replace("epochs: 1", "epochs: 1\n  batch_size: 16")
    report = stage_progress.StageProgress.__call__

    def lost(self, stage: str, step: int, *rest) -> None:
        report(self, stage, step, *rest)
        if (stage, step) == ("flow", 3):
            photos.rename(tmp_path / "elsewhere")

    with monkeypatch.context() as patch:
        patch.setattr(stage_progress.StageProgress, "__call__", lost)
        with pytest.raises(DataError, match=r"photos/\d\d.png"):
            train_generator(recipe(text), tmp_path / "out", quiet())
    assert (tmp_path / ".out.partial").is_dir()
    (tmp_path / "elsewhere").rename(photos)
    kept = (photos / "00.png").read_bytes()
    (photos / "00.png").write_bytes((photos / "01.png").read_bytes())
    with pytest.raises(UserError, match="or of other images"):  # as many, but not the same
        train_generator(recipe(text), tmp_path / "out", quiet())
    (photos / "00.png").write_bytes(kept)
    console = quiet()
    train_generator(recipe(text), tmp_path / "out", console)
    assert "goes on where it was saved last" in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


@pytest.mark.slow
def test_kill_9_changes_nothing_but_the_time(tmp_path):
    """Killed in the middle of the flow's training; the same command ends with the weights of a run never killed."""
    file = tmp_path / "recipe.yaml"
    file.write_text(MINIATURE.replace("steps: 6", "steps: 400"))
    script = (
        "import sys, genssl.generator_training.loop as f; f.Checkpoints.__init__.__defaults__ = (0.5, f.ALONE)\n"
        "from genssl.cli.main import main; sys.exit(main())"
    )

    def command(name: str) -> list[str]:
        return [sys.executable, "-c", script, "train-generator", str(file), "--out", str(tmp_path / name)]

    process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / ".killed.partial" / "model" / ".flow.checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    for name in ("killed", "whole"):
        subprocess.run(command(name), check=True, stdout=subprocess.DEVNULL)
    assert json.loads((tmp_path / "killed" / "card.json").read_text())["resumed"] is True
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()


# ---- From the command line to a run ----


def test_the_command_line_trains_a_flow_that_the_engine_loads(tmp_path, digits_test):
    file = tmp_path / "miniature.yaml"
    file.write_text(MINIATURE)
    result = CliRunner().invoke(app, ["train-generator", str(file), "flow.steps=2", "--out", str(tmp_path / "flow")])
    assert result.exit_code == 0, result.output
    assert "label agreement" in " ".join(result.output.split())
    engine = VariantEngine(Flow(FlowConfig(model=str(tmp_path / "flow")), torch.device("cpu")), [4])
    embeddings, _ = engine.embed([digits_test.image(row) for row in range(3)])
    rows = [engine.row(digits_test.source_id(i), embeddings[i], 0, engine.complete({})) for i in range(3)]
    images, _ = engine.generate(rows)
    assert images.shape == (3, 3, 8, 8)


@pytest.mark.slow
def test_a_run_uses_the_flow(trained, tmp_path, quick_recipe):
    block = f"{{name: flow, model: {trained}, num_inference_steps: 1}}"
    two_steps = quick_recipe(f"generator={block}", "variants.source=in_process", "train.batch_size=718", "evaluate=[]")
    with RunProgress(quiet()) as progress:
        results = run(two_steps, tmp_path / "run", progress)
    assert results["ledger"]["variants_generated"] == 2 * 718


@pytest.mark.slow
def test_a_folder_of_odd_images_trains_a_flow_that_a_server_serves(tmp_path, quick_recipe):
    """Two hundred PNG and JPEG files, grey and colour, of any shape, one of them corrupt."""
    random, photos = np.random.default_rng(0), tmp_path / "photos"
    photos.mkdir()
    for number in range(200):
        height, width = random.integers(9, 90, 2)
        pixels = random.integers(0, 256, (height, width) if number % 3 else (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number:03}.{'png' if number % 2 else 'jpg'}")
    (photos / "100.jpg").write_bytes((photos / "100.jpg").read_bytes()[:60])
    dataset = f"{{name: folder, root: {photos}, labels: none, image_size: 16, on_corrupt: skip}}"
    text = MINIATURE.replace("{name: digits}", dataset).replace("epochs: 1", "epochs: 1\n  batch_size: 64")
    quality = train_generator(recipe(text), tmp_path / "flow", quiet())
    assert quality["settings"][0]["label_agreement"] is None
    two_steps = quick_recipe(
        f"dataset={dataset}",
        f"generator={{name: flow, model: {tmp_path / 'flow'}}}",
        "train.batch_size=64",
        "evaluate=[]",
    )
    with RunProgress(quiet()) as progress:
        results = run(two_steps, tmp_path / "run", progress)  # variants.source is online: a server of its own
    assert results["ledger"]["variants_generated"] >= 64
    assert results["ledger"]["bytes_received"] > 0
