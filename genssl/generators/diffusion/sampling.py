"""What sampling is made of: noise by row, guidance, decoding, and DDIM (Song et al. 2021, arXiv 2010.02502, eta 0).

DDIM has every coefficient computed ahead and follows diffusers' DDIMScheduler step for step, including its rounding of
time steps, so that images equal the stock pipelines' for the same noise; `tests/generators/diffusion/
test_stable_unclip.py` holds it to that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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
from genssl.generators.finite import check_made

DECODED_PIXELS = 2**22  # of a batch, decoded at once


class Sampler(ABC):
    """A schedule with its arithmetic. A step has a `timestep`, which the network sees.

    Attributes:
        most_steps: counts of steps from 1 up to this one can be made.
        facts: what the name of a generator owes to the sampler beside the folder's files and the generator's block.
    """

    most_steps: int = 1000
    facts: Sequence[str] = ()

    @abstractmethod
    def steps(self, count: int, side: int = 0) -> Sequence[Any]:
        """Returns the steps from noise to image; `side` is that of the latents, on which a flow's schedule depends."""

    def noises(self, count: int) -> int:
        """Returns how many tensors of noise a row draws after its latents; step i takes the i-th."""
        return 0

    @abstractmethod
    def move(self, step: Any, latents: torch.Tensor, output: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Moves latents [B, C, h, w] one step on, given the network's output and the noise of this step."""


@dataclass(frozen=True)
class DDIMStep:
    """One step: the time step the network sees, and alpha-bar before and after it."""

    timestep: int
    alpha: float
    alpha_next: float


class DDIM(Sampler):
    """Deterministic DDIM over the schedule of one model, given as a DDIMScheduler of the model's scheduler config."""

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

    def steps(self, count: int, side: int = 0) -> list[DDIMStep]:
        """Returns the `count` steps from noise to image, at most `most_steps`, whatever the side."""
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

    def move(
        self, step: DDIMStep, latents: torch.Tensor, output: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Moves latents one step on (equation 12, eta 0)."""
        clean, epsilon = predictions(self.prediction, step.alpha, latents, output)
        clean = limit(self._scheduler, clean)
        moved: torch.Tensor = step.alpha_next**0.5 * clean + (1 - step.alpha_next) ** 0.5 * epsilon
        return moved


def predictions(
    kind: str, alpha: float, latents: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the image and the noise that a network's output of some `prediction_type` says are in latents."""
    a, b = alpha**0.5, (1 - alpha) ** 0.5
    if kind == "v_prediction":
        return a * latents - b * output, a * output + b * latents
    if kind == "epsilon":
        return (latents - b * output) / a, output
    return output, (latents - a * output) / b


def limit(scheduler: Any, clean: torch.Tensor) -> torch.Tensor:
    """Clips a predicted image [B, C, h, w], or thresholds each row by itself, as the scheduler's config says."""
    if scheduler.config["thresholding"]:
        thresholded: torch.Tensor = scheduler._threshold_sample(clean)
        return thresholded
    if scheduler.config["clip_sample"]:
        most = float(scheduler.config["clip_sample_range"])
        return clean.clamp(-most, most)
    return clean


def read_ddim(folder: Path, spacing: str | None = None) -> DDIM:
    """Returns DDIM over the noise schedule of a model, whatever scheduler its folder names.

    A `spacing` of the time steps replaces the config's. Raises GeneratorError for what DDIM cannot do.
    """
    config = read_scheduler(folder, SPACED_DDIM_FIELDS if spacing else DDIM_FIELDS)
    # A config without clip_sample would get diffusers' default True, and very different latents.
    config = {"clip_sample": False} | config | ({"timestep_spacing": spacing} if spacing else {})
    scheduler: DDIMScheduler = build_scheduler(DDIMScheduler, folder, config)
    if scheduler.config["timestep_spacing"] != "leading":
        check_first_step(folder, scheduler)
    return DDIM(scheduler)


def read_trailing_ddim(folder: Path, zero_terminal_snr: bool) -> DDIM:
    """Does as `read_ddim` with trailing steps, and with pure noise at the first of them as the caller says.

    That is the paper's sampler (Lin et al. 2024, arXiv 2305.08891).
    """
    config = {"clip_sample": False} | read_scheduler(folder, SPACED_DDIM_FIELDS)
    if zero_terminal_snr and config.get("prediction_type", "epsilon") == "epsilon":
        raise GeneratorError(
            f"{folder}: the model predicts epsilon, which is undefined at zero terminal SNR; "
            "set generator.zero_terminal_snr: false"
        )
    config |= {"timestep_spacing": "trailing", "rescale_betas_zero_snr": zero_terminal_snr}
    return DDIM(build_scheduler(DDIMScheduler, folder, config))


def row_noise(seeds: Sequence[int], *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Draws standard normal noise float32 [B, *shape] (CPU) in the order of `shapes`, a stream a row, by its seed."""
    drawn: list[list[torch.Tensor]] = [[] for _ in shapes]
    for seed in seeds:
        stream = torch.Generator("cpu").manual_seed(seed)
        for rows, shape in zip(drawn, shapes, strict=True):
            rows.append(torch.randn((1, *shape), generator=stream))
    return [torch.cat(rows) for rows in drawn]


def guide(output: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) of outputs [2 B, ...], unconditional first."""
    free, conditioned = output.chunk(2)
    return free + guidance * (conditioned - free)


def decode(
    decoder: Callable[[torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    image_size: int,
    output_size: int,
    *,
    whose: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Decodes latents to images uint8 [B, 3, output_size, output_size] on the CPU.

    The `decoder` makes images [B, 3, image_size, image_size] in -1..1, which are resized (bicubic, antialiased).
    Raises NotFiniteError, naming `whose` they are, for NaN or infinities, which would be black.
    """
    # In slices: at 768 px one image takes over a GB of activations, though the denoiser can take many rows.
    at_once = max(1, DECODED_PIXELS // image_size**2)
    decoded = torch.cat([decoder(part).float() for part in torch.split(latents, at_once)])
    check_made(decoded, whose, "images", dtype)
    images = (decoded / 2 + 0.5).clamp(0, 1)
    if output_size != images.shape[-1]:
        images = torch.nn.functional.interpolate(
            images, size=(output_size, output_size), mode="bicubic", antialias=True
        ).clamp(0, 1)
    return (images * 255).round().to(torch.uint8).cpu()
