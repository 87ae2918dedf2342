"""Loads the generator that a block describes, with what it says of parameters that vary."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from genssl.config.base import ComponentConfig
from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.base import Generator
from genssl.generators.configs import GeneratorConfig
from genssl.generators.embedding_cache import open_embeddings
from genssl.generators.interpolation import Interpolated
from genssl.generators.variation import complete, varying_parameters
from genssl.registry import GENERATORS


def open_generator(config: ComponentConfig, device: torch.device) -> Generator:
    """Returns the generator of a recipe's or a server's block.

    Raises:
        GeneratorError: if it cannot be had, or cannot do what the block asks for.
    """
    generator: Generator = GENERATORS.get(config.name)(config, device)
    if not isinstance(config, GeneratorConfig):  # a plug-in's own
        return generator
    conditioner = generator
    if config.interpolation is not None:
        generator = Interpolated(generator, config.interpolation, device)
    if added := varying_parameters(config):
        generator.spec = replace(generator.spec, defaults=generator.spec.defaults | added)
        try:
            complete(generator, added)
        except RequestRefusedError as error:
            raise GeneratorError(f"generator {generator.spec.model}: {error}") from None
    if config.embedding_cache is not None:
        _keep_embeddings(generator, conditioner, config.embedding_cache)
    return generator


def _keep_embeddings(generator: Generator, conditioner: Generator, folder: str) -> None:
    """Lays a folder under the embeddings of `generator`, which embeds by `conditioner`."""
    # A plug-in that does not name its conditioner shares embeddings with nobody else.
    name = getattr(conditioner, "conditioner_fingerprint", lambda: conditioner.spec.fingerprint)()
    # The engine keeps what tells the foreground of a source beside its embedding.
    width = generator.spec.embedding_dim + hasattr(generator, "embed_with_foreground")
    generator.kept_embeddings = open_embeddings(folder, name, width)  # type: ignore[attr-defined]
    if generator is not conditioner and hasattr(conditioner, "release_conditioner"):
        generator.release_conditioner = conditioner.release_conditioner  # type: ignore[attr-defined]
    # Rounding changes variants by a little, so they have names of their own.
    fingerprint = hashlib.blake2b(generator.spec.fingerprint + b"embeddings=float16", digest_size=16).digest()
    settings = generator.spec.settings | {"embeddings": "float16"}
    generator.spec = replace(generator.spec, fingerprint=fingerprint, settings=settings)
