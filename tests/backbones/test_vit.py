"""Vision transformers: timm's network where timm is installed; sizes that do not fit are told in words."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from genssl.backbones.configs import ViTSmallConfig, ViTTinyConfig
from genssl.backbones.vit import ViT, build_vit
from genssl.errors import ConfigError


def tiny(**settings) -> ViT:
    return build_vit(ViTTinyConfig(image_size=8, patch_size=2, depth=2, **settings)).eval()


@pytest.mark.parametrize(
    ("config", "channels", "millions"), [(ViTTinyConfig(), 192, 5.5), (ViTSmallConfig(), 384, 21.7)]
)
def test_the_standard_sizes_have_the_papers_parameters(config, channels, millions):
    network = build_vit(config)
    assert network.feature_dim == channels
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)  # DeiT, table 1, without the classifier's 0.2 to 0.4


@pytest.mark.parametrize(("config", "name"), [(ViTTinyConfig(), "vit_tiny"), (ViTSmallConfig(), "vit_small")])
def test_the_network_is_timms(config, name):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(f"{name}_patch16_224", num_classes=0).eval()
    ours = build_vit(config).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_attention_sees_every_patch_and_its_position():
    network, generator = tiny(), torch.Generator().manual_seed(0)
    images = torch.rand((1, 3, 8, 8), generator=generator)
    before = network(images)
    assert before.shape == (1, 192)
    changed = images.clone()
    changed[..., 6:, 6:] = 0
    assert not torch.allclose(network(changed), before)
    swapped = torch.cat([images[..., 4:, :], images[..., :4, :]], dim=-2)
    assert not torch.allclose(network(swapped), before)


def test_a_rows_features_do_not_depend_on_its_batch():
    network, images = tiny(), torch.rand((5, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(images)[3:4], network(images[3:4]))


def test_views_of_another_size_are_refused_unless_positions_are_interpolated():
    with pytest.raises(ConfigError, match=r"^backbone.image_size is 8 but the views are 4 x 4 pixels; set it to their"):
        tiny()(torch.rand(1, 3, 4, 4))
    network = tiny(interpolate_positions=True)
    assert network(torch.rand(2, 3, 4, 6)).shape == (2, 192)
    with pytest.raises(ConfigError, match=r"^backbone.patch_size is 2, which does not divide views of 5 x 5 pixels"):
        network(torch.rand(1, 3, 5, 5))


def test_interpolated_positions_are_those_of_the_grid_at_its_own_size():
    network = tiny(interpolate_positions=True)
    assert torch.equal(network._positions(4, 4), network.pos_embed)
    with torch.no_grad():
        network.pos_embed[:, 1:] = 3.0
    assert torch.allclose(network._positions(2, 3)[:, 1:], torch.tensor(3.0))
    assert network._positions(2, 3).shape == (1, 7, 192)


def test_a_patch_must_divide_the_image():
    with pytest.raises(ValidationError, match="image_size is 28, which patches of 16 pixels do not divide"):
        ViTTinyConfig(image_size=28)


def test_every_parameter_of_the_backbone_gets_a_gradient():
    network = tiny()
    network(torch.rand(3, 3, 8, 8)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())
