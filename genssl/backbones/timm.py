"""Backbones of timm, named `timm/<model>`; needs the extra genssl[timm]."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from genssl.backbones.configs import TimmConfig
from genssl.base.safetensors_file import read_tensors
from genssl.errors import ConfigError


def build_timm(config: TimmConfig) -> nn.Module:
    """Returns timm's model without its classifier; `feature_dim` is the width of its pooled features.

    Its weights come from torch's current random stream or from the config's file; timm's own downloads are never used.

    Raises:
        ConfigError: if timm is not installed, has no such model, or the file does not fit it.
    """
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise ConfigError([f"backbone.name: {config.name!r} needs timm; run `pip install 'genssl[timm]'`"]) from None
    name = config.name.removeprefix("timm/")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(repr(f'timm/{match}') for match in near)}?" if near else ""
        raise ConfigError([f"backbone.name: timm {timm.__version__} has no model {name!r}{hint}"])
    size = {} if config.image_size is None else {"img_size": config.image_size}
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **size)
    except TypeError as error:
        if not size:
            raise
        raise ConfigError([f"backbone.image_size: {config.name!r} takes images of any size; leave it out"]) from error
    except (RuntimeError, AssertionError) as error:
        raise ConfigError([f"backbone: timm cannot make {config.name!r}: {error}"]) from error
    if config.weights is not None:
        load_weights(model, config.weights, _classifier(model))
    # Some models widen their pooled features before the classifier; `num_features` is the width before that.
    model.feature_dim = int(getattr(model, "head_hidden_size", None) or model.num_features)  # type: ignore[arg-type,assignment]
    return model


def load_weights(model: nn.Module, path: Path, classifier: tuple[str, ...]) -> None:
    """Loads a state dict; weights of the classifier, which the model has not, are left out.

    Raises:
        ConfigError: if the file cannot be read or does not fit the model.
    """
    try:
        weights, _ = read_tensors(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError([f"backbone.weights: {path} cannot be read as a safetensors file ({error})"]) from None
    weights = {key: value for key, value in weights.items() if not key.startswith(classifier)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).split("\n")[1:]]
        raise ConfigError([f"backbone.weights: {path} does not fit the model: {' '.join(lines)[:400]}"]) from None


def _classifier(model: Any) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
