"""The generator network of IC-GAN (Casanova et al. 2021, arXiv 2109.05070) with a BigGAN backbone (arXiv 1809.11096).

One module for every size: the official 64, 128 and 256 px models, half capacity and class-conditional ones included,
and the small ones that `genssl train-generator` makes. Written from the architecture; no official code is in it.
Layers are plain: spectral norm is folded into the weights when a checkpoint is converted (`icgan.official`), and our
own training has none in the generator.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

NORM_EPS = 1e-5


@dataclass(frozen=True)
class Architecture:
    """Everything that fixes the shapes of the network.

    Attributes:
        feature_dim: width of the instance feature.
        feature_width: width of the feature's embedding, which every block sees.
        noise_chunk: columns of the noise that go to the first layer and to each block (BigGAN's hierarchical latents).
        bottom: side in pixels of the first feature map; each block doubles it.
        channels: of the first feature map, and after each block.
        attention: numbers of the blocks that self-attention follows.
        classes: of a class-conditional model; 0 otherwise.
        class_width: width of the class embedding; 0 without classes.
    """

    feature_dim: int
    feature_width: int
    noise_chunk: int
    bottom: int
    channels: tuple[int, ...]
    attention: tuple[int, ...] = ()
    classes: int = 0
    class_width: int = 0

    @property
    def blocks(self) -> int:
        """Number of residual blocks."""
        return len(self.channels) - 1

    @property
    def resolution(self) -> int:
        """Side of the image in pixels."""
        return int(self.bottom * 2**self.blocks)

    @property
    def noise_dim(self) -> int:
        """Columns of the noise."""
        return self.noise_chunk * (self.blocks + 1)

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` takes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Architecture:
        """Returns the architecture of a config file's mapping; ValueError for unknown keys or impossible values."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(content) - set(fields)):
            raise ValueError(f"unknown keys {', '.join(unknown)}")
        missing = [n for n, field in fields.items() if field.default is dataclasses.MISSING and n not in content]
        if missing:
            raise ValueError(f"no {', '.join(missing)}")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
        }
        made = cls(**values)
        sizes = [made.feature_dim, made.feature_width, made.noise_chunk, made.bottom, *made.channels]
        if len(made.channels) < 2 or not all(isinstance(size, int) and 0 < size <= 2**16 for size in sizes):
            raise ValueError("sizes must be whole numbers above 0, and channels at least two of them")
        if made.resolution > 2048 or any(not 0 <= block < made.blocks for block in made.attention):
            raise ValueError("blocks make more than 2048 px, or attention names a block that is not there")
        if (made.classes > 0) != (made.class_width > 0) or made.classes < 0 or made.classes > 2**20:
            raise ValueError("classes and class_width are both above 0 or both 0")
        return made


class ConditionalNorm(nn.Module):
    """Batch norm whose gain (1 + ...) and bias are linear in the condition; without biases of their own."""

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=NORM_EPS, affine=False)
        self.gain = nn.Linear(condition, channels, bias=False)
        self.bias = nn.Linear(condition, channels, bias=False)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Returns x [B, C, h, w], normalised, scaled and shifted by its row of condition [B, D]."""
        normalised: torch.Tensor = self.norm(x)
        gain: torch.Tensor = 1 + self.gain(condition)
        bias: torch.Tensor = self.bias(condition)
        return normalised * gain[:, :, None, None] + bias[:, :, None, None]


class Block(nn.Module):
    """BigGAN's residual block: doubles the side (nearest), maps channels."""

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.norm1 = ConditionalNorm(inputs, condition)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = ConditionalNorm(outputs, condition)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Maps x [B, C, h, w] to [B, C', 2h, 2w]."""
        h = F.interpolate(F.relu(self.norm1(x, condition)), scale_factor=2)
        h = self.conv2(F.relu(self.norm2(self.conv1(h), condition)))
        out: torch.Tensor = h + self.shortcut(F.interpolate(x, scale_factor=2))
        return out


class Attention(nn.Module):
    """Self-attention over positions (SAGAN, arXiv 1805.08318), keys and values max-pooled 2x2, no softmax scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.key = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.value = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.out = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps x [B, C, h, w] to the same shape; h and w are even."""
        query, key, value = (
            part.flatten(2).transpose(1, 2)
            for part in (self.query(x), F.max_pool2d(self.key(x), 2), F.max_pool2d(self.value(x), 2))
        )
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        out: torch.Tensor = self.out(attended.transpose(1, 2).reshape(len(x), -1, *x.shape[2:]))
        return x + self.gamma * out


class GeneratorNetwork(nn.Module):
    """Maps noise and an instance feature to an image.

    In evaluation mode batch norm uses stored statistics, so that a row does not depend on its batch.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        channels = architecture.channels
        condition = architecture.class_width + architecture.feature_width + architecture.noise_chunk
        if architecture.classes:
            self.embed_class = nn.Embedding(architecture.classes, architecture.class_width)
        self.embed_feature = nn.Linear(architecture.feature_dim, architecture.feature_width)
        self.first = nn.Linear(architecture.noise_chunk, channels[0] * architecture.bottom**2)
        self.blocks = nn.ModuleList(Block(inputs, outputs, condition) for inputs, outputs in pairwise(channels))
        self.attentions = nn.ModuleDict(
            {str(block): Attention(channels[block + 1]) for block in sorted(architecture.attention)}
        )
        self.norm = nn.BatchNorm2d(channels[-1], eps=NORM_EPS)
        self.to_rgb = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, noise: torch.Tensor, features: torch.Tensor, classes: torch.Tensor | None = None) -> torch.Tensor:
        """Makes images [B, 3, resolution, resolution] in [-1, 1] of noise [B, noise_dim] and features [B, feature_dim].

        Features have the length that the network was trained with; a class-conditional model takes classes int64 [B].
        """
        architecture = self.architecture
        condition = self.embed_feature(features)
        if architecture.classes:
            condition = torch.cat([self.embed_class(classes), condition], dim=1)
        first, *chunks = torch.split(noise, architecture.noise_chunk, dim=1)
        x = self.first(first).unflatten(1, (-1, architecture.bottom, architecture.bottom))
        for number, (block, chunk) in enumerate(zip(self.blocks, chunks, strict=True)):
            x = block(x, torch.cat([condition, chunk], dim=1))
            if str(number) in self.attentions:
                x = self.attentions[str(number)](x)
        return torch.tanh(self.to_rgb(F.relu(self.norm(x))))
