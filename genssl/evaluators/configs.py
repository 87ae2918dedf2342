"""Settings of the evaluators that judge a representation. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from genssl.config.base import ComponentConfig
from genssl.config.views import AugmentationConfig

# Crop and flip, as linear evaluation and fine-tuning are done in the field (Chen et al. 2020, SimCLR, appendix B.6).
CROP_AND_FLIP = AugmentationConfig.model_validate({"preset": "crop_only", "flip_probability": 0.5})
PositiveRate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]
GRIDS: dict[str, list[float]] = {
    "sgd": [0.001, 0.003, 0.01, 0.03, 0.1, 0.3],
    "lars": [0.03, 0.1, 0.3, 1.0, 3.0],
}
TRUST_COEFFICIENT = 0.02
ONLY_TRAINED = (
    "learning_rates",
    "weight_decays",
    "trust_coefficient",
    "features",
    "epochs",
    "batch_size",
    "augmentation",
)


class KNNConfig(ComponentConfig):
    """Weighted k-nearest-neighbour vote (Wu et al. 2018, arXiv 1805.01978, section 3.4)."""

    name: Literal["knn"] = "knn"
    k: int = Field(20, ge=1)
    temperature: float = Field(0.07, gt=0)


class LinearProbeConfig(ComponentConfig):
    """Multinomial logistic regression on standardised frozen features; a held-out part of train chooses its settings.

    By L-BFGS the candidates are penalties. By SGD or LARS they are all pairs of a learning rate and a weight decay, as
    many heads that are trained on the same batches in one pass; the features are computed once, or, with
    `features: augmented`, anew from a crop of the image for every batch.
    """

    name: Literal["linear_probe"] = "linear_probe"
    optimizer: Literal["lbfgs", "sgd", "lars"] = "lbfgs"
    penalties: list[float] = Field(
        [0.001, 0.01, 0.1, 1.0, 10.0], min_length=1, description="candidate inverse penalties C of lbfgs"
    )
    learning_rates: list[PositiveRate] | None = Field(
        None, min_length=1, description=f"candidates; by default {GRIDS['sgd']} for sgd, {GRIDS['lars']} for lars"
    )
    weight_decays: list[Decay] = Field([0.0, 1e-4, 1e-2], min_length=1, description="candidates of sgd and lars")
    trust_coefficient: float = Field(
        TRUST_COEFFICIENT, gt=0, description="of lars; the paper's code (solo-learn) has 0.001"
    )
    features: Literal["precomputed", "augmented"] = "precomputed"
    epochs: int = Field(100, ge=1, description="of sgd and lars")
    batch_size: int = Field(256, ge=2, description="of sgd and lars")
    augmentation: AugmentationConfig = Field(CROP_AND_FLIP, description="of `features: augmented`")
    held_out: float = Field(0.2, gt=0, lt=1, description="part of train that chooses among them")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> Self:
        fields = type(self).model_fields
        if self.optimizer == "lbfgs":
            idle = [name for name in ONLY_TRAINED if getattr(self, name) != fields[name].default]
            if idle:
                raise ValueError(
                    f"{', '.join(idle)} has no effect with lbfgs; set optimizer: sgd or lars, or remove it"
                )
        elif self.penalties != fields["penalties"].default:
            raise ValueError(f"penalties has no effect with {self.optimizer}; set weight_decays, or optimizer: lbfgs")
        elif self.optimizer == "sgd" and self.trust_coefficient != TRUST_COEFFICIENT:
            raise ValueError("trust_coefficient has no effect with sgd; set optimizer: lars, or remove it")
        elif self.features == "precomputed" and self.augmentation != CROP_AND_FLIP:
            raise ValueError("augmentation has no effect on precomputed features; set features: augmented")
        return self

    def rates(self) -> list[float]:
        """Returns the candidate learning rates of sgd or lars."""
        return self.learning_rates or GRIDS[self.optimizer]


class FewShotConfig(ComponentConfig):
    """Logistic regression on a few labelled images a class, over many draws of them."""

    name: Literal["few_shot"] = "few_shot"
    labels_per_class: int = Field(5, ge=1)
    draws: int = Field(20, ge=2)
    penalty: float = Field(1.0, gt=0, description="inverse penalty C; fixed, since nothing is left to choose it on")
    seed: int = Field(0, ge=0)


class FinetuneConfig(ComponentConfig):
    """Trains a copy of the encoder and a linear head on labels, all of them or a fraction."""

    name: Literal["finetune"] = "finetune"
    label_fraction: float = Field(1.0, gt=0, le=1, description="of every class, at least one image; usual: 0.01, 0.1")
    epochs: int = Field(30, ge=1)
    min_steps: int = Field(300, ge=1, description="more epochs are taken where few labels make fewer steps")
    batch_size: int = Field(128, ge=2)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    encoder_lr: float = Field(0.01, ge=0, description="0 trains the head alone")
    head_lr: float = Field(0.1, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    augmentation: AugmentationConfig = CROP_AND_FLIP
    seed: int = Field(0, ge=0)


class RobustnessConfig(ComponentConfig):
    """Accuracy under the fifteen common corruptions of ImageNet-C at five severities (arXiv 1903.12261)."""

    name: Literal["robustness"] = "robustness"
    images: int = Field(1000, ge=1, description="test images, drawn at random, that are corrupted in all 75 ways")
    penalties: list[float] = Field(
        [0.001, 0.01, 0.1, 1.0, 10.0], min_length=1, description="candidate inverse penalties C of the linear probe"
    )
    held_out: float = Field(0.2, gt=0, lt=1, description="part of train that chooses among them")
    seed: int = Field(0, ge=0)


class RankMeConfig(ComponentConfig):
    """Effective rank of the representation (Garrido et al. 2023, arXiv 2210.02885); needs no labels."""

    name: Literal["rankme"] = "rankme"
    images: int = Field(25600, ge=2, description="train images, drawn at random; the paper's number")
    seed: int = Field(0, ge=0)


class AlignmentUniformityConfig(ComponentConfig):
    """Alignment and uniformity on the unit sphere (Wang and Isola 2020, arXiv 2005.10242); needs no labels."""

    name: Literal["alignment_uniformity"] = "alignment_uniformity"
    images: int = Field(1024, ge=2, description="images, drawn at random; with a generator, as many variants are made")
    split: Literal["train", "test"] = "test"
    alpha: float = Field(2.0, gt=0, description="power of the distance of a pair")
    t: float = Field(2.0, gt=0, description="of the Gaussian kernel of uniformity")
    augmentation: AugmentationConfig = Field(AugmentationConfig(), description="of both views; by default SimCLR's")
    variant_index: int = Field(0, ge=0, description="which variant of every image")
    seed: int = Field(0, ge=0)


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
