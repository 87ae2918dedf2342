"""`genssl export`"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """What an encoder can be written as."""

    torchvision = "torchvision"
    timm = "timm"
    safetensors = "safetensors"
    onnx = "onnx"


def export(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run directory, or a .safetensors file of genssl.", show_default=False),
    ],
    to: Annotated[Format, typer.Option(help="The format.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.", show_default=False)],
) -> None:
    """Write the encoder of a run for other libraries; what is read back must give the same features.

    \b
    genssl export runs/baseline-1 --to torchvision --out resnet18.pth
    genssl export runs/baseline-1 --to onnx --out encoder.onnx  # by genssl[onnx]
    """
    import torch

    from genssl.encoders.export import export_encoder
    from genssl.encoders.load import load_encoder

    exported = export_encoder(load_encoder(run.rstrip("/"), torch.device("cpu")), to.value, out)
    print(f"{out}: written; features read back differ by {exported.difference:.1e} of the largest\n\n{exported.usage}")
