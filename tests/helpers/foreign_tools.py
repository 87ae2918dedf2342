"""Networks with random weights, of which none is a default value, and checkpoints in the layouts of other tools."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genssl.encoders.load import LoadedEncoder, load_encoder

CPU = torch.device("cpu")


def shaken(network: Any, keep: str = "nothing", seed: int = 4) -> Any:
    """Draws every weight and statistic anew; zeros and ones of an initialisation would hide one that is lost.

    Args:
        network: changed in place, and put into evaluation mode.
        keep: the end of the names that stay as they are.
        seed: of the draws.
    """
    draws = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if name.endswith(("num_batches_tracked", keep)) or not value.is_floating_point():
            continue
        drawn = torch.randn(value.shape, generator=draws)
        if name.endswith("running_var"):
            drawn = 0.5 + drawn.abs()
        elif value.ndim == 1 and name.endswith("weight"):
            drawn = 1 + 0.2 * drawn
        elif name.endswith(("bias", "running_mean")):
            drawn = 0.2 * drawn
        elif value.ndim in (2, 4):
            drawn = drawn / value[0].numel() ** 0.5
        value.copy_(drawn)
    return network.eval()


def images(size: int, count: int = 2) -> torch.Tensor:
    return torch.rand((count, 3, size, size), generator=torch.Generator().manual_seed(1))


def state(prefix: str, network: nn.Module) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((f"{prefix}{name}", value.clone()) for name, value in network.state_dict().items())


def namespace() -> argparse.Namespace:
    """What timm, DINO and MAE keep beside the weights."""
    return argparse.Namespace(arch="vit_small", lr=5e-4, mean=None, local_crops_scale=(0.05, 0.4), resume="")


def loaded(path: Path, content: Any, spec: str = "", **settings: Any) -> LoadedEncoder:
    """Writes a checkpoint and loads the encoder in it."""
    torch.save(content, path)
    settings.setdefault("normalize", "none")
    return load_encoder(spec or str(path), CPU, **settings)


def assert_equal_features(encoder: LoadedEncoder, expected: torch.Tensor, given: torch.Tensor) -> None:
    with torch.no_grad():
        found = encoder.module.encode(given)
    assert found.shape == expected.shape
    assert found.std(dim=0).mean() > 1e-3, "features tell images apart"
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)
