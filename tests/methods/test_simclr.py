"""SimCLR: one forward for both views, gradients everywhere, features of the backbone."""

from __future__ import annotations

import torch

from genssl.backbones.configs import ResNet18Config
from genssl.backbones.resnet import build_resnet
from genssl.methods.base import Views
from genssl.methods.configs import SimCLRConfig
from genssl.methods.simclr import SimCLR


def make() -> SimCLR:
    backbone = build_resnet(ResNet18Config(stem="small", width=4))
    return SimCLR(SimCLRConfig(projector_hidden_dim=8, projector_output_dim=4), backbone)


def test_every_parameter_gets_a_gradient():
    method = make()
    method.step(Views((torch.rand(6, 3, 8, 8), torch.rand(6, 3, 8, 8)))).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in method.parameters())


def test_both_views_share_one_batch_of_statistics():
    """A dark real view and a bright generated one must not be normalised apart, or running statistics fit neither."""
    method = make()
    dark, bright = torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 8, 8)
    seen: list[int] = []
    method.backbone.bn1.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    method.step(Views((dark, bright)))
    assert seen == [8]


def test_encode_returns_backbone_features():
    method = make().eval()
    images = torch.rand(2, 3, 8, 8)
    assert method.encode(images).shape == (2, method.feature_dim) == (2, 32)
    assert torch.equal(method.encode(images), method.backbone(images))
