"""timm's models by name; what needs timm is skipped without it."""

from __future__ import annotations

import socket
import sys

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from genssl.backbones.configs import TimmConfig
from genssl.backbones.timm import build_timm
from genssl.errors import ConfigError
from genssl.registry import BACKBONES, UnknownNameError


def test_every_name_of_the_library_finds_the_entry():
    assert BACKBONES.config("timm/resnet26d") is TimmConfig
    assert BACKBONES.get("timm/resnet26d") is build_timm
    assert TimmConfig(name="timm/resnet50.a1_in1k").name == "timm/resnet50.a1_in1k"
    for name in ("timm/", "tim/resnet26d", "timm"):
        with pytest.raises(UnknownNameError):
            BACKBONES.config(name)


@pytest.mark.parametrize("name", ["timm/<model>", "timm/hf-hub:someone/model", "resnet26d"])
def test_only_names_of_models_are_accepted(name):
    with pytest.raises(ValidationError):
        TimmConfig(name=name)


def test_without_timm_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError) as caught:
        build_timm(TimmConfig(name="timm/resnet26d"))
    assert str(caught.value) == "backbone.name: 'timm/resnet26d' needs timm; run `pip install 'genssl[timm]'`"


@pytest.fixture
def timm(monkeypatch):
    """The library, in a process that may not open a connection."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    library = pytest.importorskip("timm")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return library


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "test_vit"])
def test_features_have_the_width_that_the_backbone_says(timm, name):
    network = build_timm(TimmConfig(name=f"timm/{name}")).eval()
    size = 160 if name == "test_vit" else 64
    assert network(torch.rand(2, 3, size, size)).shape == (2, network.feature_dim)


def test_the_image_size_of_a_vit_can_be_set_and_that_of_a_resnet_need_not(timm):
    network = build_timm(TimmConfig(name="timm/test_vit", image_size=32)).eval()
    assert network(torch.rand(1, 3, 32, 32)).shape == (1, network.feature_dim)
    with pytest.raises(ConfigError, match="takes images of any size; leave it out"):
        build_timm(TimmConfig(name="timm/resnet10t", image_size=32))


def test_an_unknown_model_meets_its_nearest_match(timm):
    with pytest.raises(ConfigError, match=r"has no model 'resnet10tt'; did you mean 'timm/resnet10t'"):
        build_timm(TimmConfig(name="timm/resnet10tt"))


def test_weights_come_from_a_local_file_without_its_classifier(timm, tmp_path):
    whole = timm.create_model("resnet10t", num_classes=3)
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    network = build_timm(TimmConfig(name="timm/resnet10t", weights=tmp_path / "w.safetensors"))
    loaded = network.state_dict()
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in loaded.items())


def test_weights_that_do_not_fit_are_refused(timm, tmp_path):
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"w.safetensors does not fit the model: Missing key"):
        build_timm(TimmConfig(name="timm/resnet10t", weights=tmp_path / "w.safetensors"))
    (tmp_path / "w.safetensors").write_bytes(b"no weights at all")
    for path in (tmp_path / "w.safetensors", tmp_path / "absent.safetensors"):
        with pytest.raises(ConfigError, match="cannot be read as a safetensors file"):
            build_timm(TimmConfig(name="timm/resnet10t", weights=path))
