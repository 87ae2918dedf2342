"""The views section of a recipe: which views are variants, and how views are augmented. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from genssl.config.base import Section

Probability = Annotated[float, Field(ge=0, le=1)]
Range = tuple[float, float]
PresetName = Literal["simclr", "moco", "byol", "barlow_twins", "dino", "weak", "crop_only", "none"]

_STILL: dict[str, Any] = {
    "flip_probability": 0.0,
    "jitter_probability": 0.0,
    "grayscale_probability": 0.0,
    "blur_probability": 0.0,
}
_ASYMMETRIC: dict[str, Any] = {
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "blur_probability": 1.0,
    "second": {"blur_probability": 0.1, "solarize_probability": 0.2},
}

# Fields that differ from AugmentationConfig's defaults; `second` has those in which view 2 differs from view 1.
PRESETS: dict[str, dict[str, Any]] = {
    # Chen et al. 2020 (SimCLR), appendix A, colour strength 1.
    "simclr": {},
    # Chen et al. 2020 (MoCo v2), with the hue and the sigma of its released code.
    "moco": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    # Grill et al. 2020 (BYOL), table 6; Zbontar et al. 2021 (Barlow Twins), section 3.1, takes the same.
    "byol": _ASYMMETRIC,
    "barlow_twins": _ASYMMETRIC,
    # Caron et al. 2021 (DINO): BYOL's, for crops of at least 0.4 of the image; small ones are `views.crops`.
    "dino": {**_ASYMMETRIC, "crop_scale": (0.4, 1.0)},
    # Wang et al. 2024 (AdaInf): milder crops, rarer and weaker jitter, for training on many generated images.
    "weak": {
        "crop_scale": (0.2, 1.0),
        "jitter_probability": 0.4,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.1,
    },
    # The paper's table 3: "generative + random crop", and "only generative".
    "crop_only": _STILL,
    "none": {**_STILL, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)},
}


class AugmentationConfig(Section):
    """Standard SSL augmentations of one view; every parameter is drawn per sample.

    Defaults are SimCLR's (Chen et al. 2020, appendix A) at colour strength 1. A probability of 0 switches one off.
    In place of the mapping, the name of a preset may stand alone: `augmentation: moco`.
    """

    preset: PresetName | None = Field(None, description="where the settings that are not given come from")
    crop_scale: Range = Field((0.08, 1.0), description="area of the crop as a fraction of the image")
    crop_ratio: Range = Field((3 / 4, 4 / 3), description="aspect ratio of the crop")
    flip_probability: Probability = 0.5
    jitter_probability: Probability = 0.8
    brightness: float = Field(0.8, ge=0, description="factor drawn from [max(0, 1 - x), 1 + x]")
    contrast: float = Field(0.8, ge=0)
    saturation: float = Field(0.8, ge=0)
    hue: float = Field(0.2, ge=0, le=0.5, description="shift drawn from [-x, x] of the colour circle")
    grayscale_probability: Probability = 0.2
    blur_probability: Probability = 0.5
    blur_sigma: Range = Field((0.1, 2.0), description="standard deviation of the Gaussian in pixels")
    solarize_probability: Probability = 0.0
    solarize_threshold: Probability = Field(0.5, description="values from here up to 1 are inverted")

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, data: Any) -> Any:
        if isinstance(data, AugmentationConfig):
            return data if isinstance(data, cls) else data.model_dump()
        if isinstance(data, str):
            data = {"preset": data}
        name = data.get("preset") if isinstance(data, dict) else None
        if not isinstance(name, str) or name not in PRESETS:
            return data
        preset = PRESETS[name]
        if "second" in preset and "second" not in cls.model_fields:
            raise ValueError(f"the preset {name!r} makes two different views, and here is one; write out its settings")
        merged = {**preset, **data}
        if isinstance(given := data.get("second"), dict) and "preset" not in given:
            merged["second"] = {**preset.get("second", {}), **given}
        return merged

    @field_validator("crop_scale", "crop_ratio", "blur_sigma")
    @classmethod
    def _positive_and_ordered(cls, value: Range) -> Range:
        if not 0 < value[0] <= value[1]:
            raise ValueError("two numbers are expected, low first, both above 0")
        return value

    @field_validator("crop_scale")
    @classmethod
    def _at_most_the_image(cls, value: Range) -> Range:
        if value[1] > 1:
            raise ValueError("a crop cannot be larger than the image; the upper bound is 1.0")
        return value

    def settings(self) -> dict[str, Any]:
        """Returns what is done to a view, wherever the settings came from; equal settings, equal views."""
        return {name: getattr(self, name) for name in AugmentationConfig.model_fields if name != "preset"}


class PairAugmentationConfig(AugmentationConfig):
    """Standard SSL augmentations of both views of a pair."""

    second: AugmentationConfig | None = Field(
        None, description="view 2's, where it differs from view 1: a preset, or the settings that differ"
    )

    @field_validator("second", mode="before")
    @classmethod
    def _as_the_first(cls, value: Any, info: ValidationInfo) -> Any:
        """Takes what is not given from view 1, unless a preset is named."""
        if not isinstance(value, dict) or value.get("preset") is not None:
            return value
        # A field of view 1 that is wrong is not in info.data: it is reported once, and not again for view 2.
        first = {name: setting for name, setting in info.data.items() if name != "preset"}
        return {**first, **value}

    def of_view(self, view: int) -> AugmentationConfig:
        """Returns the settings of view `view` (from 0); further views are made as the second."""
        return self if view == 0 or self.second is None else self.second


Policy = Literal["second", "both", "third", "added", "none"]


class CropsConfig(Section):
    """Multi-crop: further, small views of the real image (Caron et al. 2020, SwAV; 2021, DINO).

    Under policy `added` they are of the image that the pair shows.
    """

    count: int = Field(6, ge=1, le=64)
    size: int = Field(ge=4, description="side of a small view in pixels; DINO: 96 beside views of 224")
    scale: Range = Field((0.05, 0.4), description="area of the crop as a fraction of the image, for crop_scale")
    augmentation: AugmentationConfig | None = Field(
        None, description="by default that of view 1; DINO's is {preset: moco, saturation: 0.2}"
    )

    @field_validator("scale")
    @classmethod
    def _part_of_the_image(cls, value: Range) -> Range:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError("two numbers above 0 and at most 1 are expected, low first")
        return value


class PairWeightsConfig(Section):
    """GenView's quality-driven weights of pairs (Li et al. 2024, arXiv 2403.12003), from a frozen encoder's maps."""

    encoder: Path = Field(description="run directory whose encoder.safetensors judges the pairs; a ResNet's")
    gamma: float = Field(1.0, gt=0, description="how much the quality of a pair matters")


class ViewsConfig(Section):
    """Which views are variants (the paper's figure 4), and how views are augmented.

    Policies:
        second: view 2 may be a variant, view 1 is real (the paper).
        both: each view of the pair may be one, independently.
        third: both views of the pair are real; `third_count` further views may be variants, each by itself.
        added: generated images are added to the data set (AdaInf, Wang et al. 2024): both views of a pair show one
            image, real or generated, as `real_weight` says.
        none: no view is a variant.
    """

    policy: Policy = Field(
        "second",
        description="second: view 2 may be a variant, view 1 is real; both: each view may, independently; third: "
        "views beside a real pair may; added: a pair shows one image, real or generated; none",
    )
    probability: Probability = Field(1.0, description="that such a view is a variant; not for `added`")
    third_count: int = Field(1, ge=1, le=16, description="policy third: views beside the pair")
    real_weight: float = Field(
        10.0,
        gt=0,
        description="policy added: how often an epoch visits a real image for one visit of each of its "
        "variants.per_image variants (fresh counts as one); AdaInf's 10, there beside 20 generated images per real one",
    )
    augmentation: PairAugmentationConfig = Field(
        PairAugmentationConfig(), description="a preset, or settings, which may begin with `preset: NAME`"
    )
    generated_augmentation: PairAugmentationConfig | None = Field(
        None, description="of the views that are variants; by default that of real views (table 3 of the paper)"
    )
    crops: CropsConfig | None = None
    pair_weights: PairWeightsConfig | None = None

    @property
    def variant_slots(self) -> int:
        """How many variants of an image a step may want."""
        return {"none": 0, "second": 1, "both": 2, "third": self.third_count, "added": 1}[self.policy]

    def of_no_effect(self) -> list[str]:
        """Returns a warning for each setting that the policy does not look at."""
        found = []
        if self.policy != "third" and self.third_count != 1:
            found.append(f"views.third_count has no effect: views.policy is {self.policy}")
        if self.policy != "added" and self.real_weight != 10.0:
            found.append(f"views.real_weight has no effect: views.policy is {self.policy}")
        if self.policy == "added" and self.probability != 1.0:
            found.append("views.probability has no effect: with views.policy added, views.real_weight takes its place")
        return found
