"""The table of `genssl evaluate`: its numbers, its protocol ids, and which images encoders are shown."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from genssl.config.load import load, parse_blocks
from genssl.config.protocol import Protocol
from genssl.config.recipe import Recipe
from genssl.data.configs import Cifar10Config, DigitsConfig, FolderConfig, ImageNetConfig
from genssl.data.decode import decode
from genssl.data.load import load_dataset
from genssl.encoders.judge import GeneratedVariants, protocol_id, transfer
from genssl.encoders.load import load_encoder
from genssl.errors import ConfigError, DataError, UserError
from genssl.evaluators.configs import KNNConfig, LinearProbeConfig
from genssl.training.progress import RunProgress
from genssl.training.run import run
from genssl.variants.key import VariantKey, parameters_digest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "simclr_sd.yaml"
CPU = torch.device("cpu")
QUICK = ["train.epochs=1", "schedule.warmup_epochs=0", "backbone.width=4", "train.threads=1", "variants.source=none"]


def train(out: Path, *overrides: str) -> dict[str, Any]:
    recipe = load(Recipe, RECIPE, [*QUICK, *overrides])
    with (out.parent / "output.txt").open("w") as text, RunProgress(Console(file=text)) as progress:
        return run(recipe, out, progress)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A finished run that holds out a third of train, and its results."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, train(out, "evaluate=[knn, few_shot]", "train.validation_fraction=0.33")


def test_a_run_judged_later_has_the_numbers_of_its_end(finished):
    out, results = finished
    table = transfer([load_encoder(str(out), CPU)], [([], [])], CPU)
    assert {f"{row.evaluator}/{row.metric}": row.value for row in table.rows} == results["metrics"]
    assert {row.evaluator: row.facts for row in table.rows} == results["protocol"]
    assert {row.dataset for row in table.rows} == {"digits"}


def test_the_checkpoint_of_a_run_is_its_encoder_too(finished, digits_test):
    images = torch.from_numpy(np.stack([digits_test.image(row) for row in range(4)])).float() / 255
    whole, checkpoint = (load_encoder(str(path), CPU) for path in (finished[0], finished[0] / "checkpoint.pt"))
    assert torch.equal(whole.module.encode(images), checkpoint.module.encode(images))


def test_the_number_is_that_of_a_plain_vote(photos):
    """kNN in float64 on features of a random network, one image after the other."""
    encoder = load_encoder("torchvision/squeezenet1_1", CPU)
    config = FolderConfig(root=photos, image_size=32)
    (row,) = transfer([encoder], [([config], [KNNConfig(k=3, temperature=0.5)])], CPU).rows
    splits = {split: load_dataset(config, split) for split in ("train", "test")}  # type: ignore[arg-type]
    features = {
        split: np.stack(
            [
                encoder.module.encode(torch.from_numpy(data.image(i))[None].float() / 255)[0].numpy().astype(float)
                for i in range(len(data))
            ]
        )
        for split, data in splits.items()
    }
    right = 0
    for i, query in enumerate(features["test"]):
        cosines = features["train"] @ query / np.linalg.norm(features["train"], axis=1) / np.linalg.norm(query)
        votes = np.zeros(2)
        for neighbour in np.argsort(-cosines)[:3]:
            votes[splits["train"].label(int(neighbour))] += np.exp(cosines[neighbour] / 0.5)
        right += votes.argmax() == splits["test"].label(i)
    assert row.value == pytest.approx(right / len(splits["test"]))


def test_equal_protocols_have_equal_ids_whatever_the_encoder(finished):
    out, _ = finished
    encoders = [load_encoder(name, CPU) for name in (str(out), "torchvision/resnet18")]
    digits = [DigitsConfig()]
    with pytest.raises(UserError, match=r"torchvision/resnet18: does not come from a run, .* name one: --dataset"):
        transfer(encoders, [([], [KNNConfig()])], CPU)
    first = transfer(encoders[:1], [(digits, [KNNConfig(), KNNConfig(k=5)])], CPU)
    assert [row.facts["k"] for row in first.rows] == [20, 5], "an evaluator may stand twice, with other settings"
    assert len({row.protocol for row in first.rows}) == 2
    both = transfer(encoders, [(digits, [LinearProbeConfig(penalties=[0.1, 1.0])])], CPU)
    assert [row.encoder for row in both.rows] == [str(out), "torchvision/resnet18"]
    assert both.rows[0].protocol == both.rows[1].protocol
    assert set(both.protocols) == {both.rows[0].protocol}


def test_an_id_depends_on_every_setting_and_on_nothing_else():
    settings = {"evaluator": {"name": "knn", "k": 5}, "dataset": {"name": "digits", "image_size": 8}}
    assert protocol_id(settings) == protocol_id(dict(reversed(settings.items())))
    others = [
        {**settings, "evaluator": {"name": "knn", "k": 6}},
        {**settings, "dataset": {"name": "digits", "image_size": 9}},
    ]
    assert len({protocol_id(item) for item in [settings, *others]}) == 3


def test_images_have_the_encoders_size_unless_the_block_says_another(finished, photos):
    encoder = load_encoder(str(finished[0]), CPU)  # of 8 pixels
    blocks = [FolderConfig(root=photos), FolderConfig(root=photos, image_size=16)]
    table = transfer([encoder], [(blocks, [KNNConfig()])], CPU)
    assert [table.protocols[row.protocol]["dataset"]["image_size"] for row in table.rows] == [8, 16]
    facts = table.protocols[table.rows[0].protocol]["dataset"]
    assert "root" not in facts, "where images are is no part of a protocol"
    assert facts["train"]["images"] + facts["test"]["images"] == 24


def test_a_data_set_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("GENSSL_DATA", str(tmp_path / "sets"))
    encoder = load_encoder("torchvision/squeezenet1_1", CPU)
    where = rf"CIFAR-10 is not in {tmp_path}/sets; expected there: .*; get it with: .*, or set dataset.download: true"
    with pytest.raises(DataError, match=where):
        transfer([encoder], [([Cifar10Config()], [KNNConfig()])], CPU)
    with pytest.raises(DataError, match=rf"ImageNet-1k is not in {tmp_path}/sets/imagenet; "):
        transfer([encoder], [([ImageNetConfig()], [KNNConfig()])], CPU)


def test_files_have_everything_that_the_numbers_depend_on(finished, tmp_path):
    out, _ = finished
    table = transfer([load_encoder(str(out), CPU)], [([DigitsConfig()], [KNNConfig()])], CPU)
    table.write(tmp_path / "made" / "here")
    content = json.loads((tmp_path / "made" / "here" / "evaluation.json").read_text())
    with (tmp_path / "made" / "here" / "evaluation.csv").open() as file:
        (line,) = csv.DictReader(file)
    (row,) = content["rows"]
    assert float(line["value"]) == row["value"] == table.rows[0].value
    assert line["protocol"] in content["protocols"]
    assert content["encoders"][str(out)]["digest"]
    assert content["packages"]["torch"]
    settings = content["protocols"][line["protocol"]]
    assert settings["evaluator"] == {"name": "knn", "k": 20, "temperature": 0.07}
    assert settings["dataset"]["test"]["images"] == 360


def test_what_is_done_is_kept_before_the_next_begins(finished):
    seen: list[int] = []
    table = transfer(
        [load_encoder(str(finished[0]), CPU)],
        [([DigitsConfig()], [KNNConfig(), KNNConfig(k=5)])],
        CPU,
        keep=lambda table: seen.append(len(table.rows)),
    )
    assert seen == [1, 2]
    assert len(table.rows) == 2


def test_variants_are_those_that_the_key_names(digits_train, unclip):
    recipe = load(Recipe, RECIPE, ["train.threads=1"])
    made = GeneratedVariants(recipe, CPU)(digits_train, [3, 10], 7)
    assert made.shape == (2, 3, 8, 8)
    for row, image in zip((3, 10), made, strict=True):
        parameters = dict(unclip.spec.defaults)
        key = VariantKey(digits_train.source_id(row), unclip.spec.fingerprint, parameters_digest(parameters), 7)
        source = torch.from_numpy(unclip.preprocess(decode(digits_train.stored(row))))[None]
        expected = unclip.generate(unclip.embed(source), [key.seed()], [parameters]).numpy()[0]
        assert np.abs(image.astype(int) - expected.astype(int)).max() <= 1  # a grey level, between batch sizes


def test_blocks_of_the_command_line():
    (knn, few) = parse_blocks("evaluator", ["knn", "{name: few_shot, draws: 3}"])
    assert (knn.name, few.draws, few.model_fields_set) == ("knn", 3, {"name", "draws"})  # type: ignore[attr-defined]
    with pytest.raises(ConfigError) as caught:
        parse_blocks("evaluator", ["{name: knn, kk: 3}"])
    assert str(caught.value).startswith(
        "--evaluator '{name: knn, kk: 3}': evaluator.kk: unknown key; did you mean 'k'?"
    )
    with pytest.raises(ConfigError, match=r"--dataset 'digit': dataset.name: 'digit' is not one of the datasets; did"):
        parse_blocks("dataset", ["digit"])


def test_the_papers_protocols_are_those_of_its_released_code():
    paper, places = (
        load(Protocol, ROOT / "recipes" / "linear_probe" / f"{name}.yaml") for name in ("paper", "places365")
    )
    names = [config.name for protocol in (paper, places) for config in protocol.datasets]
    assert names == ["imagenet", "food101", "cifar10", "cifar100", "inaturalist2018", "places365"]
    for protocol, epochs in ((paper, 100), (places, 45)):
        (probe,) = protocol.evaluate
        assert isinstance(probe, LinearProbeConfig)
        assert (probe.optimizer, probe.epochs, probe.batch_size, probe.weight_decays) == (
            "lars",
            epochs,
            4 * 512,
            [0.0],
        )
        assert (probe.rates(), probe.trust_coefficient) == ([0.1 * 4 * 512 / 256], 0.001)
