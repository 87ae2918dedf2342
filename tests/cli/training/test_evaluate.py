"""`genssl evaluate` as a user meets it: one table, files beside it, and mistakes in one sentence."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from genssl.cli.main import app, main
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import UserError
from genssl.training.progress import RunProgress
from genssl.training.run import run

ROOT = Path(__file__).resolve().parents[3]
QUICK = ["train.epochs=1", "schedule.warmup_epochs=0", "backbone.width=4", "train.threads=1", "evaluate=[knn]"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run with a generator, whose training had no variants."""
    out: Path = tmp_path_factory.mktemp("runs") / "run"
    recipe = load(Recipe, ROOT / "recipes" / "simclr_sd.yaml", [*QUICK, "variants.source=none"])
    with (out.parent / "output.txt").open("w") as text, RunProgress(Console(file=text)) as progress:
        run(recipe, out, progress)
    return out


def call(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["evaluate", *arguments, "--device", "cpu"])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_one_table_for_encoders_data_sets_and_evaluators(finished, photos, tmp_path):
    out, encoders = tmp_path / "transfer", [str(finished), "torchvision/resnet18"]
    arguments = ["--evaluator", "knn", "--evaluator", "{name: knn, k: 5}"]
    for size in (16, 24):
        arguments += ["--dataset", f"{{name: folder, root: {photos}, image_size: {size}}}"]
    printed = call(*encoders, *arguments, "--out", str(out))
    assert "torchvision/resnet18: has random weights; name some with torchvision/resnet18:WEIGHTS" in printed
    content = json.loads((out / "evaluation.json").read_text())
    told = content["protocols"]
    seen = [
        (row["encoder"], told[row["protocol"]]["dataset"]["image_size"], told[row["protocol"]]["evaluator"]["k"])
        for row in content["rows"]
    ]
    assert seen == [(encoder, size, k) for encoder in encoders for size in (16, 24) for k in (20, 5)]
    assert len(told) == 4, "both encoders have the same four protocols"
    for row in content["rows"]:
        assert row["protocol"] in printed
        assert f"{100 * row['value']:.2f} %" in printed
    assert {path.name for path in out.iterdir()} == {"evaluation.csv", "evaluation.json"}
    assert (out / "evaluation.csv").read_text().startswith("encoder,dataset,evaluator,metric,value,protocol\n")


def test_a_run_alone_is_judged_on_its_own_data_by_its_own_evaluators(finished, tmp_path):
    call(f"{finished}/", "--out", str(tmp_path))
    (row,) = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    own = json.loads((finished / "results.json").read_text())["metrics"]
    assert (f"{row['evaluator']}/{row['metric']}", row["value"]) == ("knn/top1", own["knn/top1"])


def test_an_evaluator_that_wants_variants_gets_those_of_the_runs_generator(finished, tmp_path):
    evaluator = "{name: vendi, images: 16, variants: 2}"
    call(str(finished), "--evaluator", evaluator, "--out", str(tmp_path))
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert rows
    assert all(np.isfinite(row["value"]) for row in rows)
    with pytest.raises(UserError, match=r"needs variants .* there is no generator here"):
        call("torchvision/resnet18", "--dataset", "digits", "--evaluator", evaluator)


def test_the_table_fits_a_terminal_of_80_columns(finished):
    arguments = ["evaluate", str(finished), "--device", "cpu", "--evaluator", "{name: alignment_uniformity, images: 8}"]
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, arguments).stdout
    (line,) = [line for line in shown.splitlines() if "alignment_real_variant" in line]
    assert line.split("│")[2].strip() == "alignment_real_variant"
    assert len(line) <= 80


def test_variants_can_be_judged_by_an_encoder_that_has_seen_none(finished, tmp_path):
    arguments = ["torchvision/resnet18", "--dataset", "digits", "--evaluator", "semantic_consistency"]
    with pytest.raises(UserError, match="generator"):
        call(*arguments)
    shown = call(*arguments, "--variants", str(finished), "--out", str(tmp_path / "out"))
    assert "label_agreement" in shown
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["encoders"]["torchvision/resnet18"]["variants_by"]["model"] == "builtin:digits-unclip"
    assert "variants seen by torchvision/resnet18: stable_unclip builtin:digits-unclip" in shown
    call(*arguments, "--variants", str(finished / "recipe.yaml"), "--out", str(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "evaluation.json").read_text())["rows"] == content["rows"]
    (tmp_path / "none.yaml").write_text(
        "name: none\ndataset: digits\nmethod: simclr\nbackbone: resnet18\nvariants: {source: none}\n"
        "optimizer: {lr: 0.1}\ntrain: {epochs: 1, batch_size: 8}\n"
    )
    with pytest.raises(UserError, match=r"none.yaml: has no generator"):
        call(*arguments, "--variants", str(tmp_path / "none.yaml"))


def test_a_protocol_file_names_data_and_evaluators(finished, photos, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"name: mine\ndatasets: [{{name: folder, root: {photos}}}, digits]\nevaluate: [{{name: knn, k: 3}}]\n"
    )
    call(str(finished), "--protocol", str(path), "--out", str(tmp_path))
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert [(row["dataset"], row["facts"]["k"]) for row in rows] == [("folder", 3), ("digits", 3)]
    other = tmp_path / "other.yaml"
    other.write_text(f"name: other\ndatasets: [{{name: folder, root: {photos}}}]\nevaluate: [{{name: knn, k: 7}}]\n")
    both = ["--protocol", str(path), "--protocol", str(other)]
    call(str(finished), *both, "--dataset", "digits", "--out", str(tmp_path))
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert [(row["dataset"], row["facts"]["k"]) for row in rows] == [("digits", 3)], "a name selects from the protocols"
    path.write_text("name: mine\ndatasets: [digits]\nevaluate: [{name: knn, kk: 3}]\n")
    with pytest.raises(UserError, match=rf"{path}:3: evaluate.0.kk: unknown key; did you mean 'k'"):
        call(str(finished), "--protocol", str(path))


def test_a_protocol_that_came_with_genssl_has_a_name(finished, photos, tmp_path):
    arguments = ["--dataset", f"{{name: folder, root: {photos}}}", "--evaluator", "knn", "--out", str(tmp_path)]
    call(str(finished), "--protocol", "linear_probe/paper", *arguments)
    assert [row["dataset"] for row in json.loads((tmp_path / "evaluation.json").read_text())["rows"]] == ["folder"]
    with pytest.raises(UserError, match=r"linear_probe/papers: no such file"):
        call(str(finished), "--protocol", "linear_probe/papers", *arguments)


def test_a_checkpoint_of_others_with_its_network_named(tmp_path):
    from genssl.backbones.configs import ResNet18Config
    from genssl.backbones.resnet import build_resnet

    path = tmp_path / "x.ckpt"
    torch.save(
        {"state_dict": {f"net.{k}": v for k, v in build_resnet(ResNet18Config(width=4)).state_dict().items()}}, path
    )
    arguments = ["--backbone", "{name: resnet18, width: 4}", "--normalize", "none", "--dataset", "digits"]
    call(str(path), *arguments, "--evaluator", "knn", "--out", str(tmp_path))
    (source,) = json.loads((tmp_path / "evaluation.json").read_text())["encoders"].values()
    assert (source["prefix"], source["normalize"]["std"]) == ("state_dict.net.", [1.0, 1.0, 1.0])


def test_a_checkpoint_of_two_networks_says_which_it_takes_and_takes_the_other_when_asked(tmp_path):
    from genssl.backbones.configs import ResNet10Config
    from genssl.backbones.resnet import build_resnet

    networks = [build_resnet(ResNet10Config(width=4, stem="small")).state_dict() for _ in range(2)]
    path, arguments = tmp_path / "x.pth", ["--dataset", "digits", "--evaluator", "knn"]
    torch.save(dict(zip(("student", "teacher"), networks, strict=True)), path)
    student = f"{{encoder: {path}, prefix: student}}"
    said = call(str(path), student, *arguments, "--out", str(tmp_path))
    for part in (
        f"{path}: network: resnet10, stem small, width 4, stages 4; prefix: teacher.; passed over: student.;",
        "stem: stride 1, padded by 1 (assumed); statistics: imagenet (assumed). To say otherwise, change: "
        f"'{{encoder: {path}, prefix: teacher., stem_padding: 1, normalize: imagenet}}'",
    ):
        assert part in said
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert [found["encoders"][name]["prefix"] for name in (str(path), student)] == ["teacher.", "student."]
    call(str(path), "--prefix", "student", *arguments, "--out", str(tmp_path))
    again = json.loads((tmp_path / "evaluation.json").read_text())
    assert again["rows"][0]["value"] == found["rows"][-1]["value"] != found["rows"][0]["value"]
    with pytest.raises(UserError, match="holds a resnet10, which has no heads; leave them out"):
        call(str(path), "--heads", "3", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], r"nowhere: there is no such file or folder; give a run directory"),
        (["torchvision/resnet18", "torchvision/resnet18"], r"torchvision/resnet18 is given twice"),
        (["torchvision/resnet18"], r"torchvision/resnet18: does not come from a run, .* name one: --dataset"),
        (["torchvision/resnet18", "--normalize", "imagnet"], r"--normalize imagnet: is not known; did you mean"),
        (["torchvision/resnet18", "--evaluator", "kn"], r"--evaluator 'kn': evaluator.name: 'kn' is not one of"),
        (["torchvision/resnet18", "--dataset", "{name: folder}"], r"dataset.root: is missing; add it"),
        (["torchvision/resnet18", "--dataset", "{name"], r"--dataset:1: not valid YAML"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(arguments, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        call(*arguments, "--out", str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_that_is_not_there_ends_with_code_2_and_no_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GENSSL_DATA", raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handlers stay pytest's
    arguments = ["evaluate", "torchvision/squeezenet1_1", "--dataset", "pets", "--out", "out", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["genssl", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"genssl: dataset.root: Oxford-IIIT Pets is not in {tmp_path}/data; expected there: ")
    assert list(tmp_path.iterdir()) == []
