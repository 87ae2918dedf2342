"""ResNet (He et al. 2016, arXiv 1512.03385) from torchvision's blocks, with a choice of stem and width.

At width 64 with the ImageNet stem the state dict is torchvision's, without `fc`.
"""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from genssl.backbones.configs import ResNetConfig

LAYERS: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


class ResNet(nn.Module):
    """Maps images float [B, 3, H, W] to features float [B, feature_dim] (global average of the last stage)."""

    def __init__(
        self, block: type[BasicBlock | Bottleneck], layers: tuple[int, ...], width: int, small_stem: bool
    ) -> None:
        super().__init__()
        self._block = block
        self._channels = width
        if small_stem:
            self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self._stages = len(layers)
        for place, count in enumerate(layers):
            self.add_module(f"layer{place + 1}", self._stage(2**place * width, count, stride=1 if place == 0 else 2))
        self.feature_dim = self._channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, planes: int, count: int, stride: int) -> nn.Sequential:
        expansion = self._block.expansion
        downsample = None
        if stride != 1 or self._channels != planes * expansion:
            downsample = nn.Sequential(
                nn.Conv2d(self._channels, planes * expansion, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(planes * expansion),
            )
        blocks: list[nn.Module] = [self._block(self._channels, planes, stride, downsample)]
        self._channels = planes * expansion
        blocks += [self._block(self._channels, planes) for _ in range(count - 1)]
        return nn.Sequential(*blocks)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features float [B, feature_dim]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for place in range(self._stages):
            x = self.get_submodule(f"layer{place + 1}")(x)
        features: torch.Tensor = x.mean(dim=(2, 3))
        return features


def build_resnet(config: ResNetConfig) -> ResNet:
    """Returns the network that the config names; its weights come from torch's current random stream."""
    block, layers = LAYERS[config.name]
    return ResNet(block, layers[: config.stages], config.width, config.stem == "small")
