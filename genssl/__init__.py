"""genssl: generative augmentation for self-supervised learning, online and offline."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = ["AsyncVariantClient", "GenerativeViews", "VariantClient", "__version__"]

if TYPE_CHECKING:
    from genssl.client.aio import AsyncVariantClient
    from genssl.client.blocking import VariantClient
    from genssl.views.dataset import GenerativeViews

# Imported when first asked for: `import genssl` itself must stay light, and the clients need no torch.
_PLACES = {
    "AsyncVariantClient": "genssl.client.aio",
    "VariantClient": "genssl.client.blocking",
    "GenerativeViews": "genssl.views.dataset",
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'genssl' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
