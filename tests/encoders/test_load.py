"""Encoders from runs, libraries and other frameworks' checkpoints give the features that those would give."""

from __future__ import annotations

import os
import pickle
import socket
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.models.resnet import Bottleneck
from trained_networks import lived_in

from genssl.backbones.configs import (
    ResNet10Config,
    ResNet18Config,
    ResNet34Config,
    ResNet50Config,
    ResNetConfig,
    ViTTinyConfig,
)
from genssl.backbones.resnet import build_resnet
from genssl.backbones.vit import build_vit
from genssl.config.documents.dump import to_yaml
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.encoders.load import EncoderError, LoadedEncoder, load_encoder
from genssl.errors import ConfigError, GeneratorError
from genssl.generators.conditioner import save_encoder

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)


def images(size: int = 32, count: int = 3) -> torch.Tensor:
    return torch.rand((count, 3, size, size), generator=torch.Generator().manual_seed(1))


def torchvision_resnet() -> Any:
    network = torchvision.models.resnet18(weights=None)
    network.fc = nn.Identity()
    return lived_in(network)


def narrow_resnet(config: type[ResNetConfig], stem: Literal["imagenet", "small"] = "imagenet") -> Any:
    """torchvision's network (tests/backbones says so) but for its width, which makes it quick."""
    return lived_in(build_resnet(config(stem=stem, width=8)))  # type: ignore[call-arg]


def prefixed(prefix: str, network: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in network.state_dict().items()}


def assert_features(encoder: LoadedEncoder, expected: torch.Tensor, given: torch.Tensor) -> None:
    found = encoder.module.encode(given)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected.detach(), atol=1e-5, rtol=1e-5)


# ---- genssl's own ----


@pytest.fixture
def run_folder(tmp_path: Path) -> tuple[Path, nn.Module]:
    recipe = load(Recipe, ROOT / "recipes" / "simclr_sd.yaml", ["backbone.width=4"])
    network = lived_in(build_resnet(ResNet18Config(stem="small", width=4)))
    folder = tmp_path / "run"
    folder.mkdir()
    save_encoder(folder / "encoder.safetensors", network, recipe.backbone, recipe=recipe.name)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    return folder, network


def test_a_run_gives_its_backbone_its_image_size_and_where_it_came_from(run_folder):
    folder, network = run_folder
    encoder = load_encoder(str(folder), CPU)
    assert_features(encoder, network(images(8)), images(8))
    assert (encoder.name, encoder.image_size, encoder.source["kind"]) == (str(folder), 8, "run")
    assert encoder.source["backbone"] == {"name": "resnet18", "stem": "small", "width": 4, "stages": 4}
    assert len(encoder.source["digest"]) == 32
    assert not encoder.module.training
    assert not any(parameter.requires_grad for parameter in encoder.module.parameters())


def test_a_file_of_genssl_says_itself_what_it_is(run_folder):
    folder, network = run_folder
    encoder = load_encoder(str(folder / "encoder.safetensors"), CPU)
    assert_features(encoder, network(images(8)), images(8))
    assert (encoder.source["kind"], encoder.image_size) == ("genssl", None)
    with pytest.raises(EncoderError, match=r"says itself what its backbone is; leave the backbone out"):
        load_encoder(str(folder), CPU, backbone=ResNet18Config())


def test_a_run_that_is_not_finished(run_folder, tmp_path):
    folder, _ = run_folder
    (folder / "encoder.safetensors").unlink()
    with pytest.raises(EncoderError, match=r"has no encoder.safetensors yet, .* genssl run --resume "):
        load_encoder(str(folder), CPU)
    with pytest.raises(EncoderError, match=r"holds no encoder.safetensors; give a run directory, "):
        load_encoder(str(tmp_path), CPU)


# ---- Libraries ----


def test_an_untrained_network_of_torchvision_is_the_same_each_time():
    state = torch.random.get_rng_state()
    one, other = (load_encoder("torchvision/resnet18", CPU) for _ in range(2))
    assert torch.equal(one.module.encode(images()), other.module.encode(images()))
    assert torch.equal(torch.random.get_rng_state(), state), "the global stream is left alone"
    assert one.source["weights"] is None


@pytest.mark.parametrize(("name", "width"), [("mobilenet_v3_small", 1024), ("squeezenet1_1", 512)])
def test_the_classifier_of_other_networks_is_taken_off(name, width):
    assert load_encoder(f"torchvision/{name}", CPU).module.encode(images(64, 2)).shape == (2, width)


def test_weights_of_torchvision_come_from_torch_hubs_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    reference: Any = lived_in(torchvision.models.resnet18(weights=None))
    with pytest.raises(
        EncoderError, match=r"the weights are not in .*resnet18-f37072fd.pth; put https://.* --download"
    ):
        load_encoder("torchvision/resnet18:IMAGENET1K_V1", CPU)
    (tmp_path / "checkpoints").mkdir()
    torch.save(reference.state_dict(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    encoder = load_encoder("torchvision/resnet18:DEFAULT", CPU)
    reference.fc = nn.Identity()
    mean, std = IMAGENET
    assert_features(encoder, reference((images() - mean) / std), images())
    assert (encoder.image_size, encoder.source["weights"]) == (224, "IMAGENET1K_V1")


def test_weights_that_cannot_be_fetched_are_one_sentence(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("there is no network here")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(
        EncoderError, match=r"resnet18:DEFAULT: the weights could not be fetched \(.*no network here"
    ) as caught:
        load_encoder("torchvision/resnet18:DEFAULT", CPU, download=True)
    assert "\n" not in str(caught.value)


def test_models_and_weights_that_there_are_not():
    with pytest.raises(EncoderError, match=r"has no such classifier; did you mean torchvision/resnet18"):
        load_encoder("torchvision/resnet19", CPU)
    with pytest.raises(EncoderError, match=r"there are no such weights; did you mean 'IMAGENET1K_V1'"):
        load_encoder("torchvision/resnet18:IMAGENET1K", CPU)
    with pytest.raises(EncoderError, match=r"timm's weights are fetched by --download alone"):
        load_encoder("timm/resnet18:pretrained", CPU)


def test_timm_with_a_file_of_weights(tmp_path):
    timm = pytest.importorskip("timm")
    reference = lived_in(timm.create_model("resnet10t", num_classes=3))
    save_file(reference.state_dict(), tmp_path / "w.safetensors")
    encoder = load_encoder(f"timm/resnet10t:{tmp_path / 'w.safetensors'}", CPU)
    reference.reset_classifier(0)
    mean, std = (torch.tensor(reference.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert_features(encoder, reference((images(64) - mean) / std), images(64))
    assert encoder.source["digest"]


# ---- Checkpoints of other frameworks ----


@pytest.mark.parametrize("word", ["backbone", "encoder"])
def test_solo_learn_on_cifar_pads_its_stem_by_two_and_uses_cifars_statistics(tmp_path, word):
    network = narrow_resnet(ResNet18Config, "small")
    network.conv1.padding = (2, 2)
    state = prefixed(f"{word}.", network) | prefixed(f"momentum_{word}.", narrow_resnet(ResNet18Config, "small"))
    state |= {"classifier.weight": torch.zeros(100, 64), "classifier.bias": torch.zeros(100)}
    path = tmp_path / "byol-cifar100-ep=999.ckpt"
    torch.save({"state_dict": state, "epoch": 999, "pytorch-lightning_version": "2.1.2"}, path)
    encoder = load_encoder(str(path), CPU)
    mean, std = torch.tensor([0.5071, 0.4865, 0.4409]), torch.tensor([0.2673, 0.2564, 0.2762])
    assert_features(encoder, network((images() - mean.view(3, 1, 1)) / std.view(3, 1, 1)), images())
    assert encoder.source["backbone"] == {"name": "resnet18", "stem": "small", "width": 8, "stages": 4}
    assert encoder.source["prefix"] == f"state_dict.{word}."
    assert "padded by 2" in encoder.source["stem"]
    plain = load_encoder(str(path), CPU, backbone=ResNet18Config(stem="small", width=8), normalize="none")
    network.conv1.padding = (1, 1)
    assert_features(plain, network(images()), images())


def test_solo_learn_on_imagenet(tmp_path):
    network = narrow_resnet(ResNet50Config)
    state = prefixed("backbone.", network) | {"classifier.weight": torch.zeros(100, 256)}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    encoder = load_encoder(str(tmp_path / "x.ckpt"), CPU)
    mean, std = IMAGENET
    assert_features(encoder, network((images(64, 2) - mean) / std), images(64, 2))
    assert encoder.source["backbone"] == {"name": "resnet50", "stem": "imagenet", "width": 8, "stages": 4}


def test_lightly_with_the_children_of_torchvisions_resnet(tmp_path):
    network = torchvision_resnet()
    backbone = nn.Sequential(*list(network.children())[:-1], nn.AdaptiveAvgPool2d(1)).eval()
    state = prefixed("backbone.", backbone) | prefixed("backbone_momentum.", backbone)
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    encoder = load_encoder(str(tmp_path / "x.ckpt"), CPU)
    mean, std = IMAGENET
    assert_features(encoder, backbone((images() - mean) / std).flatten(1), images())
    assert encoder.source["backbone"] == {"name": "resnet18", "stem": "imagenet", "width": 64, "stages": 4}


class LightlyBlock(nn.Module):
    """A block of lightly's ResNet for small images: its shortcut has another name, its ReLUs are functions."""

    def __init__(self, before: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def lightly_backbone(width: int) -> nn.Sequential:
    stages = [
        nn.Sequential(LightlyBlock(before, planes, stride), LightlyBlock(planes, planes, 1))
        for before, planes, stride in [(1, 1, 1), (1, 2, 2), (2, 4, 2), (4, 8, 2)]
        for before, planes in [(before * width, planes * width)]
    ]
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), *stages, nn.AdaptiveAvgPool2d(1)
    )


def test_lightly_with_the_children_of_its_own_resnet_has_no_relu_in_the_stem(tmp_path):
    backbone = lived_in(lightly_backbone(8))
    torch.save({"state_dict": prefixed("backbone.", backbone)}, tmp_path / "x.ckpt")
    encoder = load_encoder(str(tmp_path / "x.ckpt"), CPU, normalize="none")
    assert_features(encoder, backbone(images()).flatten(1), images())
    assert encoder.source["backbone"] == {"name": "resnet18", "stem": "small", "width": 8, "stages": 4}


def test_split_batch_norms_are_averaged(tmp_path):
    backbone = lived_in(lightly_backbone(4))
    state = prefixed("backbone.", backbone)
    for name in list(state):
        if name.endswith(("running_mean", "running_var")):  # 8 splits whose mean is the value
            off = torch.linspace(-0.3, 0.3, 8)[:, None]
            state[name] = (state[name] + off).flatten()
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    encoder = load_encoder(str(tmp_path / "x.ckpt"), CPU, normalize="none")
    assert_features(encoder, backbone(images()).flatten(1), images())


@pytest.mark.parametrize("name", ["moco.pth.tar", "moco.torch"])
def test_official_moco_keeps_the_query_network(tmp_path, name):
    query, key = narrow_resnet(ResNet34Config), narrow_resnet(ResNet34Config)
    state = prefixed("module.encoder_q.", query) | prefixed("module.encoder_k.", key)
    state |= {"module.encoder_q.fc.0.weight": torch.zeros(4, 64), "module.queue": torch.zeros(4, 8)}
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state}, tmp_path / name)
    encoder = load_encoder(str(tmp_path / name), CPU, normalize="none")
    assert_features(encoder, query(images()), images())


@pytest.mark.parametrize("config", [ResNet10Config, ResNet18Config, ResNet34Config, ResNet50Config])
def test_a_resnet_of_fewer_stages(tmp_path, config):
    network = lived_in(build_resnet(config(stem="small", width=8, stages=2)))
    torch.save({"method": prefixed("backbone.", network)}, tmp_path / "checkpoint.pt")
    encoder = load_encoder(str(tmp_path / "checkpoint.pt"), CPU, normalize="none")
    assert_features(encoder, network(images()), images())


def test_a_vit_in_a_nested_checkpoint(tmp_path):
    network = build_vit(ViTTinyConfig(image_size=32, patch_size=8, depth=2)).eval()
    student = prefixed("module.backbone.", network)
    torch.save({"student": student, "teacher": {"backbone.cls_token": torch.zeros(1)}}, tmp_path / "dino.pth")
    encoder = load_encoder(str(tmp_path / "dino.pth"), CPU, normalize="none")
    assert_features(encoder, network(images()), images())
    assert encoder.image_size == 32


def test_a_safetensors_file_of_others(tmp_path):
    network = narrow_resnet(ResNet18Config)
    save_file(network.state_dict(), tmp_path / "x.safetensors")
    assert_features(load_encoder(str(tmp_path / "x.safetensors"), CPU, normalize="none"), network(images()), images())


# ---- What is refused ----


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_with_code_in_it_is_not_opened(tmp_path):
    state = narrow_resnet(ResNet18Config).state_dict()
    torch.save({"state_dict": state, "hyper_parameters": RunsCode(tmp_path / "made")}, tmp_path / "x.ckpt")
    with pytest.raises(
        EncoderError, match=r"x.ckpt: holds a Python object \(posix.mkdir\), which could run code"
    ) as caught:
        load_encoder(str(tmp_path / "x.ckpt"), CPU)
    assert "\n" not in str(caught.value)
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"state_dict": RunsCode(tmp_path / "made")}))
    with pytest.raises(EncoderError, match=r"old.pth: "):
        load_encoder(str(tmp_path / "old.pth"), CPU)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 broken"])
def test_a_damaged_checkpoint(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(
        EncoderError, match=r"x.pth: is damaged, or not a file that torch.save wrote \(\w+\); get it again"
    ):
        load_encoder(str(tmp_path / "x.pth"), CPU)


def test_a_damaged_safetensors_file(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"broken")
    with pytest.raises((EncoderError, GeneratorError), match=r"x.safetensors: cannot be read as safetensors"):
        load_encoder(str(tmp_path / "x.safetensors"), CPU)


def test_another_architecture(tmp_path):
    wide = torchvision.models.ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=16)  # narrower inside than ResNet-50
    torch.save(wide.state_dict(), tmp_path / "wide.pth")
    with pytest.raises(
        EncoderError, match=r"is not a resnet50 of the backbone's settings: layer1.0.conv1.weight is 16x64"
    ):
        load_encoder(str(tmp_path / "wide.pth"), CPU)
    deep = {f"layer{stage}.{block}.conv1.weight": torch.zeros(1) for stage in (1, 2, 3, 4) for block in range(3)}
    torch.save(deep | {"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "deep.pth")
    with pytest.raises(
        EncoderError, match=r"is a ResNet of basic blocks \[3, 3, 3, 3\] with a stem of 64x3x7x7, which is"
    ):
        load_encoder(str(tmp_path / "deep.pth"), CPU)
    gap = {name: value for name, value in narrow_resnet(ResNet18Config).state_dict().items() if "layer3" not in name}
    torch.save(gap, tmp_path / "gap.pth")
    with pytest.raises(EncoderError, match=r"is a ResNet of basic blocks \[2, 2, 0\] with"):
        load_encoder(str(tmp_path / "gap.pth"), CPU)
    torch.save(torchvision.models.mobilenet_v3_small(weights=None).state_dict(), tmp_path / "mobile.pth")
    with pytest.raises(EncoderError, match=r"no ResNet and no ViT is among its 244 tensors"):
        load_encoder(str(tmp_path / "mobile.pth"), CPU)


def test_a_backbone_that_is_not_the_files(tmp_path):
    torch.save(narrow_resnet(ResNet18Config).state_dict(), tmp_path / "x.pth")
    with pytest.raises(
        EncoderError, match=r"x.pth: is not a resnet50: layer1.0.conv3.weight is not among its 120 tensors"
    ):
        load_encoder(str(tmp_path / "x.pth"), CPU, backbone=ResNet50Config())
    with pytest.raises(EncoderError, match=r"conv1.weight is 8x3x7x7 and not 64x3x3x3"):
        load_encoder(str(tmp_path / "x.pth"), CPU, backbone=ResNet18Config(stem="small"))


def test_two_networks_in_a_file(tmp_path):
    network = narrow_resnet(ResNet18Config)
    torch.save(prefixed("a.", network) | prefixed("b.", network), tmp_path / "x.pth")
    with pytest.raises(
        EncoderError, match=r"holds 2 networks, a., b.; choose one, such as '{encoder: .*x.pth, prefix: a}"
    ):
        load_encoder(str(tmp_path / "x.pth"), CPU)


def test_what_is_no_encoder_at_all(tmp_path):
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(EncoderError, match=r"x.txt: is not an encoder; give a run directory"):
        load_encoder(str(tmp_path / "x.txt"), CPU)
    with pytest.raises(EncoderError, match=r"nowhere: there is no such file or folder; give a run directory"):
        load_encoder("nowhere", CPU)
    with pytest.raises(ConfigError, match=r"needs timm|has no model"):
        load_encoder("timm/resnet18x", CPU)
