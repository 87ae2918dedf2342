"""The Inception network of Frechet inception distances (Heusel et al. 2017, arXiv 1706.08500), by torch-fidelity.

Its features are those of the original TensorFlow network; torchvision's and timm's Inception give other distances.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genssl.encoders.foreign import EncoderError, read_checkpoint

NAME = "inception-v3"
INSTALL = "pip install 'genssl[metrics]'"
FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
FEATURES = "2048"  # of the last pooling


class Inception(nn.Module):
    """Maps images float [B, 3, S, S] in [0, 1] to features float [B, 2048].

    Images are rounded to grey levels and resized to 299 pixels by TensorFlow 1's rule, as for published distances.

    Args:
        extractor: torch-fidelity's.
    """

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """See the class."""
        grey_levels = (images * 255).round().clamp(0, 255).to(torch.uint8)
        features: torch.Tensor = self.extractor(grey_levels)[0]
        return features


def cached_file() -> Path:
    """Returns where the weights are looked for: torch's hub folder."""
    return Path(torch.hub.get_dir()) / "checkpoints" / FILE


def load_inception(file: Path) -> Inception:
    """Loads the network.

    Args:
        file: torch-fidelity's weights.

    Raises:
        EncoderError: if torch-fidelity is missing, or the file is absent, holds code, or is of another network.
    """
    try:
        module: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError:
        raise EncoderError(f"{NAME}: torch-fidelity is not installed; run `{INSTALL}`") from None
    if not file.is_file():
        raise EncoderError(f"{NAME}: the weights are not in {file}; put {URL} there, or fetch them by --download")
    tensors, _ = read_checkpoint(file)
    # torch-fidelity unpickles whatever its file holds, so it gets one that holds these tensors and nothing else.
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder) / FILE
        torch.save(tensors, clean)
        try:
            extractor = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", [FEATURES], feature_extractor_weights_path=str(clean)
            )
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            raise EncoderError(f"{file}: is not torch-fidelity's Inception ({reason}); get {URL}") from None
    return Inception(extractor)
