"""Opens the variant source that a recipe asks for, and closes it, with its server, on every way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genssl.config.recipe import Recipe
from genssl.config.server import ServerFile, generator_id
from genssl.data.base import ImageDataset
from genssl.errors import RequestRefusedError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generators.base import Parameters
from genssl.registry import GENERATORS
from genssl.runtime import usable_cores
from genssl.serving.embedded import EmbeddedServer
from genssl.serving.remote import RemoteSource
from genssl.variants.engine import VariantEngine
from genssl.variants.in_process import InProcessSource
from genssl.variants.ledger import Ledger
from genssl.variants.source import VariantSource


@dataclass
class OpenSource:
    """A variant source ready for use, and what results.json says of it."""

    source: VariantSource
    provenance: dict[str, Any]


@contextmanager
def start_server(recipe: Recipe, log_path: Path) -> Iterator[EmbeddedServer | None]:
    """Starts the embedded server if the recipe wants one; it loads while the caller prepares the training."""
    if not recipe.uses_variants() or recipe.variants.source != "online" or recipe.variants.server != "embedded":
        yield None
        return
    assert recipe.generator is not None
    file = ServerFile(
        device=recipe.train.device,
        threads=server_threads(),
        buckets=recipe.variants.buckets,
        batching=recipe.variants.batching,
        generators=[recipe.generator],
    )
    with EmbeddedServer(file, log_path) as server:
        yield server


def server_threads() -> int:
    """Returns how many cores an embedded server may use: half, since the trainer works beside it."""
    return max(1, usable_cores() // 2)


@contextmanager
def open_source(
    recipe: Recipe, dataset: ImageDataset, ledger: Ledger, device: torch.device, server: EmbeddedServer | None
) -> Iterator[OpenSource | None]:
    """Yields the recipe's variant source, or None if no view of it is a variant.

    Raises:
        ServerUnavailableError, RequestRefusedError, GeneratorError: if there are no variants to be had.
    """
    if not recipe.uses_variants():
        yield None
        return
    assert recipe.generator is not None
    with ExitStack() as stack:
        if recipe.variants.source == "in_process":
            engine = VariantEngine(
                GENERATORS.get(recipe.generator.name)(recipe.generator, device),
                recipe.variants.buckets,
                deterministic=recipe.variants.batching == "deterministic",
            )
            source: VariantSource = InProcessSource(engine, dataset, ledger)
            stack.callback(source.close)
            spec = engine.generator.spec
            provenance: dict[str, Any] = {
                "source": "in_process",
                "model": spec.model,
                "fingerprint": spec.fingerprint.hex(),
                "licence": spec.licence,
            }
            provenance["parameters"] = dict(spec.defaults)
        else:
            remote = _open_remote(recipe, dataset, ledger, server)
            source = remote
            info = remote.generator
            assert info is not None
            stack.callback(source.close)
            if server is None:
                _check_same_model(recipe, info)
            provenance = {
                "source": "online",
                "model": info.model,
                "fingerprint": info.fingerprint.hex(),
                "licence": info.licence,
            }
            provenance["parameters"] = dict(info.default_parameters) | _parameters(recipe, server)
            provenance["server"] = (
                {"address": "embedded", "pid": server.pid} if server else {"address": recipe.variants.server}
            )
        yield OpenSource(source, provenance)


def _open_remote(recipe: Recipe, dataset: ImageDataset, ledger: Ledger, server: EmbeddedServer | None) -> RemoteSource:
    assert recipe.generator is not None
    if server is not None:
        server.wait_until_bound()
    return RemoteSource(
        address=server.address if server else recipe.variants.targets[0],
        generator_id=generator_id(recipe.generator),
        parameters=_parameters(recipe, server),
        dataset=dataset,
        config=recipe.variants,
        ledger=ledger,
        check=server.check if server else lambda: None,
    )


def _check_same_model(recipe: Recipe, info: pb.GeneratorInfo) -> None:
    """Refuses a server whose generator is another than the recipe's: the run would not be what its recipe says."""
    assert recipe.generator is not None
    served = {"name": info.name, "model": info.model, **info.settings}
    asked = {key: str(getattr(recipe.generator, key, value)) for key, value in served.items()}
    differing = [key for key in served if served[key] != asked[key]]
    if differing:
        said = ", ".join(f"{key} {served[key]} (the recipe: {asked[key]})" for key in differing)
        raise RequestRefusedError(
            f"the server at {recipe.variants.server} has another generator under the id {info.generator_id!r}: {said}. "
            "Make generator.* and the server's file agree, or name another of its generators with generator.id"
        )


def _parameters(recipe: Recipe, server: EmbeddedServer | None) -> Parameters:
    """Returns a request's parameters: none to the embedded server, which has the recipe's block itself."""
    if server is not None or recipe.generator is None:
        return {}
    given = recipe.generator.model_dump(exclude_none=True)
    return {
        key: value for key, value in given.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
