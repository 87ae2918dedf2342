"""`genssl convert-weights`"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class PreprocessChoice(StrEnum):
    """How sources are shown to the feature extractor."""

    train = "train"
    colab = "colab"
    raw = "raw"


def convert_weights(
    checkpoint: Annotated[Path, typer.Argument(metavar="PTH", help="An official IC-GAN G_ema_best*.pth.")],
    features: Annotated[
        Path, typer.Option(help="Its ResNet-50: SwAV's .pth.tar, or torchvision's for class-conditional models.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    preprocess: Annotated[
        PreprocessChoice,
        typer.Option(help="How the ResNet sees a source: as in training, in the notebook, or raw."),
    ] = PreprocessChoice.train,
) -> None:
    """Convert official IC-GAN weights that you have downloaded (CC BY-NC 4.0) into a generator folder.

    \b
    genssl convert-weights G_ema_best0.pth \\
        --features swav_800ep_pretrain.pth.tar --out icgan-256
    genssl run simclr_icgan generator.model=icgan-256
    """
    from genssl.config.load import require_no_document

    for path in (checkpoint, features):
        require_no_document(path, "a checkpoint of PyTorch")

    from genssl.generators.icgan.convert import LICENCE, describe
    from genssl.generators.icgan.convert import convert_weights as convert

    architecture = convert(checkpoint, features, out, preprocess.value)
    print(f"{checkpoint.name}: {describe(architecture)}; licence of the weights: {LICENCE}")
    print(f"{out}: written; use it with generator.name=icgan generator.model={out}")
