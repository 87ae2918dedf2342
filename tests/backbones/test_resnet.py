"""ResNets: torchvision's network at standard width, small stem and other widths beside it."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torchvision.models.resnet import BasicBlock

from genssl.backbones.configs import ResNet10Config, ResNet18Config, ResNet34Config, ResNet50Config
from genssl.backbones.resnet import build_resnet


@pytest.mark.parametrize(
    ("config", "reference"),
    [(ResNet18Config(), "resnet18"), (ResNet34Config(), "resnet34"), (ResNet50Config(), "resnet50")],
)
def test_the_standard_network_is_torchvisions(config, reference):
    theirs = getattr(torchvision.models, reference)(weights=None).eval()
    ours = build_resnet(config).eval()
    weights = {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    ours.load_state_dict(weights)
    theirs.fc = torch.nn.Identity()
    images = torch.rand(2, 3, 64, 64)
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)


def test_the_small_stem_keeps_the_resolution_and_width_scales():
    network = build_resnet(ResNet18Config(stem="small", width=16)).eval()
    assert network.maxpool(network.conv1(torch.rand(1, 3, 32, 32))).shape == (1, 16, 32, 32)
    assert network.feature_dim == 128
    assert network(torch.rand(2, 3, 8, 8)).shape == (2, 128)


def test_ten_layers_are_one_block_a_stage_of_torchvisions_resnet():
    theirs = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1]).eval()
    ours = build_resnet(ResNet10Config()).eval()
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")})
    theirs.fc = torch.nn.Identity()
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize(("stages", "feature_dim"), [(1, 64), (2, 128), (3, 256)])
def test_fewer_stages_are_the_first_of_the_standard_network(stages, feature_dim):
    whole = build_resnet(ResNet18Config()).eval()
    first = build_resnet(ResNet18Config(stages=stages)).eval()
    first.load_state_dict({name: value for name, value in whole.state_dict().items() if name in first.state_dict()})
    for left_out in range(stages, 4):
        setattr(whole, f"layer{left_out + 1}", torch.nn.Identity())
    images = torch.rand(2, 3, 32, 32)
    assert first.feature_dim == feature_dim
    assert torch.equal(first(images), whole(images))
