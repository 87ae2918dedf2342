"""Settings of the methods. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from genssl.config.base import ComponentConfig

BatchStatistics = Literal["shared", "per_view"]


class MethodConfig(ComponentConfig):
    """What the methods have in common."""

    generated_weight: float = Field(
        1.0, gt=0, description="views.policy: third: weight of the loss between the first view and the generated ones"
    )
    batch_statistics: BatchStatistics = Field(
        "shared",
        description="batch norm sees, per_view: each view by itself; shared: all views of a batch, real and generated "
        "ones, together. The default is what the method's official code does",
    )

    @property
    def depends_on_length(self) -> bool:
        """Whether a step depends on which part of the training is done; if so, a run cannot be lengthened."""
        return False


class SimCLRConfig(MethodConfig):
    """SimCLR; the projector is a two-layer MLP (Chen et al. 2020, section 4.2)."""

    name: Literal["simclr"] = "simclr"
    projector_hidden_dim: int = Field(2048, ge=1)
    projector_output_dim: int = Field(128, ge=1)
    temperature: float = Field(0.2, gt=0)
    multi_positive: bool = Field(
        False,
        description="views.policy: third: all views of a source are each other's positives (StableRep), generated ones "
        "with generated_weight; false: the generated views add a loss of their own",
    )


class SimSiamConfig(MethodConfig):
    """SimSiam; sizes are the paper's (Chen and He 2021, section 3)."""

    name: Literal["simsiam"] = "simsiam"
    projector_layers: Literal[2, 3] = Field(3, description="the paper has 2 for CIFAR-10 (appendix D)")
    projector_hidden_dim: int = Field(2048, ge=1)
    projector_output_dim: int = Field(2048, ge=1)
    predictor_hidden_dim: int = Field(512, ge=1, description="a bottleneck: a quarter of projector_output_dim")
    batch_statistics: BatchStatistics = "per_view"


class MomentumConfig(MethodConfig):
    """A method with a momentum network, whose momentum rises by half a cosine."""

    momentum_start: float = Field(0.99, ge=0, le=1)
    momentum_end: float = Field(1.0, ge=0, le=1)

    @property
    def depends_on_length(self) -> bool:
        """Whether the momentum rises."""
        return self.momentum_start != self.momentum_end


class BYOLConfig(MomentumConfig):
    """BYOL; sizes are the paper's (Grill et al. 2020, section 3.3), whose momentum_start is 0.996 for 1,000 epochs."""

    name: Literal["byol"] = "byol"
    projector_hidden_dim: int = Field(4096, ge=1)
    projector_output_dim: int = Field(256, ge=1)
    predictor_hidden_dim: int = Field(4096, ge=1)
    batch_statistics: BatchStatistics = "per_view"


class BarlowTwinsConfig(MethodConfig):
    """Barlow Twins; sizes are the paper's (Zbontar et al. 2021, section 2.2)."""

    name: Literal["barlow_twins"] = "barlow_twins"
    projector_hidden_dim: int = Field(8192, ge=1)
    projector_output_dim: int = Field(8192, ge=2)
    off_diagonal_weight: float = Field(0.0051, ge=0, description="the paper's lambda")
    loss_scale: float = Field(1.0, gt=0, description="a factor of the whole loss; solo-learn's scale_loss")
    batch_statistics: BatchStatistics = "per_view"


class MoCoConfig(MomentumConfig):
    """MoCo v2+: MoCo v2 with a symmetric loss, as in solo-learn."""

    name: Literal["moco"] = "moco"
    projector_hidden_dim: int = Field(2048, ge=1)
    projector_output_dim: int = Field(128, ge=1)
    temperature: float = Field(0.2, gt=0)
    queue_size: int = Field(65536, ge=1, description="negatives; any number, also one that no batch divides")
    momentum_end: float = Field(0.999, ge=0, le=1)
    batch_statistics: BatchStatistics = "per_view"


class VICRegConfig(MethodConfig):
    """VICReg; sizes and weights are the paper's (Bardes et al. 2022, section 4.2)."""

    name: Literal["vicreg"] = "vicreg"
    projector_hidden_dim: int = Field(8192, ge=1)
    projector_output_dim: int = Field(8192, ge=2)
    invariance_weight: float = Field(25.0, ge=0, description="the paper's lambda")
    variance_weight: float = Field(25.0, ge=0, description="the paper's mu; solo-learn's 25 is 50 here")
    covariance_weight: float = Field(1.0, ge=0, description="the paper's nu")
    batch_statistics: BatchStatistics = "per_view"


class NNCLRConfig(MethodConfig):
    """NNCLR; sizes are the paper's (Dwibedi et al. 2021, section 4.1)."""

    name: Literal["nnclr"] = "nnclr"
    projector_hidden_dim: int = Field(2048, ge=1)
    projector_output_dim: int = Field(256, ge=1)
    predictor_hidden_dim: int = Field(4096, ge=1)
    temperature: float = Field(0.1, gt=0)
    queue_size: int = Field(98304, ge=1, description="embeddings among which neighbours are looked for")


class DINOConfig(MomentumConfig):
    """DINO; sizes are the paper's (Caron et al. 2021, section 3.2 and appendix C)."""

    name: Literal["dino"] = "dino"
    projector_hidden_dim: int = Field(2048, ge=1)
    bottleneck_dim: int = Field(256, ge=1)
    num_prototypes: int = Field(65536, ge=2, description="size of the distribution, the paper's K")
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature_start: float = Field(0.04, gt=0)
    teacher_temperature: float = Field(0.07, gt=0, description="after the warm-up")
    teacher_warmup: float = Field(0.1, ge=0, le=1, description="part of the training; the paper's 30 of 300 epochs")
    freeze_prototypes: float = Field(
        0.01, ge=0, le=1, description="part of the training in which the prototypes stay; the paper's first epoch"
    )
    centre_momentum: float = Field(0.9, ge=0, lt=1)
    momentum_start: float = Field(0.996, ge=0, le=1)

    @property
    def depends_on_length(self) -> bool:
        """Whether the momentum rises, the teacher warms up, or the prototypes stay for a while."""
        return super().depends_on_length or self.teacher_warmup > 0 or self.freeze_prototypes > 0
