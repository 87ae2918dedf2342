"""Stable unCLIP: diffusers' own networks under our own sampler.

The stock pipeline takes one noise level and one guidance scale a call, repeats one noised embedding over the variants
of an image, and keeps the text encoder for a prompt that is always empty. Here every row has its own noise level,
guidance, guided steps and seed, the empty prompt is embedded once, and image embeddings are cached by the caller. For
equal seeds and equal parameters the images are the stock pipeline's (to 1 grey level).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

from genssl.data.base import UInt8Array
from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.base import Alive, GeneratorSpec
from genssl.generators.configs import StableUnCLIPConfig
from genssl.generators.cost import count_tflops
from genssl.generators.diffusion.ddim import DDIM, DDIMStep, trailing_scheduler
from genssl.generators.diffusion.loading import (
    empty_prompt,
    licence_of,
    load_decoder,
    load_network,
    pipeline_files,
)
from genssl.generators.diffusion.sampling import (
    check_bounds,
    decode,
    denoise,
    guidance_column,
    guide,
    row_noise,
    spread,
)
from genssl.generators.diffusion.scheduler_config import NOISING_FIELDS, build_scheduler, read_scheduler
from genssl.generators.diffusion.unclip_encoder import CLIPEncoder, open_image_encoder
from genssl.generators.fingerprint import fingerprint_model
from genssl.generators.models import find_model
from genssl.generators.parameters import Parameters

SAMPLER_VERSION = "stable_unclip/1"
PIPELINE = "StableUnCLIPImg2ImgPipeline"
SETTINGS = ("revision", "dtype", "tiny_vae", "compile", "preprocess", "zero_terminal_snr", "image_size", "output_size")


class StableUnCLIP:
    """A Stable unCLIP model on one device.

    Attributes:
        embed_with_foreground: as `CLIPEncoder` has it; missing with an encoder of genssl, which has no feature map.

    Args:
        config: names the model and gives the default parameters.
        device: where the networks run.

    Raises:
        GeneratorError: if the model cannot be found, is of another kind, or has no safetensors weights, or if its
            parts do not fit each other.
    """

    def __init__(self, config: StableUnCLIPConfig, device: torch.device) -> None:
        folder = find_model(config.model, config.revision, PIPELINE)
        self._device = device
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._compiled = config.compile
        # With embeddings on disk it may never be needed; without, its faults should show now.
        self._encoder = open_image_encoder(
            folder, self._dtype, device, lazy=config.embedding_cache is not None, rule=config.preprocess
        )
        if isinstance(self._encoder, CLIPEncoder):
            self.embed_with_foreground = self._encoder.embed_with_foreground
        self._unet = load_network(UNet2DConditionModel, folder, "unet", self._dtype, device)
        self._vae, decoder = load_decoder(folder, config.tiny_vae, self._dtype, device)
        if (found := self._vae.config["latent_channels"]) != (wanted := self._unet.config["in_channels"]):
            raise GeneratorError(
                f"{folder}: the autoencoder decodes {found} channels and the denoiser makes {wanted}; "
                "the files belong to different models"
            )
        width = self._encoder.embedding_dim
        if (wanted := self._unet.config["projection_class_embeddings_input_dim"]) != 2 * width:
            raise GeneratorError(
                f"{folder}: the image encoder makes {width} numbers an image and the denoiser takes {wanted} instead "
                "of twice as many; the files belong to different models"
            )
        if device.type == "cuda":
            self._unet.to(memory_format=torch.channels_last)
            self._vae.to(memory_format=torch.channels_last)
        # Embedding arithmetic stays in float32: the normaliser divides by small standard deviations.
        self._normalizer = load_network(
            StableUnCLIPImageNormalizer, folder, "image_normalizer", torch.float32, torch.device("cpu")
        )
        noising = read_scheduler(folder, NOISING_FIELDS, "image_noising_scheduler")
        self._noising = build_scheduler(DDPMScheduler, folder, noising, "image_noising_scheduler")
        self._ddim = DDIM(trailing_scheduler(folder, config.zero_terminal_snr))
        self._text = empty_prompt(folder, self._dtype, device)
        self._scale = 2 ** (len(self._vae.config["block_out_channels"]) - 1)
        native = int(self._unet.config["sample_size"]) * self._scale
        self._native_size = config.image_size or native
        fingerprint = fingerprint_model(
            folder,
            [*self._encoder.files(), *_files(folder, config.tiny_vae)],
            SAMPLER_VERSION,
            config.dtype,
            f"zero_snr={config.zero_terminal_snr}",
            *decoder,
            *self._encoder.facts(),
            *self._ddim.facts,
            *(["compiled"] if config.compile else []),
        )
        self.spec = GeneratorSpec(
            name=config.name,
            model=config.model,
            fingerprint=fingerprint.digest,
            former=fingerprint.former,
            embedding_dim=width,
            image_size=config.output_size or self._native_size,
            licence=licence_of(folder, "see the model's page (Stable Diffusion 2.1: CreativeML OpenRAIL++-M)"),
            settings={name: str(getattr(config, name)) for name in SETTINGS},
            defaults={
                "num_inference_steps": config.num_inference_steps,
                "guidance_scale": config.guidance_scale,
                "guidance_start": config.guidance_start,
                "guidance_end": config.guidance_end,
                "noise_level": config.noise_level,
                "image_size": self._native_size,
                "output_size": config.output_size or self._native_size,
            },
        )
        try:
            self.check(self.spec.defaults)
        except RequestRefusedError as error:
            raise GeneratorError(f"generator {config.model}: {error}") from None
        self.spec = replace(self.spec, tflops=self._tflops(self.spec.defaults))
        if config.compile:  # in place; batches are padded to few sizes, each of which is compiled once
            self._unet.compile(dynamic=False)
            self._vae.decoder.compile(dynamic=False)

    def preprocess(self, image: UInt8Array) -> UInt8Array:
        """Brings uint8 [3, H, W] of any size to the image encoder's input uint8 [3, S, S], see `Preprocessing`."""
        return self._encoder.preprocess(image)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embeds uint8 [B, 3, S, S] (0..255); returns float32 [B, embedding_dim], as the encoder makes them, CPU."""
        return self._encoder.embed(images)

    def conditioner_fingerprint(self) -> bytes:
        """Returns 16 bytes that name the image encoder and its preprocessing alone."""
        return self._encoder.fingerprint().digest

    def former_conditioner_fingerprint(self) -> bytes:
        """Returns the 16 bytes that the image encoder had when every file of its folder counted."""
        return self._encoder.fingerprint().former()

    def release_conditioner(self) -> None:
        """Frees the image encoder's memory; it is loaded again when it is needed."""
        self._encoder.release()

    def check(self, parameters: Parameters) -> None:
        """Raises RequestRefusedError for steps, guidance, noise level or sizes outside what the model can do."""
        levels = int(self._noising.config["num_train_timesteps"])
        bounds = {
            "num_inference_steps": (1, min(1000, self._ddim.most_steps)),
            "guidance_scale": (0, 100),
            "guidance_start": (0, 1),
            "guidance_end": (0, 1),
            "noise_level": (0, levels - 1),
            "image_size": (self._scale, 2048),
            "output_size": (8, 2048),
        }
        check_bounds(parameters, bounds, self._scale)

    def batch_key(self, parameters: Parameters) -> tuple[object, ...]:
        """Steps and sizes must agree within a batch; rows without guidance go apart, since they cost one forward."""
        guided = parameters["guidance_scale"] > 1 and parameters["guidance_start"] < parameters["guidance_end"]
        return (parameters["num_inference_steps"], parameters["image_size"], parameters["output_size"], guided)

    def generate_exact(
        self,
        embeddings: torch.Tensor,
        seeds: Sequence[int],
        parameters: Sequence[Parameters],
        *,
        alive: Alive | None = None,
        sizes: Sequence[int] = (),
    ) -> torch.Tensor:
        """Does as `generate`, and at an equal batch size a row's bits depend on no other row, whatever its parameters.

        A step in which some rows are guided and some are not takes a forward of the batch more.
        """
        return self.generate(embeddings, seeds, parameters, alive=alive, sizes=sizes, exact=True)

    @torch.inference_mode()
    def generate(
        self,
        embeddings: torch.Tensor,
        seeds: Sequence[int],
        parameters: Sequence[Parameters],
        *,
        alive: Alive | None = None,
        sizes: Sequence[int] = (),
        exact: bool = False,
    ) -> torch.Tensor:
        """Makes one image a row; see `Generator.generate`, and `generate_exact` for `exact`."""
        latents, rows = self.sample(embeddings, seeds, parameters, alive=alive, sizes=sizes, exact=exact)
        made = decode(
            lambda part: self._vae.decode(part / self._vae.config["scaling_factor"], return_dict=False)[0],
            *(latents, int(parameters[0]["image_size"]), int(parameters[0]["output_size"])),
            whose=self.spec.title,
            dtype=self._dtype,
        )
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
        exact: bool = False,
    ) -> tuple[torch.Tensor, list[int]]:
        """Returns latents [b, C, h, w] before decoding, and the row that each belongs to; see `generate`."""
        shared = parameters[0]
        side = int(shared["image_size"]) // self._scale
        channels = int(self._unet.config["in_channels"])
        # The order is the stock pipeline's: the embedding's noise first, then the latents, from one stream a row.
        embedding_noise, latents = row_noise(seeds, (embeddings.shape[1],), (channels, side, side))
        levels = torch.tensor([int(row["noise_level"]) for row in parameters])
        condition = self.noise_embeddings(embeddings.float(), embedding_noise, levels).to(self._device, self._dtype)
        x = latents.to(self._device, self._dtype)

        def advance(
            one: tuple[int, DDIMStep],
            x: torch.Tensor,
            condition: torch.Tensor,
            guidance: torch.Tensor,
            guided: torch.Tensor,
        ) -> torch.Tensor:
            number, step = one
            return self._ddim.step(step, x, predict(x, step.timestep, condition, guidance, guided[:, number]))

        predict = self._predict_exact if exact else self._predict
        state = [x, condition, guidance_column(parameters, x), _guided_steps(parameters)]
        steps = enumerate(self._ddim.steps(int(shared["num_inference_steps"])))
        return denoise(steps, state, advance, alive, sizes)

    def _tflops(self, parameters: Parameters) -> float:
        """Returns what a variant costs, see `GeneratorSpec.tflops`."""
        side, dtype = int(parameters["image_size"]) // self._scale, self._dtype
        latents = torch.zeros((1, int(self._unet.config["in_channels"]), side, side), device="meta", dtype=dtype)
        condition = torch.zeros((1, 2 * self.spec.embedding_dim), device="meta", dtype=dtype)
        time = torch.zeros((), device="meta")
        denoised = count_tflops(self._unet, latents, time, encoder_hidden_states=self._text, class_labels=condition)
        forwards = int(parameters["num_inference_steps"]) + int(_guided_steps([parameters]).sum())
        return denoised * forwards + count_tflops(self._vae.decoder, latents)

    def _predict(
        self, x: torch.Tensor, timestep: int, condition: torch.Tensor, guidance: torch.Tensor, guided: torch.Tensor
    ) -> torch.Tensor:
        """Returns the network's output [B, C, h, w], guided by `guidance` [B, 1, 1, 1] where `guided` [B] (CPU) says.

        A row that is not guided takes part in one forward, wherever the others are.
        """
        rows = guided.nonzero().flatten().tolist()
        if not rows:
            return self._forward(x, timestep, condition)
        if len(rows) == len(x):
            return self._guided(x, timestep, condition, guidance)
        if self._compiled:  # for the sizes of a batch and twice that, and not anew for every number of guided rows
            outputs = self._forward(torch.cat([x, x]), timestep, torch.cat([torch.zeros_like(condition), condition]))
            mask = guided.view(-1, 1, 1, 1).to(x.device)
            return torch.where(mask, guide(outputs, guidance), outputs.chunk(2)[1])
        # Rounded up to a power of two, so that few shapes are ever computed.
        extra = rows + rows[-1:] * (min(len(x), 1 << (len(rows) - 1).bit_length()) - len(rows))
        conditions = torch.cat([torch.zeros_like(condition[extra]), condition])
        outputs = self._forward(torch.cat([x[extra], x]), timestep, conditions)
        output = outputs[len(extra) :]
        output[rows] = guide(torch.cat([outputs[: len(rows)], output[rows]]), guidance[rows])
        return output

    def _predict_exact(
        self, x: torch.Tensor, timestep: int, condition: torch.Tensor, guidance: torch.Tensor, guided: torch.Tensor
    ) -> torch.Tensor:
        """Does as `_predict`, in batches of those shapes alone that rows have which are all guided, or all not."""
        if guided.all():
            return self._guided(x, timestep, condition, guidance)
        output = self._forward(x, timestep, condition)
        if not guided.any():
            return output
        mask = guided.view(-1, 1, 1, 1).to(x.device)
        return torch.where(mask, self._guided(x, timestep, condition, guidance), output)

    def _guided(self, x: torch.Tensor, timestep: int, condition: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        both = torch.cat([torch.zeros_like(condition), condition])
        return guide(self._forward(torch.cat([x, x]), timestep, both), guidance)

    def _forward(self, x: torch.Tensor, timestep: int, condition: torch.Tensor) -> torch.Tensor:
        text = self._text.expand(len(x), -1, -1)
        # A tensor, since a compiled network would be compiled anew for every number.
        time = torch.tensor(timestep, device=self._device)
        output: torch.Tensor = self._unet(
            x, time, encoder_hidden_states=text, class_labels=condition, return_dict=False
        )[0]
        return output

    def noise_embeddings(self, embeddings: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """Noises embeddings row by row and appends the sinusoidal embedding of the level.

        Args:
            embeddings, noise: float32 [B, D].
            levels: int64 [B], 0 to the noising schedule's length minus 1.

        Returns:
            float32 [B, 2 D]: what the UNet takes as class labels.
        """
        return noise_embeddings(self._normalizer, self._noising, embeddings, noise, levels)


def _guided_steps(parameters: Sequence[Parameters]) -> torch.Tensor:
    """Returns of every row and step whether it is guided, and so takes a second forward pass: bool [B, steps], CPU."""
    scale, start, end = (
        torch.tensor([[float(row[name])] for row in parameters], dtype=torch.float64)
        for name in ("guidance_scale", "guidance_start", "guidance_end")
    )
    count = int(parameters[0]["num_inference_steps"])
    part = torch.arange(count, dtype=torch.float64) / count
    return (scale > 1) & (start <= part) & (part < end)


def noise_embeddings(
    normalizer: StableUnCLIPImageNormalizer,
    noising: DDPMScheduler,
    embeddings: torch.Tensor,
    noise: torch.Tensor,
    levels: torch.Tensor,
) -> torch.Tensor:
    """See `StableUnCLIP.noise_embeddings`; shared with the trainer, so that training and sampling cannot differ."""
    noised = normalizer.unscale(noising.add_noise(normalizer.scale(embeddings), timesteps=levels, noise=noise))
    encoded = get_timestep_embedding(levels, embeddings.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
    return torch.cat([noised, encoded], dim=1)


def _files(folder: Path, tiny_vae: str | None) -> list[str]:
    """Returns what is loaded of a model's folder besides the image encoder; of a replaced autoencoder the config."""
    networks = ["unet", "image_normalizer", "text_encoder"]
    others = ["image_noising_scheduler", "scheduler", "tokenizer"]
    if tiny_vae is None:
        return pipeline_files(folder, [*networks, "vae"], others)
    return [*pipeline_files(folder, networks, others), "vae/config.json"]
