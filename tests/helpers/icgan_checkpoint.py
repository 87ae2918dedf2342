"""Checkpoints in the key layout of official IC-GAN models, with random tensors, and a straight-line forward over them.

Both are written from shared/facts (key names, shapes, order of operations), not from genssl's module.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F

MULTIPLES = {256: (16, 16, 8, 8, 4, 2, 1), 128: (16, 16, 8, 4, 2, 1), 64: (16, 16, 8, 4, 2)}
ATTENTION = {256: 64, 128: 64, 64: 32}
CHUNKS = {256: 17, 128: 20, 64: 24}
Make = Callable[..., torch.Tensor]


def official_state(
    resolution: int, ch: int, make: Make, *, classes: bool = False, features: int = 2048, width: int = 512
) -> dict[str, torch.Tensor]:
    """Returns tensors by official name; `make(*shape)` makes each."""
    channels, chunk = [ch * m for m in MULTIPLES[resolution]], CHUNKS[resolution]
    condition = chunk + width + (128 if classes else 0)
    state = {"shared.weight": make(1000, 128)}

    def spectral(name: str, *shape: int, bias: bool) -> None:
        state[f"{name}.weight"], state[f"{name}.u0"], state[f"{name}.sv0"] = make(*shape), make(1, shape[0]), make(1)
        if bias:
            state[f"{name}.bias"] = make(shape[0])

    def norm(name: str, count: int) -> None:
        state[f"{name}.stored_mean"], state[f"{name}.stored_var"] = make(count), make(count).abs() + 0.5

    spectral("shared_feat", width, features, bias=True)
    spectral("linear", channels[0] * 16, chunk, bias=True)
    for number, (inputs, outputs) in enumerate(pairwise(channels)):
        block = f"blocks.{number}.0"
        spectral(f"{block}.conv1", outputs, inputs, 3, 3, bias=True)
        spectral(f"{block}.conv2", outputs, outputs, 3, 3, bias=True)
        spectral(f"{block}.conv_sc", outputs, inputs, 1, 1, bias=True)
        for bn, count in (("bn1", inputs), ("bn2", outputs)):
            norm(f"{block}.{bn}", count)
            spectral(f"{block}.{bn}.gain", count, condition, bias=False)
            spectral(f"{block}.{bn}.bias", count, condition, bias=False)
        if 8 * 2**number == ATTENTION[resolution]:
            state[f"blocks.{number}.1.gamma"] = make(1)[0]
            for part, rows, columns in (
                ("theta", outputs // 8, outputs),
                ("phi", outputs // 8, outputs),
                ("g", outputs // 2, outputs),
                ("o", outputs, outputs // 2),
            ):
                spectral(f"blocks.{number}.1.{part}", rows, columns, 1, 1, bias=False)
    norm("output_layer.0", channels[-1])
    state["output_layer.0.gain"], state["output_layer.0.bias"] = make(channels[-1]), make(channels[-1])
    spectral("output_layer.2", 3, channels[-1], 3, 3, bias=True)
    return state


def shapes_only(*shape: int) -> torch.Tensor:
    """A tensor of any shape that takes no memory."""
    return torch.zeros(1).expand(shape)


def random_tensors(seed: int) -> Make:
    stream = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=stream)


def reference_forward(
    state: dict[str, torch.Tensor], noise: torch.Tensor, features: torch.Tensor, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns images float [B, 3, S, S] in [-1, 1]; spectral norm by one power iteration at every use."""

    def weight(name: str) -> torch.Tensor:
        w = state[f"{name}.weight"]
        matrix = w.reshape(w.shape[0], -1)
        v = state[f"{name}.u0"] @ matrix
        v = v / v.norm().clamp(min=1e-6)
        u = v @ matrix.t()
        u = u / u.norm().clamp(min=1e-6)
        return w / (v @ matrix.t() @ u.t()).item()

    def normalised(name: str, x: torch.Tensor) -> torch.Tensor:
        mean, var = (state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("stored_mean", "stored_var"))
        return (x - mean) / (var + 1e-5).sqrt()

    def conv(name: str, x: torch.Tensor) -> torch.Tensor:
        w = weight(name)
        return F.conv2d(x, w, state.get(f"{name}.bias"), padding=w.shape[-1] // 2)

    def conditional(name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        gain, bias = (y @ weight(f"{name}.{part}").t() for part in ("gain", "bias"))
        return torch.relu(normalised(name, x) * (1 + gain)[:, :, None, None] + bias[:, :, None, None])

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    y = features @ weight("shared_feat").t() + state["shared_feat.bias"]
    if labels is not None:
        y = torch.cat([state["shared.weight"][labels], y], dim=1)
    chunk = state["linear.weight"].shape[1]
    h = noise[:, :chunk] @ weight("linear").t() + state["linear.bias"]
    h = h.reshape(len(noise), -1, 4, 4)
    number = 0
    while f"blocks.{number}.0.conv1.weight" in state:
        block = f"blocks.{number}.0"
        condition = torch.cat([y, noise[:, (number + 1) * chunk : (number + 2) * chunk]], dim=1)
        inside = conv(f"{block}.conv1", doubled(conditional(f"{block}.bn1", h, condition)))
        inside = conv(f"{block}.conv2", conditional(f"{block}.bn2", inside, condition))
        h = inside + conv(f"{block}.conv_sc", doubled(h))
        attention = f"blocks.{number}.1"
        if f"{attention}.gamma" in state:
            theta = conv(f"{attention}.theta", h).flatten(2)
            phi = F.max_pool2d(conv(f"{attention}.phi", h), 2).flatten(2)
            g = F.max_pool2d(conv(f"{attention}.g", h), 2).flatten(2)
            beta = torch.einsum("bcn,bcm->bnm", theta, phi).softmax(dim=2)
            attended = torch.einsum("bcm,bnm->bcn", g, beta).reshape(len(h), -1, *h.shape[2:])
            h = h + state[f"{attention}.gamma"] * conv(f"{attention}.o", attended)
        number += 1
    gain, bias = (state[f"output_layer.0.{part}"].view(1, -1, 1, 1) for part in ("gain", "bias"))
    return torch.tanh(conv("output_layer.2", torch.relu(normalised("output_layer.0", h) * gain + bias)))
