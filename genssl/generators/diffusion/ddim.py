"""Deterministic DDIM (Song et al. 2021, arXiv 2010.02502, eta 0) with every coefficient computed ahead.

Follows diffusers' DDIMScheduler step for step, including its rounding of time steps, so that images equal the stock
pipelines' for the same noise; `tests/generators/diffusion/test_stable_unclip.py` holds it to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from genssl.errors import GeneratorError
from genssl.generators.diffusion.scheduler_config import (
    DDIM_FIELDS,
    SPACED_DDIM_FIELDS,
    build_scheduler,
    check_first_step,
    read_scheduler,
)


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
        facts: what the name of a generator owes to the schedule beside the file that it is read from.
    """

    def __init__(self, scheduler: DDIMScheduler) -> None:
        self._scheduler = scheduler
        self.prediction: str = scheduler.config["prediction_type"]
        self.facts = ["thresholding"] if scheduler.config["thresholding"] else []
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
        clean = limit(self._scheduler, clean)
        moved: torch.Tensor = step.alpha_next**0.5 * clean + (1 - step.alpha_next) ** 0.5 * noise
        return moved


def limit(scheduler: Any, clean: torch.Tensor) -> torch.Tensor:
    """Clips a predicted image [B, C, h, w], or thresholds each row by itself, as the scheduler's config says."""
    if scheduler.config["thresholding"]:
        thresholded: torch.Tensor = scheduler._threshold_sample(clean)
        return thresholded
    if scheduler.config["clip_sample"]:
        most = float(scheduler.config["clip_sample_range"])
        return clean.clamp(-most, most)
    return clean


def ddim_scheduler(folder: Path, spacing: str | None) -> DDIMScheduler:
    """Returns a DDIM scheduler over the noise schedule of a model, whatever scheduler its folder names.

    Args:
        folder: of the model.
        spacing: of the time steps; None leaves the config's.

    Raises:
        GeneratorError: if the config asks for what DDIM cannot do.
    """
    config = read_scheduler(folder, SPACED_DDIM_FIELDS if spacing else DDIM_FIELDS)
    # A config without clip_sample would get diffusers' default True, and very different latents.
    config = {"clip_sample": False} | config | ({"timestep_spacing": spacing} if spacing else {})
    scheduler: DDIMScheduler = build_scheduler(DDIMScheduler, folder, config)
    if scheduler.config["timestep_spacing"] != "leading":
        check_first_step(folder, scheduler)
    return scheduler


def trailing_scheduler(folder: Path, zero_terminal_snr: bool) -> DDIMScheduler:
    """Does as `ddim_scheduler` with trailing steps, and with pure noise at the first of them as the caller says.

    That is the paper's sampler (Lin et al. 2024, arXiv 2305.08891).
    """
    config = {"clip_sample": False} | read_scheduler(folder, SPACED_DDIM_FIELDS)
    if zero_terminal_snr and config.get("prediction_type", "epsilon") == "epsilon":
        raise GeneratorError(
            f"{folder}: the model predicts epsilon, which is undefined at zero terminal SNR; "
            "set generator.zero_terminal_snr: false"
        )
    config |= {"timestep_spacing": "trailing", "rescale_betas_zero_snr": zero_terminal_snr}
    scheduler: DDIMScheduler = build_scheduler(DDIMScheduler, folder, config)
    return scheduler
