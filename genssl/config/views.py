"""The views section of a recipe: which views are variants, and how views are augmented. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from genssl.config.augmentation import AugmentationConfig, PairAugmentationConfig, Probability, Range
from genssl.config.base import Section

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
