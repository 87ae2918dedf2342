"""Loads the generator that a block describes, with what it says of parameters that vary."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from dataclasses import replace

import torch

from genssl.config.base import ComponentConfig
from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.base import EmbedsForeground, Generator, HasConditionerFingerprint, ReleasesConditioner
from genssl.generators.configs import GeneratorConfig
from genssl.generators.embedding_cache import kept_conditioner, open_embeddings
from genssl.generators.retrieval.interpolation import Interpolated
from genssl.generators.variation import complete, varying_parameters
from genssl.registry import GENERATORS

log = logging.getLogger(__name__)


def open_generator(config: ComponentConfig, device: torch.device, known: Collection[str] = ()) -> Generator:
    """Returns the generator of a recipe's or a server's block.

    One that a store or a run knows by its former fingerprint goes by that, so that variants keep their names and
    seeds, and what is stored is found. That says no less of its files, so other files are never taken for it.

    Args:
        config: the block.
        device: where it runs.
        known: fingerprints, in hexadecimal, of variants that it is used beside: stored ones, or of a run that goes on.

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
    spec = generator.spec
    if known and spec.fingerprint.hex() not in known and spec.former and (former := spec.former()).hex() in known:
        generator.spec = replace(spec, fingerprint=former)
        log.info("%s goes by its former fingerprint %s, as the variants that there are", spec.model, former.hex())
    return generator


def _keep_embeddings(generator: Generator, conditioner: Generator, folder: str) -> None:
    """Lays a folder under the embeddings of `generator`, which embeds by `conditioner`."""
    # A plug-in that does not name its conditioner shares embeddings with nobody else.
    if isinstance(conditioner, HasConditionerFingerprint):
        name = conditioner.conditioner_fingerprint()
        former = getattr(conditioner, "former_conditioner_fingerprint", None)
    else:
        name, former = conditioner.spec.fingerprint, conditioner.spec.former
    kept = kept_conditioner(folder)
    if former is not None and kept not in (None, name) and kept == former():
        name = kept
    # The engine keeps what tells the foreground of a source beside its embedding.
    width = generator.spec.embedding_dim + isinstance(generator, EmbedsForeground)
    generator.kept_embeddings = open_embeddings(folder, name, width)  # type: ignore[attr-defined]
    if generator is not conditioner and isinstance(conditioner, ReleasesConditioner):
        generator.release_conditioner = conditioner.release_conditioner  # type: ignore[attr-defined]
    # Rounding changes variants by a little, so they have names of their own.
    generator.spec = generator.spec.derived(
        lambda name: hashlib.blake2b(name + b"embeddings=float16", digest_size=16).digest(),
        settings=generator.spec.settings | {"embeddings": "float16"},
    )
