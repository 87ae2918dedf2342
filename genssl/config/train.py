"""The recipe's sections `train` and `monitor`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from genssl.config.base import Section


class TrainConfig(Section):
    """Length, batch and device of a run, how it computes, and what it saves."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=2, description="images in an optimiser step, over all ranks and micro-batches")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: Literal["auto"] | Annotated[int, Field(ge=1)] = Field("auto", description="torch threads of the trainer")
    workers: int = Field(
        0, ge=0, le=256, description="processes that decode images, for data sets of large files; 0: threads do it"
    )
    validation_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="above 0: this part of the train split is held out and evaluated instead of the test split",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the forward pass (autocast); weights stay fp32, and fp16 scales its gradients"
    )
    accumulate: int = Field(
        1,
        ge=1,
        description="micro-batches an optimiser step; each has a loss of its own, so a contrastive loss has only the "
        "micro-batch's negatives, and batch norm its statistics",
    )
    clip_grad_norm: float | None = Field(None, gt=0, description="gradients are scaled down to this norm")
    channels_last: bool = Field(False, description="memory order of images and convolutions; faster with tensor cores")
    compile: bool = Field(False, description="torch.compile the backbone; the first step takes a minute")
    checkpoint_every_epochs: int = Field(1, ge=1)
    checkpoint_every_steps: int | None = Field(None, ge=1, description="besides those at the end of epochs")
    keep_checkpoints: int = Field(1, ge=1, description="how many of the latest stay; the best one stays as well")
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="besides metrics.jsonl and metrics.csv, which are always written"
    )

    @field_validator("accumulate")
    @classmethod
    def _parts_of_equal_size(cls, value: int, info: ValidationInfo) -> int:
        batch_size = info.data.get("batch_size")
        if batch_size is not None and (batch_size % value or batch_size // value < 2):
            raise ValueError(
                f"train.batch_size {batch_size} does not divide into {value} micro-batches of equal size and at least "
                "2 images"
            )
        return value


class MonitorConfig(Section):
    """What is measured of the representation while the training goes on; the test split is never used.

    Images are from the held-out part of train if there is one (train.validation_fraction), else from train itself; the
    bank is from train, without them.
    """

    images: int = Field(256, ge=8, description="on which spread and effective rank are measured after every epoch")
    knn_every_epochs: int | None = Field(
        None, ge=1, description="every so many epochs the images are classified by their neighbours in the bank"
    )
    bank: int = Field(2048, ge=8, description="labelled images of train that are neighbours, at most")
    queries: int = Field(512, ge=8, description="labelled images that are classified, at most")
    k: int = Field(20, ge=1)
    temperature: float = Field(0.07, gt=0)
