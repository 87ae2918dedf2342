"""What holds for every evaluator that is registered: frozen means frozen, and errors come before the training."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from genssl.backbones.configs import ResNet18Config
from genssl.backbones.resnet import build_resnet
from genssl.base.devices import seeded_initialisation
from genssl.errors import DataError, UserError
from genssl.evaluators.base import EvaluationData
from genssl.evaluators.run import check, evaluate
from genssl.evaluators.units import declared, is_accuracy, is_detail
from genssl.methods.configs import SimCLRConfig
from genssl.methods.simclr import SimCLR
from genssl.registry import EVALUATORS

NAMES = [name for name, _, origin in EVALUATORS.describe() if origin == "genssl"]
QUICK = {"images": 60, "draws": 2, "epochs": 1, "min_steps": 2, "penalties": [0.1], "variants": 2, "sources": 12}
MORE: dict[str, list[dict[str, Any]]] = {
    "linear_probe": [
        {"optimizer": "sgd", "epochs": 1, "penalties": None},
        {"optimizer": "lars", "features": "augmented", "epochs": 1, "penalties": None},
    ],
    "finetune": [{"label_fraction": 0.1, "optimizer": "adamw"}],
}
NEED_NO_LABELS = {"rankme", "alignment_uniformity"}


def quick(name: str, **settings: Any) -> Any:
    """Returns the Config of an evaluator with little to do."""
    model = EVALUATORS.config(name)
    less = {field: value for field, value in QUICK.items() if field in model.model_fields}
    if name == "linear_probe" and "optimizer" not in settings:
        less.pop("epochs")
    chosen = {key: value for key, value in {**less, **settings}.items() if value is not None}
    return model(name=name, **chosen)


class Part:
    """The first images of a split."""

    def __init__(self, dataset, count: int, labelled: bool = True) -> None:
        self.dataset, self.count, self.labelled = dataset, count, labelled
        self.name, self.image_size, self.skipped = dataset.name, dataset.image_size, []
        self.class_names = dataset.class_names if labelled else None

    def __len__(self) -> int:
        return self.count

    def image(self, row):
        return self.dataset.image(row)

    def label(self, row):
        return self.dataset.label(row) if self.labelled else -1

    def stored(self, row):
        return self.dataset.stored(row)

    def source_id(self, row):
        return self.dataset.source_id(row)


def variants(split, rows, index):
    """Returns images moved by a pixel a variant, in place of a generator's."""
    return np.stack([np.roll(split.image(row), index + 1, axis=2) for row in rows])


@pytest.fixture(scope="module")
def data(digits_train, digits_test) -> EvaluationData:
    return EvaluationData(Part(digits_train, 400), Part(digits_test, 120), "test", variants)


@pytest.fixture(scope="module")
def method() -> nn.Module:
    """A method in training mode, whose batch norms have seen some data."""
    with seeded_initialisation("every evaluator"):
        module = SimCLR(SimCLRConfig(), build_resnet(ResNet18Config(width=4, stem="small")))
        with torch.no_grad():
            module.train().backbone(torch.rand((64, 3, 8, 8)))
    return module


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, settings) for name in NAMES for settings in ({}, *MORE.get(name, []))],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "default",
)
def test_frozen_means_frozen(data, method, name, settings):
    """Weights, statistics, modes and what is trained are as before; so is torch's stream; the protocol is JSON."""
    config = quick(name, **settings)
    state = {key: value.clone() for key, value in method.state_dict().items()}
    modes = {key: module.training for key, module in method.named_modules()}
    trained = {key: parameter.requires_grad for key, parameter in method.named_parameters()}
    stream = torch.random.get_rng_state()
    try:
        check([config], data)
    except UserError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))
    metrics, protocols = evaluate([config], method, data, torch.device("cpu"))
    assert method.state_dict().keys() == state.keys()
    for key, value in method.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert {key: module.training for key, module in method.named_modules()} == modes
    assert {key: parameter.requires_grad for key, parameter in method.named_parameters()} == trained
    assert all(parameter.grad is None for parameter in method.parameters())
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert metrics
    assert all(key.startswith(f"{name}/") and np.isfinite(value) for key, value in metrics.items())
    assert json.loads(json.dumps(protocols))[name]
    assert [key for key in metrics if declared(key) is None] == [], "in genssl.evaluators.units"
    assert all(0 <= value <= 1 for key, value in metrics.items() if is_accuracy(key) and not is_detail(key))


@pytest.mark.parametrize("name", ["knn", "linear_probe", "few_shot", "finetune", "robustness"])
def test_labels_that_are_needed_are_asked_for_before_the_training(digits_train, digits_test, name):
    bare = EvaluationData(Part(digits_train, 50, labelled=False), Part(digits_test, 50, labelled=False), "test")
    with pytest.raises(DataError, match=rf"evaluate\.{name}.*: the evaluators need labels and digits has none here"):
        check([quick(name)], bare)


@pytest.mark.parametrize("name", sorted(NEED_NO_LABELS))
def test_others_judge_on_images_alone(digits_train, digits_test, method, name):
    bare = EvaluationData(Part(digits_train, 50, labelled=False), Part(digits_test, 50, labelled=False), "test")
    check([quick(name)], bare)
    metrics, _ = evaluate([quick(name)], method, bare, torch.device("cpu"))
    assert metrics


def test_an_evaluator_that_changes_the_encoder_is_found_out(data, method, monkeypatch):
    class Careless:
        """Moves a weight."""

        Config = EVALUATORS.config("knn")
        protocol: dict[str, Any] = {}  # noqa: RUF012

        def __init__(self, config) -> None:
            pass

        def run(self, encoder, data):
            encoder._module.backbone.bn1.running_mean += 1
            yield "value", 0.0

    before = method.backbone.bn1.running_mean.clone()
    monkeypatch.setattr(EVALUATORS, "get", lambda name: Careless)
    with pytest.raises(AssertionError, match=r"changed the frozen encoder: \['backbone\.bn1\.running_mean'\]"):
        evaluate([quick("knn")], method, data, torch.device("cpu"))
    method.backbone.bn1.running_mean.copy_(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("name", "settings"), [(name, settings) for name in NAMES for settings in ({}, *MORE.get(name, []))]
)
def test_a_gpu_finds_what_the_cpu_finds(data, method, name, settings):
    config = quick(name, **settings)
    on_cpu, _ = evaluate([config], method, data, torch.device("cpu"))
    on_gpu, _ = evaluate([config], copy.deepcopy(method).cuda(), data, torch.device("cuda"))
    # A few of the 120 test images may lie on the border between two classes.
    assert on_gpu == pytest.approx(on_cpu, abs=0.03, rel=0.01)
