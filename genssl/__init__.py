"""genssl: generative augmentation for self-supervised learning, online and offline.

What stands in `__all__` is the public surface, with what the registries' classes are made of (`genssl.methods.base`,
`genssl.generators.base`, `genssl.evaluators.base`, `genssl.data.base`). Everything else may change between versions.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

__all__ = [
    "BACKBONES",
    "DATASETS",
    "EVALUATORS",
    "GENERATORS",
    "METHODS",
    "AsyncVariantClient",
    "ComponentConfig",
    "GenerativeViews",
    "Recipe",
    "UserError",
    "VariantClient",
    "__version__",
    "compare",
    "load",
    "load_encoder",
    "load_study",
    "run",
]

if TYPE_CHECKING:
    from genssl.client.aio import AsyncVariantClient
    from genssl.client.blocking import VariantClient
    from genssl.config.base import ComponentConfig
    from genssl.config.load import load, load_study
    from genssl.config.recipe import Recipe
    from genssl.encoders.load import load_encoder
    from genssl.errors import UserError
    from genssl.registry import BACKBONES, DATASETS, EVALUATORS, GENERATORS, METHODS
    from genssl.studies.compare import compare
    from genssl.training.run import run
    from genssl.views.dataset import GenerativeViews

# Imported when first asked for: `import genssl` itself must stay light, and the clients need no torch.
_PLACES = {
    "BACKBONES": "genssl.registry",
    "DATASETS": "genssl.registry",
    "EVALUATORS": "genssl.registry",
    "GENERATORS": "genssl.registry",
    "METHODS": "genssl.registry",
    "AsyncVariantClient": "genssl.client.aio",
    "ComponentConfig": "genssl.config.base",
    "GenerativeViews": "genssl.views.dataset",
    "Recipe": "genssl.config.recipe",
    "UserError": "genssl.errors",
    "VariantClient": "genssl.client.blocking",
    "compare": "genssl.studies.compare",
    "load": "genssl.config.load",
    "load_encoder": "genssl.encoders.load",
    "load_study": "genssl.config.load",
    "run": "genssl.training.run",
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'genssl' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
