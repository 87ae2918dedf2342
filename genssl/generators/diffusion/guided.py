"""The loop that all diffusion and flow generators share: condition and guidance a row, one schedule a batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from genssl.errors import RequestRefusedError
from genssl.generators.base import Alive, DescribedGenerator, count_tflops, keep_living
from genssl.generators.diffusion.sampling import Sampler, decode, guide, row_noise
from genssl.generators.fingerprint import Fingerprint
from genssl.generators.parameters import Parameters

Columns = npt.NDArray[np.float64]  # parameters of rows, a column each


@dataclass(frozen=True)
class Rows:
    """The rows of a batch that is sampled.

    Attributes:
        x: latents [B, C, h, w].
        condition: what the network is told of the source, [B, ...].
        own: [B, P], the parameters in `BY_ROW`.
        guidance: scales [B, 1, 1, 1].
        guided: bool [B, steps] on the CPU: whether a step is guided, and so takes a second forward pass.
        noise: [B, N, C, h, w], of the N noisy steps.
    """

    x: torch.Tensor
    condition: torch.Tensor
    own: Columns
    guidance: torch.Tensor
    guided: torch.Tensor
    noise: torch.Tensor

    def take(self, positions: list[int]) -> Rows:
        """Returns the rows at some positions."""
        return Rows(*(getattr(self, name)[positions] for name in self.__dataclass_fields__))


class GuidedDiffusion(DescribedGenerator):
    """A diffusion model or flow whose rows differ in condition, guidance and seed.

    A subclass loads its networks, calls `__init__` and `_describe`, and says how embeddings become conditions, and
    latents images. Latents have `channels`, and `scale` pixels at each side.

    Attributes:
        BY_ROW: parameters that every row of a batch has for itself.
        NOISE: the parameter that says how much noise lies on the embedding, for which a row draws first of all.
        PARAMETERS: all of them, in the order of the spec.
        SETTINGS: fields of the config that the spec shows.
    """

    BY_ROW: ClassVar[tuple[str, ...]] = ("guidance_scale",)
    NOISE: ClassVar[str | None] = None
    PARAMETERS: ClassVar[tuple[str, ...]] = ("num_inference_steps", "guidance_scale", "image_size", "output_size")
    SETTINGS: ClassVar[tuple[str, ...]] = ("revision", "dtype", "image_size", "output_size")
    _vae: Any

    def __init__(self, config: Any, device: torch.device, *, sampler: Sampler, channels: int, scale: int) -> None:
        self._device = device
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._latent_dtype = self._dtype  # of latents and conditions between the steps
        self._sampler = sampler
        self._channels, self._scale = channels, scale
        self._multiple = scale
        self._compiled = False

    def _describe_sizes(
        self, config: Any, fingerprint: Fingerprint, native_size: int, licence: str, embedding_dim: int | None = None
    ) -> None:
        """Sets `spec`, of a model that makes images of any size; see `_describe`."""
        image_size = config.image_size or native_size
        sizes = {"image_size": image_size, "output_size": config.output_size or image_size}
        self._describe(
            config,
            fingerprint,
            embedding_dim=embedding_dim,
            image_size=sizes["output_size"],
            licence=licence,
            defaults={name: sizes.get(name) or getattr(config, name) for name in self.PARAMETERS},
            settings={name: str(getattr(config, name)) for name in self.SETTINGS},
        )

    def _bounds(self) -> dict[str, tuple[float, float]]:
        return {
            "num_inference_steps": (1, min(1000, self._sampler.most_steps)),
            "guidance_scale": (0, 100),
            "image_size": (self._multiple, 2048),
            "output_size": (8, 2048),
        }

    def check(self, parameters: Parameters) -> None:
        """Raises RequestRefusedError for a value out of bounds, or an image_size that the autoencoder cannot do."""
        super().check(parameters)
        if parameters.get("image_size", 0) % self._multiple:
            raise RequestRefusedError(
                f"parameter image_size: {parameters['image_size']} is not a multiple of {self._multiple}, "
                "the autoencoder's factor"
            )

    def batch_key(self, parameters: Parameters) -> tuple[object, ...]:
        """All but what rows have for themselves must agree; guided rows go apart, as they cost two forwards."""
        guided = parameters["guidance_scale"] > 1
        guided = guided and parameters.get("guidance_start", 0) < parameters.get("guidance_end", 1)
        return (guided, *(parameters[name] for name in sorted(parameters) if name not in self.BY_ROW))

    def _latent_shape(self, parameters: Parameters) -> tuple[int, int, int]:
        side = int(parameters["image_size"]) // self._scale
        return self._channels, side, side

    def _noised(self, embeddings: torch.Tensor, noise: torch.Tensor, levels: list[float | int]) -> torch.Tensor:
        """Returns embeddings, float32 [B, D], with as much noise [B, D] as their levels say."""
        raise NotImplementedError

    def _condition(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Returns what a row is conditioned on, [B, ...], given embeddings float32, noised if they are."""
        return embeddings

    def _unconditioned(self, condition: torch.Tensor) -> torch.Tensor:
        """Returns a condition of the same shape that says nothing of an image."""
        return torch.zeros_like(condition)

    @abstractmethod
    def _output(self, x: torch.Tensor, time: float, condition: torch.Tensor, own: Columns, free: int) -> torch.Tensor:
        """Returns the network's output [B, C, h, w].

        Args:
            x, condition: [B, ...].
            time: the step's `timestep`.
            own: [B, P], the parameters in `BY_ROW`.
            free: so many rows, the first, are unconditioned.
        """

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns images [B, 3, H, W] in -1..1 of the sampler's latents."""
        scaled = (latents / self._vae.config["scaling_factor"]).to(self._dtype)
        images: torch.Tensor = self._vae.decode(scaled, return_dict=False)[0]
        return images

    def _costly_decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Does what of `_decode` counts as a variant's cost."""
        return self._decode(latents)

    def _tflops(self) -> float:
        parameters = self.spec.defaults
        count, shape = int(parameters["num_inference_steps"]), self._latent_shape(parameters)
        time = self._sampler.steps(count, shape[-1])[0].timestep

        def latents() -> torch.Tensor:
            return torch.zeros((1, *shape), device=self._device, dtype=self._latent_dtype)

        def forward() -> None:
            embeddings = torch.zeros((1, self.spec.embedding_dim))
            if self.NOISE is not None:
                embeddings = self._noised(embeddings, embeddings, [0])
            condition = self._condition(embeddings).to(self._device, self._latent_dtype)
            self._output(latents(), time, condition, own, 0)

        own = self._own([parameters])
        forwards = count + int(_guided_steps([parameters]).sum())
        return forwards * count_tflops(forward) + count_tflops(lambda: self._costly_decode(latents()))

    def _own(self, parameters: Sequence[Parameters]) -> Columns:
        return np.array([[float(row[name]) for name in self.BY_ROW] for row in parameters])

    @torch.inference_mode()
    def generate(
        self, embeddings: torch.Tensor, seeds: Sequence[int], parameters: Sequence[Parameters], **hooks: Any
    ) -> torch.Tensor:
        """Makes one image a row; see `Generator.generate`, and `sample` for the hooks."""
        latents, rows = self.sample(embeddings, seeds, parameters, **hooks)
        image_size, output_size = (
            int(parameters[0].get(name, self.spec.image_size)) for name in ("image_size", "output_size")
        )
        made = decode(self._decode, latents, image_size, output_size, whose=self.spec.title, dtype=self._dtype)
        if len(made) == len(embeddings):
            return made
        whole = made.new_zeros((len(embeddings), *made.shape[1:]))  # those that nobody waits for are black
        whole[rows] = made
        return whole

    @torch.inference_mode()
    def sample(
        self,
        embeddings: torch.Tensor,
        seeds: Sequence[int],
        parameters: Sequence[Parameters],
        *,
        alive: Alive | None = None,
        sizes: Sequence[int] = (),
        exact: bool = False,
    ) -> tuple[torch.Tensor, list[int]]:
        """Makes the latents of `generate`, as the autoencoder's own scale has not touched them yet.

        If `exact`, at an equal batch size a row's bits depend on no other row, see `GeneratesExactly`.

        Returns:
            [B, C, h, w] in the model's dtype on its device, and which row lies at each position.
        """
        count, shape = int(parameters[0]["num_inference_steps"]), self._latent_shape(parameters[0])
        # The order is the stock pipelines': the embedding's noise, the latents, each step's noise; one stream a row.
        shapes = [(embeddings.shape[1],)] if self.NOISE is not None else []
        drawn = row_noise(seeds, *shapes, *[shape] * (1 + self._sampler.noises(count)))
        embeddings = embeddings.float()
        if self.NOISE is not None:
            embeddings = self._noised(embeddings, drawn.pop(0), [row[self.NOISE] for row in parameters])
        x, *later = (noise.to(self._device, self._latent_dtype) for noise in drawn)
        scales = torch.tensor([float(row["guidance_scale"]) for row in parameters], device=x.device, dtype=x.dtype)
        state = Rows(
            x=x,
            condition=self._condition(embeddings).to(self._device, self._latent_dtype),
            own=self._own(parameters),
            guidance=scales.view(-1, 1, 1, 1),
            guided=_guided_steps(parameters),
            noise=torch.stack(later, dim=1) if later else x.new_zeros((len(x), 0)),
        )
        rows = list(range(len(x)))
        # The hook is asked before the first step too, and once more before decoding, which costs as much as a step.
        for number, step in enumerate([*self._sampler.steps(count, shape[-1]), None]):
            kept = None if alive is None else keep_living(alive(), rows, sizes)
            if kept is not None:
                state, rows = state.take(kept), [rows[position] for position in kept]
            if step is not None:
                output = self._predict(state, step.timestep, state.guided[:, number], exact)
                noise = state.noise[:, number] if number < state.noise.shape[1] else None
                state = replace(state, x=self._sampler.move(step, state.x, output, noise))
        return state.x, rows

    def _predict(self, rows: Rows, time: float, guided: torch.Tensor, exact: bool) -> torch.Tensor:
        """Returns the network's output [B, C, h, w], guided where `guided` [B] (CPU) says.

        A row that is not guided takes part in one forward, wherever the others are. If `exact`, the batches have those
        shapes alone that rows have which are all guided, or all not.
        """
        positions = guided.nonzero().flatten().tolist()
        if not positions:
            return self._output(rows.x, time, rows.condition, rows.own, 0)
        if len(positions) == len(rows.x):
            return guide(self._outputs(rows, rows, time), rows.guidance)
        mask = guided.view(-1, 1, 1, 1).to(rows.x.device)
        if exact:
            output = self._output(rows.x, time, rows.condition, rows.own, 0)
            return torch.where(mask, guide(self._outputs(rows, rows, time), rows.guidance), output)
        if self._compiled:  # for the sizes of a batch and twice that, and not anew for every number of guided rows
            outputs = self._outputs(rows, rows, time)
            return torch.where(mask, guide(outputs, rows.guidance), outputs.chunk(2)[1])
        # Rounded up to a power of two, so that few shapes are ever computed.
        rounded = min(len(rows.x), 1 << (len(positions) - 1).bit_length())
        outputs = self._outputs(rows.take(positions + positions[-1:] * (rounded - len(positions))), rows, time)
        output = outputs[rounded:]
        output[positions] = guide(torch.cat([outputs[: len(positions)], output[positions]]), rows.guidance[positions])
        return output

    def _outputs(self, free: Rows, rows: Rows, time: float) -> torch.Tensor:
        """Returns the outputs of some rows without their condition, and after them of the rows with it."""
        condition = torch.cat([self._unconditioned(free.condition), rows.condition])
        x, own = torch.cat([free.x, rows.x]), np.concatenate([free.own, rows.own])
        return self._output(x, time, condition, own, len(free.x))


def _guided_steps(parameters: Sequence[Parameters]) -> torch.Tensor:
    """Returns of every row and step whether it is guided: bool [B, steps] on the CPU."""
    scale, start, end = (
        torch.tensor([[float(row.get(name, otherwise))] for row in parameters], dtype=torch.float64)
        for name, otherwise in (("guidance_scale", 1), ("guidance_start", 0), ("guidance_end", 1))
    )
    count = int(parameters[0]["num_inference_steps"])
    part = torch.arange(count, dtype=torch.float64) / count
    return (scale > 1) & (start <= part) & (part < end)
