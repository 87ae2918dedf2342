"""Vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) in the sizes of DeiT (arXiv 2012.12877).

The state dict is timm's for `vit_tiny_patch16_224` to `vit_large_patch16_224`, and DINO's, without `head`; with
register tokens it is that of timm's `no_embed_class`, where positions belong to patches alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from genssl.backbones.configs import ViTConfig
from genssl.errors import ConfigError

# Shapes: B images, N tokens, C channels, H heads.
HEAD_CHANNELS = 64  # of a standard head


class PatchEmbedding(nn.Module):
    """Maps images [B, 3, S, S] to patch embeddings [B, C, S / patch, S / patch]."""

    def __init__(self, channels: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the embeddings."""
        embeddings: torch.Tensor = self.proj(images)
        return embeddings


class Attention(nn.Module):
    """Multi-head self-attention over [B, N, C]."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x_BNC: torch.Tensor) -> torch.Tensor:
        """Returns [B, N, C]."""
        qkv = self.qkv(x_BNC).reshape(*x_BNC.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv.unbind(0))  # [B, H, N, C / H]
        projected: torch.Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return projected


class MLP(nn.Module):
    """Two layers, four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns a tensor of the same shape."""
        y: torch.Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class LayerScale(nn.Module):
    """A learnt factor for each channel."""

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns a tensor of the same shape."""
        return x * self.gamma


class Block(nn.Module):
    """Attention and MLP, each after a layer norm and with a residual, which LayerScale may scale."""

    def __init__(self, channels: int, heads: int, layer_scale: float | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = Attention(channels, heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(channels, layer_scale)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = MLP(channels)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(channels, layer_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [B, N, C]."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """Maps images float [B, 3, S, S] to features float [B, feature_dim] (the class token after the last norm)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        channels = config.channels
        self.config = config
        self.feature_dim = channels
        self.grid = config.image_size // config.patch_size
        self.patch_embed = PatchEmbedding(channels, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.placed = 0 if config.registers else 1  # tokens before the patches that have a position of their own
        self.pos_embed = nn.Parameter(torch.zeros(1, self.placed + self.grid**2, channels))
        if config.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, config.registers, channels))
            nn.init.trunc_normal_(self.reg_token, std=0.02)
        heads = config.heads or channels // HEAD_CHANNELS
        self.blocks = nn.ModuleList(Block(channels, heads, config.layer_scale) for _ in range(config.depth))
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features float [B, feature_dim].

        Raises:
            ConfigError: if the images have a size that the network was not built for.
        """
        self._check(*images.shape[-2:])
        patches = self.patch_embed(images)
        first, x = self.cls_token.expand(images.shape[0], -1, -1), patches.flatten(2).transpose(1, 2)
        if self.config.registers:
            x = x + self._positions(*patches.shape[-2:])
            x = torch.cat([first, self.reg_token.expand(images.shape[0], -1, -1), x], dim=1)
        else:
            x = torch.cat([first, x], dim=1) + self._positions(*patches.shape[-2:])
        for block in self.blocks:
            x = block(x)
        features: torch.Tensor = self.norm(x[:, 0])  # the norm is per token: the others are not needed
        return features

    def _check(self, height: int, width: int) -> None:
        size, patch = self.config.image_size, self.config.patch_size
        if (height, width) != (size, size) and not self.config.interpolate_positions:
            raise ConfigError(
                [
                    f"backbone.image_size is {size} but the views are {height} x {width} pixels; set it to their size, "
                    "or for views of several sizes (multi-crop) set backbone.interpolate_positions: true"
                ]
            )
        if height % patch or width % patch:
            raise ConfigError(
                [f"backbone.patch_size is {patch}, which does not divide views of {height} x {width} pixels"]
            )

    def _positions(self, rows: int, columns: int) -> torch.Tensor:
        if (rows, columns) == (self.grid, self.grid):
            return self.pos_embed
        grid = self.pos_embed[:, self.placed :].transpose(1, 2).reshape(1, -1, self.grid, self.grid)
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, : self.placed], grid.flatten(2).transpose(1, 2)], dim=1)


def build_vit(config: ViTConfig) -> ViT:
    """Returns the network that the config names; its weights come from torch's current random stream."""
    return ViT(config)
