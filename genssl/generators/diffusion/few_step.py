"""A few noisy steps: samplers of distilled models (LCM, TCD), and LoRAs, as which the distilled weights come.

The samplers follow diffusers' LCMScheduler and TCDScheduler step for step, but take the noise from the caller, row by
row. LoRAs (Hu et al. 2021, arXiv 2106.09685) are fused into the weights of a UNet, without peft.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, TCDScheduler

from genssl.errors import GeneratorError
from genssl.generators.diffusion.sampling import Sampler, limit, predictions
from genssl.generators.diffusion.scheduler_config import (
    LCM_FIELDS,
    TCD_FIELDS,
    Fields,
    build_scheduler,
    check_first_step,
    read_scheduler,
)

DOWN = re.compile(r"^(?P<layer>.+?)[._](?:lora[._])?(?:lora_down|lora_A|down)(?:\.default)?\.weight$")


@dataclass(frozen=True)
class ConsistencyStep:
    """One step: latents become `skip` x + `clean` x0 + `noisy` epsilon + `fresh` z.

    x0 and epsilon are what the network's output says of the latents x at alpha-bar `alpha`; z is new noise.
    """

    timestep: int
    alpha: float
    skip: float
    clean: float
    noisy: float
    fresh: float


class _Consistency(Sampler):
    """What the two samplers share: the noise schedule, the prediction type, and the arithmetic of a step."""

    def __init__(self, folder: Path, kind: type[LCMScheduler] | type[TCDScheduler], fields: Fields) -> None:
        self._scheduler = build_scheduler(kind, folder, read_scheduler(folder, fields))
        check_first_step(folder, self._scheduler)
        # A distilled model knows this many time steps, of which so many or fewer are taken.
        self.most_steps = int(self._scheduler.config["original_inference_steps"])
        self._prediction = self._scheduler.config["prediction_type"]
        self._limited = False

    def steps(self, count: int, side: int = 0) -> list[ConsistencyStep]:
        """Returns the `count` steps from noise to image, whatever the side of the latents."""
        self._scheduler.set_timesteps(count)
        timesteps: list[int] = self._scheduler.timesteps.tolist()
        return [self._step(at, after) for at, after in zip(timesteps, [*timesteps[1:], None], strict=True)]

    @abstractmethod
    def _step(self, timestep: int, following: int | None) -> ConsistencyStep: ...

    def noises(self, count: int) -> int:
        """Returns how many tensors of noise a row draws: one after each step but the last."""
        return count - 1

    def move(
        self, step: ConsistencyStep, latents: torch.Tensor, output: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Moves latents one step on, with new noise of the same shape."""
        clean, noisy = predictions(self._prediction, step.alpha, latents, output)
        if self._limited:
            clean = limit(self._scheduler, clean)
        moved: torch.Tensor = step.skip * latents + step.clean * clean + step.noisy * noisy
        return moved if noise is None else moved + step.fresh * noise


class LCM(_Consistency):
    """Multistep consistency sampling (Luo et al. 2023, arXiv 2310.04378), of a model whose folder names the noise."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, LCMScheduler, LCM_FIELDS)
        self._limited = self._scheduler.config["thresholding"] or self._scheduler.config["clip_sample"]
        self.facts = ["limited"] if self._limited else []

    def _step(self, timestep: int, following: int | None) -> ConsistencyStep:
        alphas = self._scheduler.alphas_cumprod
        skip, out = (float(factor) for factor in self._scheduler.get_scalings_for_boundary_condition_discrete(timestep))
        after = 1.0 if following is None else float(alphas[following])
        kept = after**0.5
        return ConsistencyStep(timestep, float(alphas[timestep]), kept * skip, kept * out, 0.0, (1 - after) ** 0.5)


class TCD(_Consistency):
    """Strategic stochastic sampling (Zheng et al. 2024, arXiv 2402.19159, algorithm 4).

    Of each step, the part `gamma`, 0..1, is new noise.
    """

    def __init__(self, folder: Path, gamma: float) -> None:
        super().__init__(folder, TCDScheduler, TCD_FIELDS)
        self._gamma = gamma

    def noises(self, count: int) -> int:
        """Returns how many tensors of noise a row draws: one after each step but the last, none at gamma 0."""
        return count - 1 if self._gamma > 0 else 0

    def _step(self, timestep: int, following: int | None) -> ConsistencyStep:
        alphas = self._scheduler.alphas_cumprod
        # In float32, as the stock scheduler rounds it.
        middle = float(alphas[int(torch.floor((1 - self._gamma) * torch.tensor(following or 0)))])
        scale, fresh = 1.0, 0.0
        if following is not None and self._gamma > 0:
            ratio = float(alphas[following]) / middle
            scale, fresh = ratio**0.5, (1 - ratio) ** 0.5
        clean, noisy = scale * middle**0.5, scale * (1 - middle) ** 0.5
        return ConsistencyStep(timestep, float(alphas[timestep]), 0.0, clean, noisy, fresh)


def fuse_lora(unet: Any, path: Path, tensors: dict[str, torch.Tensor], scale: float) -> None:
    """Adds `scale` * alpha / rank * up @ down to the layers of a UNet that a LoRA names, in place and in float32.

    Keys of `tensors` are kohya's (`lora_unet_..._to_q.lora_down.weight`, `.alpha`) or diffusers' and peft's
    (`unet.....to_q.lora_A.weight`, `...processor.to_q_lora.down.weight`); layers of text encoders are left out.

    Raises:
        GeneratorError: naming `path`, if a layer is not in the UNet, its shape does not fit, or nothing is a LoRA's.
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
            # up [O, R(, 1, 1)] times down [R, I(, k, k)]
            change = (up.float().flatten(1) @ down.float().flatten(1)).reshape(module.weight.shape)
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
