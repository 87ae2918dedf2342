"""Loads the generator that a block describes, with what it says of parameters that vary."""

from __future__ import annotations

from dataclasses import replace

import torch

from genssl.config.base import ComponentConfig
from genssl.errors import GeneratorError, RequestRefusedError
from genssl.generators.base import Generator
from genssl.generators.configs import GeneratorConfig
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
    if config.interpolation is not None:
        generator = Interpolated(generator, config.interpolation, device)
    if added := varying_parameters(config):
        generator.spec = replace(generator.spec, defaults=generator.spec.defaults | added)
        try:
            complete(generator, added)
        except RequestRefusedError as error:
            raise GeneratorError(f"generator {generator.spec.model}: {error}") from None
    return generator
