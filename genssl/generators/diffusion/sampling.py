"""What every sampler of several steps shares: noise by row, guidance by row, stopping early, decoding, checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from genssl.errors import RequestRefusedError
from genssl.generators.base import Alive, keep_living
from genssl.generators.finite import check_made
from genssl.generators.parameters import Parameters

DECODED_PIXELS = 2**22  # of a batch, decoded at once

Step = TypeVar("Step")


def row_noise(seeds: Sequence[int], *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Draws standard normal noise row by row, each row from one CPU stream of its seed, in the order of `shapes`.

    Returns:
        One float32 [B, *shape] a shape, on the CPU.
    """
    drawn: list[list[torch.Tensor]] = [[] for _ in shapes]
    for seed in seeds:
        stream = torch.Generator("cpu").manual_seed(seed)
        for rows, shape in zip(drawn, shapes, strict=True):
            rows.append(torch.randn((1, *shape), generator=stream))
    return [torch.cat(rows) for rows in drawn]


def guidance_column(parameters: Sequence[Parameters], like: torch.Tensor) -> torch.Tensor:
    """Returns every row's guidance scale as [B, 1, ...] with the dtype, device and axes of `like`."""
    scales = [float(row["guidance_scale"]) for row in parameters]
    return torch.tensor(scales, device=like.device, dtype=like.dtype).view(-1, *[1] * (like.ndim - 1))


def guide(output: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) of outputs [2 B, ...], unconditional first."""
    free, conditioned = output.chunk(2)
    return free + guidance * (conditioned - free)


def denoise(
    steps: Iterable[Step],
    state: Sequence[torch.Tensor],
    advance: Callable[..., torch.Tensor],
    alive: Alive | None,
    sizes: Sequence[int],
) -> tuple[torch.Tensor, list[int]]:
    """Runs a sampler, and lets the batch shrink to the rows that are still wanted.

    Args:
        steps: of the sampler, first to last.
        state: tensors of one row a variant: latents first, then what else belongs to a row.
        advance: called with a step and the state; returns the latents after it.
        alive, sizes: see `Generator.generate`.

    Returns:
        The latents, and which row of the batch lies at each of their positions.

    Raises:
        Cancelled: if no row lives any more.
    """
    latents, *others = state
    rows = list(range(len(latents)))
    # The hook is asked before the first step too, and once more before decoding, which costs as much as a step.
    for step in [*steps, None]:
        kept = None if alive is None else keep_living(alive(), rows, sizes)
        if kept is not None:
            latents, others = latents[kept], [tensor[kept] for tensor in others]
            rows = [rows[position] for position in kept]
        if step is not None:
            latents = advance(step, latents, *others)
    return latents, rows


def decode(
    decoder: Callable[[torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    image_size: int,
    output_size: int,
    *,
    whose: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Decodes latents to images.

    Args:
        decoder: latents [B, C, h, w] to images [B, 3, image_size, image_size] in -1..1.
        latents: as the decoder wants them.
        image_size: pixels of the decoder's images.
        output_size: pixels of the images returned; resized with an antialiased bicubic filter if they differ.
        whose: the generator, for messages.
        dtype: of its networks.

    Returns:
        uint8 [B, 3, output_size, output_size] on the CPU.

    Raises:
        GeneratorError: if images hold NaN or infinities, which would be black.
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


def spread(images: torch.Tensor, rows: Sequence[int], count: int) -> torch.Tensor:
    """Puts images of a batch that shrank back to their rows among `count`; the others are black."""
    if len(images) == count:
        return images
    whole = images.new_zeros((count, *images.shape[1:]))
    whole[list(rows)] = images
    return whole


def check_bounds(parameters: Parameters, bounds: Mapping[str, tuple[float, float]], multiple: int) -> None:
    """Raises RequestRefusedError for a value outside its bounds, or an image_size that the autoencoder cannot do."""
    for name, (low, high) in bounds.items():
        if not low <= parameters[name] <= high:
            raise RequestRefusedError(f"parameter {name}: {parameters[name]} is outside {low}..{high}")
    if parameters["image_size"] % multiple:
        raise RequestRefusedError(
            f"parameter image_size: {parameters['image_size']} is not a multiple of {multiple}, "
            "the autoencoder's factor"
        )
