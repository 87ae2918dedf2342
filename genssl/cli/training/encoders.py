"""Encoders that a command line names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from genssl.encoders.load import LoadedEncoder


def load_encoders(names: Sequence[str], device: torch.device, console: Console, **settings: Any) -> list[LoadedEncoder]:
    """Loads encoders, and says of which the weights are random, and what of a checkpoint was assumed.

    Args:
        names: as `genssl.encoders.load.load_encoder` takes them.
        device: where they are put.
        console: where it is said.
        settings: of `load_encoder`.
    """
    from genssl.config.load import require_no_document

    for name in names:
        require_no_document(Path(name), "an encoder")

    from genssl.encoders.load import load_encoder, told_of

    loaded = [load_encoder(name, device, **settings) for name in names]
    for encoder in loaded:
        if encoder.source["kind"] in ("torchvision", "timm") and encoder.source["weights"] is None:
            said = f"{encoder.name}: has random weights; name some with {encoder.name}:WEIGHTS"
            console.print(said, style="yellow", markup=False, soft_wrap=True)
        if (told := told_of(encoder)) is not None:
            console.print(told, style="dim", markup=False, soft_wrap=True)
    return loaded
