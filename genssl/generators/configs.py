"""Settings of the generators. Imports no torch."""

from __future__ import annotations

import typing
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from genssl.config.base import ComponentConfig, Section
from genssl.generators.models import foreign_data, trained_on
from genssl.generators.retrieval.configs import BankConfig, Encoder, InterpolationConfig

ADAPTIVE = "adaptive"
ADAPTS = "noise_level"  # the parameter that has a rule for `adaptive`
SIZES = ("image_size", "output_size")  # a run's variants have one size
SPLITTING = ("num_inference_steps", "best_of")  # a batch has one value of these: they multiply what it costs


class DriftGuardConfig(Section):
    """A variant that is too unlike its source is drawn anew."""

    min_similarity: float = Field(
        ge=-1, le=1, description="cosine of the conditioner's embeddings of variant and source, at least"
    )
    max_tries: int = Field(4, ge=1, le=64, description="draws of a variant; if none passes, the most similar stays")


class GeneratorConfig(ComponentConfig):
    """What every generator has: an id under which a server offers it, and parameters that vary between variants.

    Any numeric parameter may be a range, `guidance_scale: [2, 8]`, of which every variant draws its own value, and
    `noise_level: adaptive` follows from the source. Both are short for an entry of `varying`.
    """

    id: str | None = Field(None, pattern=r"^[\w.-]+$", description="name on the server; by default the registry name")
    embedding_cache: str | None = Field(
        None,
        min_length=1,
        description="folder in which embeddings of sources are kept as float16, for all runs and servers of this "
        "machine; variants are then of rounded embeddings",
    )
    varying: dict[str, tuple[float, float] | Literal["adaptive"]] | None = Field(
        None, description="parameters that are [low, high], drawn by the variant's seed, or adaptive, by the source"
    )
    drift_guard: DriftGuardConfig | None = None
    interpolation: InterpolationConfig | None = Field(
        None, description="variants of embeddings between the source's and a neighbour's in a bank of images"
    )

    @model_validator(mode="before")
    @classmethod
    def _move_what_varies(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("varying") or {}, dict):
            return data
        plain, varying = dict(data), dict(data.get("varying") or {})
        for name, value in data.items():
            if name == ADAPTS and value == ADAPTIVE:
                plain[name], varying[name] = 0, ADAPTIVE
            elif name in _numeric(cls) and name not in SIZES and _is_range(value):
                plain[name], varying[name] = value[0], tuple(value)
        # A range in `varying` alone also gives the value that stands where one is wanted.
        for name, value in varying.items():
            if name in _numeric(cls) and (_is_range(value) or value == ADAPTIVE):
                first = 0 if value == ADAPTIVE else value[0]
                if plain.setdefault(name, first) != first:
                    raise ValueError(f"{name} is {plain[name]} and varying.{name} is {value}; give one of the two")
        return plain | {"varying": varying} if varying else plain

    @field_validator("*", mode="before")
    @classmethod
    def _explain_ranges(cls, value: Any, info: Any) -> Any:
        if info.field_name in _numeric(cls) and isinstance(value, list | tuple):
            if info.field_name in SIZES:
                raise ValueError("the variants of a run have one size; give one number")
            raise ValueError("a number is expected, or a range [low, high] with low < high, both whole for a count")
        return value

    @model_validator(mode="after")
    def _ranges_fit(self) -> GeneratorConfig:
        for name, value in (self.varying or {}).items():
            if value == ADAPTIVE:
                if name != ADAPTS or name not in type(self).model_fields:
                    raise ValueError(f"varying.{name}: only noise_level can be adaptive, where a generator has it")
                continue
            if name not in _numeric(type(self)) or name in SIZES:
                allowed = ", ".join(name for name in _numeric(type(self)) if name not in SIZES)
                raise ValueError(f"varying.{name}: is not a number that can vary; there are {allowed}")
            if not _is_range(value):
                raise ValueError(f"varying.{name}: a range [low, high] with low < high is expected")
            given = {key: getattr(self, key) for key in self.model_fields_set if key not in ("varying", name)}
            for end in value:
                whole = int(end) if float(end).is_integer() else end
                try:
                    type(self).model_validate(given | {name: whole})
                except ValidationError as error:
                    raise ValueError(f"{name}: {end:g}: {error.errors()[0]['msg'].lower()}") from None
        return self

    def unsuited_to(self, dataset: str) -> str | None:
        """Warns of a built-in model that was trained on another data set."""
        model = getattr(self, "model", "")
        if trained_on(model) in (None, dataset):
            return None
        return f"generator.model: {foreign_data(model, f'dataset.name is {dataset}')}"

    def warnings(self) -> list[str]:
        """Warns of what varies although variants that differ in it cannot share a batch."""
        return [
            f"{name} varies between variants, and only those of one value can share a batch: there will be more and "
            "smaller batches; give one number where speed counts"
            for name in self.varying or {}
            if name in SPLITTING
        ]


def _numeric(model: type[ComponentConfig]) -> list[str]:
    """Returns the fields of a generator's own that are numbers."""
    return [
        name
        for name, field in model.model_fields.items()
        if {int, float} & {field.annotation, *typing.get_args(field.annotation)}
    ]


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(end, int | float) and not isinstance(end, bool) for end in value)
        and value[0] < value[1]
    )


# Fields that a preset fills in where the block does not give them. No revision is pinned: give the commit that you use.
UNCLIP_PRESETS: dict[str, dict[str, Any]] = {
    # The paper's generator (arXiv 2403.05966, released code): OpenAI's CLIP ViT-L/14, 768 pixels shrunk to 224. Its
    # half precision overflows in Stable Diffusion 2, which bfloat16 does not.
    "unclip-paper": {
        "model": "sd2-community/stable-diffusion-2-1-unclip-small",
        "num_inference_steps": 10,
        "guidance_scale": 10.0,
        "noise_level": 0,
        "image_size": 768,
        "output_size": 224,
        "preprocess": "paper",
        "dtype": "bfloat16",
    },
    # The larger model, OpenCLIP's ViT-H/14, with GenView's 20 steps: made at the model's own 768 pixels, kept at 512.
    "unclip": {
        "model": "sd2-community/stable-diffusion-2-1-unclip",
        "num_inference_steps": 20,
        "guidance_scale": 10.0,
        "noise_level": 0,
        "image_size": 768,
        "output_size": 512,
        "dtype": "bfloat16",
    },
}


class StableUnCLIPConfig(GeneratorConfig):
    """Stable Diffusion unCLIP.

    Defaults are the paper's sampler: DDIM, 10 steps, trailing, zero-SNR, eta 0, guidance 10, noise level 0.
    """

    name: Literal["stable_unclip"] = "stable_unclip"
    preset: Literal["unclip-paper", "unclip"] | None = Field(
        None,
        description="where the settings that are not given come from; unclip-paper: the paper's model, 768 pixels "
        "shrunk to 224; unclip: the ViT-H model, 20 steps, 768 pixels shrunk to 512",
    )
    model: str = Field(min_length=1, description="builtin:NAME, a diffusers folder, or a hub id")
    revision: str | None = Field(None, description="commit of a hub model; pin it")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the weights; on a GPU bfloat16, since float16 overflows in Stable Diffusion 2"
    )
    tiny_vae: str | None = Field(
        None,
        min_length=1,
        description="folder or hub id of an AutoencoderTiny that decodes in the place of the model's",
    )
    compile: bool = Field(False, description="torch.compile denoiser and decoder; the first batch of each size is slow")
    num_inference_steps: int = Field(10, ge=1, le=1000)
    guidance_scale: float = Field(10.0, ge=0, le=100, description="1 or less: no guidance, and half the cost")
    guidance_start: float = Field(
        0.0, ge=0, le=1, description="part of the steps, noise first, before which there is no guidance"
    )
    guidance_end: float = Field(
        1.0, ge=0, le=1, description="part of the steps after which there is none; a step without costs half"
    )
    noise_level: int = Field(
        0, ge=0, le=999, description="noise on the image embedding; more means more diverse and less like the source"
    )
    preprocess: Literal["clip", "paper", "square"] | None = Field(
        None,
        description="how a CLIP is shown a source; clip, the default: resized, then the centre cut out, as the stock "
        "pipeline does; paper: cut out, then resized bilinear, as the paper's script; square: cut out, then resized "
        "bicubic, the default of models that genssl trained, and what it once did for all",
    )
    zero_terminal_snr: bool = Field(True, description="start from pure noise; false for models that predict epsilon")
    image_size: int | None = Field(
        None, ge=8, le=2048, description="pixels of the generated square; by default the model's native size"
    )
    output_size: int | None = Field(
        None, ge=8, le=2048, description="generated images are shrunk to this many pixels; by default not at all"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, data: Any) -> Any:
        name = data.get("preset") if isinstance(data, dict) else None
        return {**UNCLIP_PRESETS[name], **data} if name in UNCLIP_PRESETS else data

    @field_validator("guidance_end")
    @classmethod
    def _in_order(cls, value: float, info: ValidationInfo) -> float:
        if value < info.data.get("guidance_start", 0.0):
            raise ValueError(f"guidance_end is {value:g}, before guidance_start {info.data['guidance_start']:g}")
        return value

    def warnings(self) -> list[str]:
        """Warns also of a precision that Stable Diffusion 2 does not bear."""
        if self.dtype != "float16":
            return super().warnings()
        return [
            *super().warnings(),
            "dtype: float16 overflows in Stable Diffusion 2, which ends the run; set it to bfloat16, or to float32 "
            "where the GPU has none",
        ]


class FlowConfig(GeneratorConfig):
    """A rectified flow on self-supervised features, as `genssl train-generator` makes it."""

    name: Literal["flow"] = "flow"
    model: str = Field(min_length=1, description="builtin:NAME, or a folder that `genssl train-generator` wrote")
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_inference_steps: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="Euler steps, by default 4, or those that the model was distilled to; fewer are faster and less "
        "diverse",
    )
    guidance_scale: float = Field(1.0, ge=0, le=100, description="1 or less: no guidance, and half the cost")
    embedding_noise: float = Field(
        0.0, ge=0, le=10, description="noise on the embedding; more means more diverse and less like the source"
    )


class ICGANConfig(GeneratorConfig):
    """An instance-conditioned GAN: one forward pass an image.

    Truncation 0.7 is the setting of the paper that genssl follows (GenerativeSSL).
    """

    name: Literal["icgan"] = "icgan"
    model: str = Field(
        min_length=1,
        description="builtin:NAME, or a folder that `genssl train-generator` or `genssl convert-weights` wrote",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    truncation: float = Field(
        0.7, ge=0, le=4, description="noise stays within twice this; more means more diverse and less like the source"
    )
    best_of: int = Field(
        1, ge=1, le=64, description="this many tries an image, of which the one nearest to the source is kept"
    )
    class_id: int | None = Field(None, ge=0, description="class of a class-conditional model; by default 0")
    preprocess: Literal["train", "colab", "raw"] | None = Field(
        None, description="how official models see a source; by default as convert-weights was told"
    )
    output_size: int | None = Field(
        None, ge=8, le=2048, description="generated images are resized to this many pixels; by default not at all"
    )


class RetrievalConfig(GeneratorConfig):
    """Nearest neighbours in a bank of images in place of generated variants."""

    name: Literal["retrieval"] = "retrieval"
    bank: BankConfig
    encoder: Encoder = Field(
        description="what sees the images: a run directory, an encoder.safetensors, a generator (builtin:NAME or its "
        "folder), or a backbone's block"
    )
    encoder_size: int | None = Field(
        None,
        ge=8,
        le=2048,
        description="pixels that the encoder is shown; by default what its file says, or the bank's",
    )
    neighbours: int = Field(10, ge=1, le=1000, description="the nearest images, of which each variant draws one")
    output_size: int | None = Field(
        None, ge=8, le=2048, description="pixels of a variant; by default those of the bank's images"
    )
