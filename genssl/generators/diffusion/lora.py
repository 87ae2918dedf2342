"""Fuses a LoRA (Hu et al. 2021, arXiv 2106.09685) into the weights of a UNet, without peft."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from genssl.errors import GeneratorError

DOWN = re.compile(r"^(?P<layer>.+?)[._](?:lora[._])?(?:lora_down|lora_A|down)(?:\.default)?\.weight$")


def fuse_lora(unet: Any, path: Path, tensors: dict[str, torch.Tensor], scale: float) -> None:
    """Adds `scale` * alpha / rank * up @ down to the layers that a LoRA names, in place and in float32.

    Args:
        unet: whose layers are named.
        path: where the LoRA came from, for messages.
        tensors: its content: keys of kohya's layout (`lora_unet_..._to_q.lora_down.weight`, `.alpha`) or of diffusers'
            and peft's (`unet.....to_q.lora_A.weight`, `...processor.to_q_lora.down.weight`).
            Layers of text encoders are left out.
        scale: 1 for the whole LoRA.

    Raises:
        GeneratorError: if a layer is not in the UNet, its shape does not fit, or nothing is a LoRA's.
    """
    modules = {name: module for name, module in unet.named_modules() if getattr(module, "weight", None) is not None}
    flat = {name.replace(".", "_"): module for name, module in modules.items()}
    fused = 0
    for key, down in tensors.items():
        match = DOWN.match(key)
        if match is None or key.startswith(("lora_te", "text_encoder")):
            continue
        layer = match["layer"]
        name = layer.removeprefix("lora_unet_").removeprefix("unet.")
        # Old attention processors held the four projections' LoRAs: ...attn1.processor.to_q_lora.down.weight.
        name = name.replace(".processor.", ".")
        name = name if not name.endswith(".to_out") else f"{name}.0"
        module = modules.get(name) or flat.get(name.replace(".", "_"))
        up = tensors.get(_up(key))
        if module is None or up is None:
            what = "the UNet has no such layer" if module is None else f"it has no {_up(key)}"
            raise GeneratorError(f"{path}: {key}: {what}; this LoRA is of another model or layout")
        alpha = tensors.get(f"{layer}.alpha")
        factor = scale * (1.0 if alpha is None else float(alpha) / down.shape[0])
        try:
            change = _product(up.float(), down.float()).reshape(module.weight.shape)
        except RuntimeError:
            raise GeneratorError(
                f"{path}: {key}: {tuple(up.shape)} x {tuple(down.shape)} does not fit the layer's "
                f"{tuple(module.weight.shape)}; this LoRA is of another model"
            ) from None
        module.weight.data = (module.weight.data.float() + factor * change.to(module.weight.device)).to(
            module.weight.dtype
        )
        fused += 1
    if not fused:
        raise GeneratorError(
            f"{path}: holds no LoRA of a UNet that is known here (its keys begin {sorted(tensors)[:2]})"
        )


def _up(key: str) -> str:
    for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
        if f"{down}." in key:
            return key.replace(f"{down}.", f"{up}.")
    return key.replace("down.weight", "up.weight")


def _product(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Multiplies up [O, R(, 1, 1)] with down [R, I(, k, k)]; returns [O, I * k * k]."""
    return up.flatten(1) @ down.flatten(1)
