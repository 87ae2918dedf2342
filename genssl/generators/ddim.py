"""Deterministic DDIM (Song et al. 2021, arXiv 2010.02502, eta 0) with every coefficient computed ahead.

Follows diffusers' DDIMScheduler step for step, including its rounding of time steps, so that images equal the stock
pipelines' for the same noise; `tests/generators/test_stable_unclip.py` holds it to that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler


@dataclass(frozen=True)
class DDIMStep:
    """One step: the time step the network sees, and alpha-bar before and after it."""

    timestep: int
    alpha: float
    alpha_next: float


class DDIM:
    """The schedule of one model.

    Args:
        scheduler: the model's scheduler config as a DDIMScheduler.

    Attributes:
        most_steps: counts of steps from 1 up to this one can be made.
    """

    def __init__(self, scheduler: DDIMScheduler) -> None:
        self._scheduler = scheduler
        self.prediction: str = scheduler.config["prediction_type"]
        self._clip = float(scheduler.config["clip_sample_range"]) if scheduler.config["clip_sample"] else None
        self._alphas: list[float] = scheduler.alphas_cumprod.tolist()
        self.most_steps = trained = int(scheduler.config["num_train_timesteps"])
        if scheduler.config["timestep_spacing"] == "leading":
            # The offset puts the first step of a fine schedule beyond the last one that was trained: with the usual 1,
            # as many steps as were trained. The stock scheduler fails on it.
            offset = int(scheduler.config["steps_offset"])
            beyond = (count for count in range(1, trained + 1) if (count - 1) * (trained // count) + offset >= trained)
            self.most_steps = next(beyond, trained + 1) - 1

    def steps(self, count: int) -> list[DDIMStep]:
        """Returns the `count` steps from noise to image, at most `most_steps`."""
        scheduler = self._scheduler
        scheduler.set_timesteps(count)
        stride = scheduler.config["num_train_timesteps"] // count
        final, steps = float(scheduler.final_alpha_cumprod), []
        # With trailing spacing diffusers counts down from 1000 by the float 1000 / count, and at 62 counts (61, 103,
        # ...) rounding leaves one step too many, at time -1: stock pipelines take it, from the image that is
        # finished by then, with the noise level of the *noisiest* time step, and return what comes of that.
        for timestep in scheduler.timesteps.tolist()[:count]:
            following = timestep - stride
            alpha_next = self._alphas[following] if following >= 0 else final
            steps.append(DDIMStep(timestep=timestep, alpha=self._alphas[timestep], alpha_next=alpha_next))
        return steps

    def step(self, step: DDIMStep, latents: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Moves latents [B, C, h, w] one step on, given the network's output of the same shape (equation 12, eta 0)."""
        a, b = step.alpha**0.5, (1 - step.alpha) ** 0.5
        if self.prediction == "v_prediction":
            clean, noise = a * latents - b * output, a * output + b * latents
        elif self.prediction == "epsilon":
            clean, noise = (latents - b * output) / a, output
        else:
            clean, noise = output, (latents - a * output) / b
        if self._clip is not None:
            clean = clean.clamp(-self._clip, self._clip)
        moved: torch.Tensor = step.alpha_next**0.5 * clean + (1 - step.alpha_next) ** 0.5 * noise
        return moved
