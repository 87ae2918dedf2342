"""Samplers of distilled models: latent consistency (LCM) and trajectory consistency (TCD), of a few noisy steps.

They follow diffusers' LCMScheduler and TCDScheduler step for step, but take the noise from the caller, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import LCMScheduler, TCDScheduler

from genssl.generators.diffusion.ddim import limit
from genssl.generators.diffusion.scheduler_config import (
    LCM_FIELDS,
    TCD_FIELDS,
    Fields,
    build_scheduler,
    check_first_step,
    read_scheduler,
)


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


class _Consistency:
    """What the two samplers share: the noise schedule, the prediction type, and the arithmetic of a step."""

    def __init__(self, folder: Path, kind: type[LCMScheduler] | type[TCDScheduler], fields: Fields) -> None:
        self._scheduler = build_scheduler(kind, folder, read_scheduler(folder, fields))
        check_first_step(folder, self._scheduler)
        self.facts: list[str] = []
        # A distilled model knows this many time steps, of which so many or fewer are taken.
        self.most_steps = int(self._scheduler.config["original_inference_steps"])
        self._prediction = self._scheduler.config["prediction_type"]
        self._limited = False

    def _timesteps(self, count: int) -> list[int]:
        self._scheduler.set_timesteps(count)
        timesteps: list[int] = self._scheduler.timesteps.tolist()
        return timesteps

    def noises(self, count: int) -> int:
        """Returns how many tensors of noise a row draws: one after each step but the last."""
        return count - 1

    def move(
        self, step: ConsistencyStep, latents: torch.Tensor, output: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Moves latents [B, C, h, w] one step on, given the network's output and new noise of the same shape."""
        a, b = step.alpha**0.5, (1 - step.alpha) ** 0.5
        if self._prediction == "epsilon":
            clean, noisy = (latents - b * output) / a, output
        else:
            clean, noisy = a * latents - b * output, a * output + b * latents
        if self._limited:
            clean = limit(self._scheduler, clean)
        moved: torch.Tensor = step.skip * latents + step.clean * clean + step.noisy * noisy
        return moved if noise is None else moved + step.fresh * noise


class LCM(_Consistency):
    """Multistep consistency sampling (Luo et al. 2023, arXiv 2310.04378).

    Args:
        folder: of the model, whose scheduler config names the noise schedule.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, LCMScheduler, LCM_FIELDS)
        self._limited = self._scheduler.config["thresholding"] or self._scheduler.config["clip_sample"]
        if self._limited:
            self.facts = ["limited"]

    def steps(self, count: int, side: int) -> Sequence[ConsistencyStep]:
        """Returns the `count` steps from noise to image, whatever the side of the latents."""
        timesteps = self._timesteps(count)
        alphas = self._scheduler.alphas_cumprod
        made = []
        for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
            skip, out = (
                float(factor) for factor in self._scheduler.get_scalings_for_boundary_condition_discrete(timestep)
            )
            after = 1.0 if following is None else float(alphas[following])
            kept = after**0.5
            made.append(
                ConsistencyStep(timestep, float(alphas[timestep]), kept * skip, kept * out, 0.0, (1 - after) ** 0.5)
            )
        return made


class TCD(_Consistency):
    """Strategic stochastic sampling (Zheng et al. 2024, arXiv 2402.19159, algorithm 4).

    Args:
        folder: of the model, whose scheduler config names the noise schedule.
        gamma: 0..1; how much of each step is new noise.
    """

    def __init__(self, folder: Path, gamma: float) -> None:
        super().__init__(folder, TCDScheduler, TCD_FIELDS)
        self._gamma = gamma

    def noises(self, count: int) -> int:
        """Returns how many tensors of noise a row draws: one after each step but the last, none at gamma 0."""
        return count - 1 if self._gamma > 0 else 0

    def steps(self, count: int, side: int) -> Sequence[ConsistencyStep]:
        """Returns the `count` steps from noise to image, whatever the side of the latents."""
        timesteps = self._timesteps(count)
        alphas = self._scheduler.alphas_cumprod
        made = []
        for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
            # In float32, as the stock scheduler rounds it.
            middle = float(alphas[int(torch.floor((1 - self._gamma) * torch.tensor(following or 0)))])
            scale, fresh = 1.0, 0.0
            if following is not None and self._gamma > 0:
                ratio = float(alphas[following]) / middle
                scale, fresh = ratio**0.5, (1 - ratio) ** 0.5
            made.append(
                ConsistencyStep(
                    timestep,
                    float(alphas[timestep]),
                    0.0,
                    scale * middle**0.5,
                    scale * (1 - middle) ** 0.5,
                    fresh,
                )
            )
        return made
