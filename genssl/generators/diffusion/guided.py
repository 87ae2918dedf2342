"""The loop that generators of latent diffusion share: a condition a row, guidance a row, one schedule a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from genssl.data.base import UInt8Array
from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.base import Alive, GeneratorSpec
from genssl.generators.cost import count_tflops_of
from genssl.generators.diffusion.configs import DiffusersConfig
from genssl.generators.diffusion.ddim import DDIM, ddim_scheduler
from genssl.generators.diffusion.sampling import (
    check_bounds,
    decode,
    denoise,
    guidance_column,
    guide,
    row_noise,
    spread,
)
from genssl.generators.fingerprint import Fingerprint
from genssl.generators.parameters import Parameters
from genssl.generators.preprocessing import Preprocessing


class Sampler(Protocol):
    """A schedule with its arithmetic. A step has a `timestep`; `noises` says how many tensors a row draws.

    Attributes:
        most_steps: counts of steps from 1 up to this one can be made.
        facts: what the name of a generator owes to the sampler beside the folder's files and the generator's block.
    """

    most_steps: int
    facts: list[str]

    def steps(self, count: int, side: int) -> Sequence[Any]:
        """Returns the steps from noise to image; `side` is that of the latents, on which a flow's schedule depends."""
        ...

    def noises(self, count: int) -> int:
        """Returns how many tensors of noise a row draws after its latents; step i takes the i-th."""
        ...

    def move(self, step: Any, latents: torch.Tensor, output: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Moves latents [B, C, h, w] one step on, given the network's output and the noise of this step."""
        ...


class GuidedDiffusion(ABC):
    """A latent diffusion model whose rows differ in condition, guidance and seed.

    A subclass loads its networks, calls `__init__` and `_describe`, and says how images become embeddings, embeddings
    conditions, and latents images.

    Args:
        config: default parameters.
        device: where the networks run.
        sampler: of the schedule.
        preprocessing: brings sources to the image encoder's input.
        latents: channels of the latents, and how many pixels a latent has at each side.

    Attributes:
        BY_ROW: parameters that every row of a batch has for itself.
    """

    spec: GeneratorSpec
    BY_ROW: ClassVar[tuple[str, ...]] = ("guidance_scale",)

    def __init__(
        self,
        config: DiffusersConfig,
        device: torch.device,
        *,
        sampler: Sampler,
        preprocessing: Preprocessing,
        latents: tuple[int, int],
    ) -> None:
        self._device = device
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._sampler = sampler
        self._preprocessing = preprocessing
        self._channels, self._scale = latents
        self._multiple = self._scale

    def _describe(
        self,
        config: Any,
        *,
        fingerprint: Fingerprint,
        embedding_dim: int,
        native_size: int,
        licence: str,
        settings: Sequence[str],
        **more: float | int,
    ) -> None:
        """Sets `spec`, with `more` among the default parameters; raises GeneratorError if a default cannot be done."""
        image_size = config.image_size or native_size
        self.spec = GeneratorSpec(
            name=config.name,
            model=config.model,
            fingerprint=fingerprint.digest,
            former=fingerprint.former,
            embedding_dim=embedding_dim,
            image_size=config.output_size or image_size,
            licence=licence,
            defaults={
                "num_inference_steps": config.num_inference_steps,
                "guidance_scale": config.guidance_scale,
                "image_size": image_size,
                "output_size": config.output_size or image_size,
                **more,
            },
            settings={name: str(getattr(config, name)) for name in ("revision", "dtype", *settings)},
        )
        try:
            self.check(self.spec.defaults)
        except RequestRefusedError as error:
            raise GeneratorError(f"generator {config.model}: {error}") from None
        self.spec = replace(self.spec, tflops=self._tflops())

    def _tflops(self) -> float:
        """Returns what a variant costs at the defaults, see `GeneratorSpec.tflops`."""
        parameters = self.spec.defaults
        count, side = int(parameters["num_inference_steps"]), int(parameters["image_size"]) // self._scale
        guided = parameters["guidance_scale"] > 1
        first = self._sampler.steps(count, side)[0]

        def latents(rows: int) -> torch.Tensor:
            return torch.zeros((rows, self._channels, side, side), device=self._device, dtype=self._dtype)

        def step() -> None:
            condition = self._condition(torch.zeros((1, self.spec.embedding_dim))).to(self._device, self._dtype)
            if guided:
                condition = torch.cat([self._unconditioned(condition), condition])
            own = {name: [float(parameters[name])] for name in self.BY_ROW}
            self._output(latents(len(condition)), first.timestep, condition, guided, parameters, own)

        return count * count_tflops_of(step) + count_tflops_of(lambda: self._decode(latents(1)))

    def preprocess(self, image: UInt8Array) -> UInt8Array:
        """Brings uint8 [3, H, W] of any size to the image encoder's input uint8 [3, S, S]."""
        return self._preprocessing.preprocess(image)

    @abstractmethod
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds preprocessed images uint8 [B, 3, S, S]; returns float32 [B, embedding_dim] on the CPU."""

    @abstractmethod
    def _condition(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Returns what a row is conditioned on, [B, ...], given embeddings float32 [B, embedding_dim]."""

    @abstractmethod
    def _unconditioned(self, condition: torch.Tensor) -> torch.Tensor:
        """Returns a condition of the same shape that says nothing of an image."""

    @abstractmethod
    def _output(
        self,
        x: torch.Tensor,
        timestep: float,
        condition: torch.Tensor,
        guided: bool,
        shared: Parameters,
        own: Mapping[str, Sequence[float]],
    ) -> torch.Tensor:
        """Returns the network's output [B, C, h, w]; if guided, the first half of the batch is unconditioned.

        Args:
            x, condition: [B, ...].
            timestep: as the sampler's step has it.
            guided: whether the rows stand there twice.
            shared: parameters of one of the rows; those not in `BY_ROW` are all rows'.
            own: of those in `BY_ROW`, every row's, each row once.
        """

    @abstractmethod
    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns images [B, 3, H, W] in -1..1 of the sampler's latents."""

    def check(self, parameters: Parameters) -> None:
        """Raises RequestRefusedError for steps, guidance or sizes outside what the model can do."""
        bounds = {
            "num_inference_steps": (1, min(1000, self._sampler.most_steps)),
            "guidance_scale": (0, 100),
            "image_size": (self._multiple, 2048),
            "output_size": (8, 2048),
        }
        check_bounds(parameters, bounds, self._multiple)

    def batch_key(self, parameters: Parameters) -> tuple[object, ...]:
        """Everything but what rows have for themselves must agree; guided rows go apart, as they cost two forwards."""
        return (
            parameters["guidance_scale"] > 1,
            *(parameters[name] for name in sorted(parameters) if name not in self.BY_ROW),
        )

    @torch.inference_mode()
    def generate(
        self,
        embeddings: torch.Tensor,
        seeds: Sequence[int],
        parameters: Sequence[Parameters],
        *,
        alive: Alive | None = None,
        sizes: Sequence[int] = (),
    ) -> torch.Tensor:
        """Makes one image a row; see `Generator.generate`."""
        latents, rows = self.sample(embeddings, seeds, parameters, alive=alive, sizes=sizes)
        image_size, output_size = (int(parameters[0][name]) for name in ("image_size", "output_size"))
        made = decode(self._decode, latents, image_size, output_size, whose=self.spec.title, dtype=self._dtype)
        return spread(made, rows, len(embeddings))

    @torch.inference_mode()
    def sample(
        self,
        embeddings: torch.Tensor,
        seeds: Sequence[int],
        parameters: Sequence[Parameters],
        *,
        alive: Alive | None = None,
        sizes: Sequence[int] = (),
    ) -> tuple[torch.Tensor, list[int]]:
        """Makes the latents of `generate`, as the autoencoder's own scale has not touched them yet.

        Returns:
            [B, C, h, w] in the model's dtype on its device, and which row lies at each position.
        """
        shared = parameters[0]
        count = int(shared["num_inference_steps"])
        side = int(shared["image_size"]) // self._scale
        shape = (self._channels, side, side)
        # The order is the stock pipelines': the latents first, then each step's noise, from one stream a row.
        first, *later = row_noise(seeds, *[shape] * (1 + self._sampler.noises(count)))
        x = first.to(self._device, self._dtype)
        condition = self._condition(embeddings.float()).to(self._device, self._dtype)
        columns = torch.tensor([[float(row[name]) for name in self.BY_ROW] for row in parameters], dtype=torch.float64)
        state = [x, condition, guidance_column(parameters, x), columns]
        if later:
            state.append(torch.stack(later, dim=1).to(self._device, self._dtype))
        guided = bool(shared["guidance_scale"] > 1)

        def advance(
            numbered: tuple[int, Any],
            x: torch.Tensor,
            condition: torch.Tensor,
            guidance: torch.Tensor,
            columns: torch.Tensor,
            noise: torch.Tensor | None = None,
        ) -> torch.Tensor:
            number, step = numbered
            own = dict(zip(self.BY_ROW, columns.T.tolist(), strict=True))
            if guided:
                both = torch.cat([self._unconditioned(condition), condition])
                output = guide(self._output(torch.cat([x, x]), step.timestep, both, True, shared, own), guidance)
            else:
                output = self._output(x, step.timestep, condition, False, shared, own)
            drawn = noise[:, number] if noise is not None and number < noise.shape[1] else None
            return self._sampler.move(step, x, output, drawn)

        return denoise(list(enumerate(self._sampler.steps(count, side))), state, advance, alive, sizes)


class Deterministic:
    """DDIM as a `Sampler`: it draws no noise between its steps.

    Args:
        folder: of the model.
        spacing: of the time steps; None leaves the model's.
    """

    def __init__(self, folder: Path, spacing: str | None = None) -> None:
        self._ddim = DDIM(ddim_scheduler(folder, spacing))
        self.most_steps, self.facts = self._ddim.most_steps, self._ddim.facts

    def steps(self, count: int, side: int) -> Sequence[Any]:
        """Returns the steps of DDIM, whatever the side."""
        return self._ddim.steps(count)

    def noises(self, count: int) -> int:
        """Returns 0."""
        return 0

    def move(self, step: Any, latents: torch.Tensor, output: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Moves latents one step on; see `DDIM.step`."""
        return self._ddim.step(step, latents, output)
