"""DINO (Caron et al. 2021, arXiv 2104.14294).

Deviations from the official code: what is evaluated is the student, the backbone that a run saves, where the paper
takes the teacher. The teacher's temperature rises and the prototypes are released by the part of the
training that is done instead of by epochs; centre and teacher change after the optimiser's step. No drop path, no
schedule of the weight decay: those are the backbone's and the optimiser's.

Generated views: the student's output for them against the teacher's for the first view; the teacher sees none.
`pair_weights` apply to all terms but theirs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from genssl.base.gather import mean_over_ranks
from genssl.methods.base import MethodBase, StepOutput, Views, forward_views
from genssl.methods.configs import DINOConfig
from genssl.methods.losses import dino
from genssl.methods.parts import cosine_momentum, follow, momentum_copy


class DINOHead(nn.Module):
    """Three layers to a bottleneck of unit length, then its cosines with prototypes; no batch norm (section 3.2)."""

    trained: torch.Tensor

    def __init__(self, feature_dim: int, config: DINOConfig) -> None:
        super().__init__()
        hidden = config.projector_hidden_dim
        self.mlp = nn.Sequential(
            nn.Linear(feature_dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, config.bottleneck_dim),
        )
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # Only directions count: the official code's weight norm with its gain fixed at 1.
        self.prototypes = nn.Parameter(torch.randn(config.num_prototypes, config.bottleneck_dim))
        self.register_buffer("trained", torch.tensor(float(config.freeze_prototypes == 0)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns logits float [B, num_prototypes] in [-1, 1]."""
        # While `trained` is 0 the gradient is 0 rather than absent: DDP waits for every parameter's, and weight decay,
        # which goes on, changes lengths alone.
        fixed = self.prototypes.detach()
        prototypes = fixed + self.trained * (self.prototypes - fixed)
        return F.linear(F.normalize(self.mlp(features), dim=1), F.normalize(prototypes, dim=1))


class DINO(MethodBase[DINOConfig]):
    """A student matches the distribution that a centred, sharpened momentum teacher gives to another view.

    Args:
        config: head sizes, temperatures, momenta.
        backbone: maps float [B, 3, S, S] to float [B, feature_dim] and has the attribute `feature_dim`; with
            multi-crop it must accept the crops' size too.
    """

    Config = DINOConfig
    centre: torch.Tensor
    teacher_temperature: torch.Tensor

    def __init__(self, config: DINOConfig, backbone: nn.Module) -> None:
        super().__init__(config, backbone)
        self.head = DINOHead(self.feature_dim, config)
        self.teacher_backbone = momentum_copy(backbone)
        self.teacher_head = momentum_copy(self.head)
        self.register_buffer("centre", torch.zeros(config.num_prototypes))
        self.register_buffer("teacher_temperature", torch.tensor(self._temperature(0.0)))
        self._new_means: list[torch.Tensor] = []  # of the steps since the last `after_step`

    def step(self, views: Views) -> StepOutput:
        """Returns the mean cross entropy over all pairs of a teacher's view and another view of the student."""
        statistics, num_generated = self.config.batch_statistics, len(views.generated)
        whole = forward_views(self._student, (*views.pair, *views.generated), statistics)
        # Views of one size share a forward, as in the official code.
        small = forward_views(self._student, views.crops, statistics) if views.crops else []
        with torch.no_grad():
            teacher = forward_views(self._teacher, views.pair, statistics)
        self._new_means.append(mean_over_ranks(torch.stack(teacher).to(self.centre.dtype).mean(dim=(0, 1))))

        def cross_entropy(target: int, student: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
            temperatures = (self.teacher_temperature, self.config.student_temperature)
            return dino(teacher[target], student, self.centre, *temperatures, weights)

        pairs = [(0, whole[1]), (1, whole[0]), *((target, crop) for target in (0, 1) for crop in small)]
        loss = torch.stack([cross_entropy(target, student, views.pair_weights) for target, student in pairs]).mean()
        if not num_generated:
            return StepOutput(loss=loss)
        extra = torch.stack([cross_entropy(0, student, None) for student in whole[2:]]).mean()
        metrics = {"loss_pair": loss.item(), "loss_generated": extra.item()}
        return StepOutput(loss=loss + self.config.generated_weight * extra, metrics=metrics)

    def after_step(self, done: float) -> None:
        """Moves the teacher and the centre (equation 4), and sets what depends on the part of the training."""
        config = self.config
        momentum = cosine_momentum(config.momentum_start, config.momentum_end, done)
        follow(self.teacher_backbone, self.backbone, momentum)
        self.head.trained.fill_(float(done >= config.freeze_prototypes))
        follow(self.teacher_head, self.head, momentum)
        for mean in self._new_means:
            self.centre.lerp_(mean, 1 - config.centre_momentum)
        self._new_means.clear()
        self.teacher_temperature.fill_(self._temperature(done))

    def _student(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.backbone(images))
        return logits

    def _teacher(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.teacher_head(self.teacher_backbone(images))
        return logits

    def _temperature(self, done: float) -> float:
        start, end = self.config.teacher_temperature_start, self.config.teacher_temperature
        return start + (end - start) * _part(done, self.config.teacher_warmup)


def _part(done: float, of: float) -> float:
    return 1.0 if done >= of else done / of
