"""The files of a run directory. Everything is written beside its place and moved there whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from genssl.base.safetensors_file import write_tensors
from genssl.config.recipe import Recipe
from genssl.generators.conditioner import FORMAT


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path and moves the result to `path`; a crash leaves the old file or none."""
    partial = path.with_name(f".{path.name}.part")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON (which is YAML too)."""
    write_atomically(
        path, lambda partial: partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n") and None
    )


def save_encoder(path: Path, backbone: nn.Module, recipe: Recipe) -> None:
    """Writes the backbone's weights with the config that rebuilds it in the metadata."""
    metadata = {"backbone": recipe.backbone.model_dump_json(), "recipe": recipe.name, "format": FORMAT}
    write_atomically(path, lambda partial: write_tensors(partial, backbone.state_dict(), metadata))
