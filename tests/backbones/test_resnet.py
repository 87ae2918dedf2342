"""ResNets: torchvision's network at standard width, small stem and other widths beside it."""

from __future__ import annotations

import pytest
import torch
import torchvision

from genssl.backbones.configs import ResNet18Config, ResNet34Config, ResNet50Config
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
