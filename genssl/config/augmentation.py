"""Standard SSL augmentations as settings, and the presets of the field. Imports no torch."""

from __future__ import annotations

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
