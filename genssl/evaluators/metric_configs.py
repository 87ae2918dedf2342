"""Settings of the evaluators that judge variants against real images. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from genssl.config.base import ComponentConfig


class VariantMetricConfig(ComponentConfig):
    """Which images are drawn, of which variants are made."""

    split: Literal["train", "test"] = "test"
    images: int = Field(2000, ge=2, description="sources, drawn at random; all if there are fewer")
    seed: int = Field(0, ge=0, description="of the draw")


class FrechetConfig(VariantMetricConfig):
    """Frechet distance in the encoder's features (Heusel et al. 2017, arXiv 1706.08500)."""

    name: Literal["frechet"] = "frechet"
    images: int = Field(
        10_000, ge=2, description="variants, and as many other real images; half of the split if there are fewer"
    )
    variant_index: int = Field(0, ge=0, description="which variant of every source")


class PRDCConfig(VariantMetricConfig):
    """Precision, recall, density and coverage in the encoder's features (Naeem et al. 2020, arXiv 2002.09797)."""

    name: Literal["prdc"] = "prdc"
    images: int = Field(
        2000, ge=2, description="variants, and as many other real images; half of the split if there are fewer"
    )
    k: int = Field(5, ge=1, description="which nearest neighbour is the radius of a ball")
    variant_index: int = Field(0, ge=0, description="which variant of every source")


class VendiConfig(VariantMetricConfig):
    """Vendi score: the effective number of different images (Friedman and Dieng 2023, arXiv 2210.02410)."""

    name: Literal["vendi"] = "vendi"
    variants: int = Field(4, ge=2, description="of every source")
    order: float = Field(
        1.0, gt=0, description="q of the Renyi entropy; 1 is Shannon's, large q sees common modes only"
    )

    @model_validator(mode="after")
    def _as_many_real_images_as_variants(self) -> Self:
        if self.images < self.variants:
            raise ValueError(
                f"images is {self.images} but variants is {self.variants}; the variants of a source are compared with "
                "as many real images, so raise images or lower variants"
            )
        return self


class LPIPSDiversityConfig(VariantMetricConfig):
    """Mean perceptual distance (LPIPS, Zhang et al. 2018, arXiv 1801.03924) between variants of a source."""

    name: Literal["lpips_diversity"] = "lpips_diversity"
    images: int = Field(200, ge=2, description="sources, drawn at random; all if there are fewer")
    variants: int = Field(10, ge=2, description="of every source; StarGAN v2 (arXiv 1912.01865) takes 10")
    weights: Path | None = Field(
        None, description="torchvision's AlexNet weights; by default where torch.hub keeps them on this machine"
    )


class SemanticConsistencyConfig(VariantMetricConfig):
    """Whether variants stay what their source is: cosine, retrieval of the source, label agreement."""

    name: Literal["semantic_consistency"] = "semantic_consistency"
    variants: int = Field(4, ge=1, description="of every source")
    k: int = Field(20, ge=1, description="neighbours that vote on a variant's label")
    temperature: float = Field(0.07, gt=0, description="of the votes")
