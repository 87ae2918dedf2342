"""What is watched while a run trains, and where its numbers go."""

from __future__ import annotations

import csv
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from short_runs import run_and_read, without_pictures
from torch import nn

from genssl.data.load import hold_out
from genssl.errors import ConfigError, UserError
from genssl.training.loggers import MetricsLog, as_csv, check_loggers, open_loggers
from genssl.training.monitors import KNN, RANK, SPREAD, Monitor, collapse_of, spread_and_rank, warning_of

CPU = torch.device("cpu")


class Pixels(nn.Module):
    """An encoder whose features are the pixels, scaled; at scale 0 it is collapsed."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.norm = nn.BatchNorm2d(3)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(images).flatten(1) * self.scale + 1.0


# ---- Collapse ----


def test_spread_and_rank_of_what_is_known():
    draws = torch.Generator().manual_seed(0)
    sphere = spread_and_rank(torch.randn(4096, 16, generator=draws))
    assert sphere[SPREAD] == pytest.approx(1.0, abs=0.01)
    assert sphere[RANK] == pytest.approx(16, abs=0.1)
    point = spread_and_rank(torch.ones(100, 16))
    assert (point[SPREAD], point[RANK]) == pytest.approx((0.0, 0.0), abs=1e-6)
    line = spread_and_rank(torch.randn(100, 1, generator=draws) * torch.ones(1, 16))
    assert line[RANK] == pytest.approx(1.0, abs=1e-3)
    assert spread_and_rank(torch.full((4, 2), torch.nan)) == {SPREAD: 0.0, RANK: 0.0}


def test_a_collapsed_encoder_is_told_from_a_healthy_one(quick_recipe, digits_train):
    monitor = Monitor(quick_recipe(), digits_train, None, CPU)
    healthy, collapsed = (monitor.measure(Pixels(scale), 1) for scale in (1.0, 1e-3))
    assert collapse_of(healthy) is None
    assert collapse_of(collapsed).startswith("all images have nearly the same representation (spread ")


def test_it_is_said_in_words_when_it_lasts():
    healthy, point, line = ({SPREAD: spread, RANK: rank} for spread, rank in ((0.7, 40.0), (0.001, 9.0), (0.5, 1.2)))

    def said(*kinds: dict) -> str | None:
        return warning_of([kind | {"epoch": number} for number, kind in enumerate(kinds, start=1)], 30.0)

    assert said(healthy, healthy) is None
    assert said(point) is None, "after one epoch the running statistics of batch norm may not be there yet"
    assert said(point, healthy) is None
    assert said(healthy, point, line).startswith(
        "the representation has collapsed since epoch 2: the images differ in hardly more than one direction "
        "(effective rank 1.2). Lower optimizer.lr (it is 30)"
    )


def test_an_absurd_learning_rate_is_reported(quick_recipe, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    recipe = quick_recipe(
        "train.epochs=2",
        "variants.source=none",
        "evaluate=[]",
        "method={name: simsiam, projector_hidden_dim: 64, projector_output_dim: 64, predictor_hidden_dim: 16}",
        "train.batch_size=478",
        "optimizer={name: sgd, lr: 50.0}",
        "schedule.name=constant",
    )
    results, text = run_and_read(recipe, tmp_path / "out")
    words = "the representation has collapsed since epoch 1: all images have nearly the same representation"
    assert text.count(words) == 1
    assert results["monitor"]["collapse"].startswith(words)


# ---- Online kNN ----


def test_online_knn_uses_no_image_twice_and_no_test_split(quick_recipe, digits_train):
    recipe = quick_recipe("monitor.knn_every_epochs=2", "monitor.bank=300", "monitor.queries=100")
    monitor = Monitor(recipe, digits_train, None, CPU)
    assert len(monitor._bank) == 300
    assert len(monitor._queries) == 100
    assert not set(monitor._bank) & set(monitor._queries)
    assert KNN not in monitor.measure(Pixels(), 1)
    assert monitor.measure(Pixels(), 2)[KNN] > 0.9, "the pixels of digits have the right neighbours"
    train, held_out = hold_out(digits_train, 0.25)
    assert Monitor(recipe, train, held_out, CPU).protocol["of"] == "the held-out part of train"


def test_measuring_changes_nothing(quick_recipe, digits_train):
    method = Pixels().train()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    random = torch.get_rng_state()
    Monitor(quick_recipe("monitor.knn_every_epochs=1"), digits_train, None, CPU).measure(method, 1)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert method.training
    assert method.norm.training


def test_online_knn_without_labels_is_one_sentence(quick_recipe, digits_train):
    bare = type("Bare", (), {"name": "pictures", "class_names": None, "__len__": lambda self: 9})()
    with pytest.raises(ConfigError, match="online kNN needs labels and pictures has none; remove it"):
        Monitor(quick_recipe("monitor.knn_every_epochs=1"), bare, None, CPU)


# ---- Logs ----


def test_the_csv_has_every_column_of_every_row():
    rows = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "knn_top1": 0.9}]
    assert as_csv(rows) == "epoch,loss,knn_top1\n1,0.5,\n2,0.25,0.9\n"


def test_both_logs_go_on_after_a_cut(tmp_path):
    with MetricsLog(tmp_path, []) as log:
        for epoch in (1, 2, 3):
            log.write({"epoch": epoch, "step": 10 * epoch, "loss": 1 / epoch})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "st')
    with MetricsLog(tmp_path, [], done=25) as log:
        assert [row["epoch"] for row in log.rows] == [1, 2]
        log.write({"epoch": 3, "step": 30, "loss": 7.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [1.0, 0.5, 7.0]
    with (tmp_path / "metrics.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [1.0, 0.5, 7.0]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_every_row(quick_recipe, tmp_path, monkeypatch, name):
    calls: list[tuple] = []
    tracker = SimpleNamespace(
        init=lambda **keywords: calls.append(("init", keywords["project"], keywords["name"])),
        log=lambda row, step: calls.append(("log", row, step)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, name, tracker)
    recipe = quick_recipe(f"train.loggers=[{name}]")
    with MetricsLog(tmp_path, open_loggers(recipe, tmp_path, resumed=False)) as log:
        log.write({"epoch": 1, "step": 10, "loss": 0.5})
    assert calls == [
        ("init", "simclr-sd-digits", tmp_path.name),
        ("log", {"epoch": 1, "loss": 0.5}, 10),
        ("finish",),
    ]


@pytest.mark.parametrize(
    ("name", "module", "install"),
    [
        ("tensorboard", "torch.utils.tensorboard", r"pip install 'genssl\[tensorboard\]'"),
        ("wandb", "wandb", "pip install 'wandb'"),
    ],
)
def test_a_logger_that_is_not_installed_is_one_sentence(quick_recipe, monkeypatch, name, module, install):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"train.loggers: {name} is not installed .*; {install}, or take it out"):
        check_loggers(quick_recipe(f"train.loggers=[{name}]"))
