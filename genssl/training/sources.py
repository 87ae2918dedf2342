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
from genssl.serving.token_file import read_token_file
from genssl.variants.engine import VariantEngine
from genssl.variants.in_process import InProcessSource
from genssl.variants.ledger import Ledger
from genssl.variants.pool import VariantPool
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
        threads=server_threads(recipe),
        buckets=recipe.variants.buckets,
        batching=recipe.variants.batching,
        generators=[recipe.generator],
    )
    with EmbeddedServer(file, log_path) as server:
        yield server


def server_threads(recipe: Recipe) -> int:
    """Returns how many torch threads an embedded server uses: half the cores, since the trainer works beside it.

    Under `batching: deterministic` it is the trainer's number, where the recipe has one: sums of floating-point numbers
    depend on how many threads share them, and in-process generation uses the trainer's.
    """
    if recipe.variants.batching == "deterministic" and recipe.train.threads != "auto":
        return recipe.train.threads
    return max(1, usable_cores() // 2)


@contextmanager
def open_source(
    recipe: Recipe,
    dataset: ImageDataset,
    ledger: Ledger,
    device: torch.device,
    server: EmbeddedServer | None,
    folder: Path | None = None,
) -> Iterator[OpenSource | None]:
    """Yields the recipe's variant source, or None if no view of it is a variant.

    Args:
        recipe: says which.
        dataset: has the sources.
        ledger: gets the counts.
        device: of in-process generation.
        server: the run's own, if it has one.
        folder: for what `late: reuse` keeps on disk while the source is open; None if no step is to be taken.

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
            remote = _open_remote(recipe, dataset, ledger, server, _open_pool(recipe, folder))
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
                {"address": "embedded", "pid": server.pid}
                if server
                else {"address": ", ".join(recipe.variants.targets)}
            )
        yield OpenSource(source, provenance)


def _open_remote(
    recipe: Recipe, dataset: ImageDataset, ledger: Ledger, server: EmbeddedServer | None, pool: VariantPool | None
) -> RemoteSource:
    assert recipe.generator is not None
    variants = recipe.variants
    if server is not None:
        server.wait_until_bound()
    return RemoteSource(
        targets=[server.address] if server else variants.targets,
        generator_id=generator_id(recipe.generator),
        parameters=_parameters(recipe, server),
        dataset=dataset,
        # A replay waits for exactly the variants that its log names.
        config=variants.model_copy(update={"late": "block"}) if variants.replay is not None else variants,
        ledger=ledger,
        pool=pool,
        token=read_token_file(variants.token_file, "variants.token_file")
        if server is None and variants.token_file is not None
        else None,
        tls=variants.tls if server is None else None,
        check=server.check if server else lambda: None,
    )


def _open_pool(recipe: Recipe, folder: Path | None) -> VariantPool | None:
    """Opens the pool of `late: reuse`, whose file in the run directory has no name and goes with the process."""
    variants = recipe.variants
    if variants.late != "reuse" or variants.replay is not None or folder is None:
        return None
    return VariantPool(
        folder,
        max_bytes=variants.pool_bytes,
        max_reuse=variants.max_reuse,
        max_age_steps=variants.max_age_steps,
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
            f"the server at {', '.join(recipe.variants.targets)} has another generator under the id "
            f"{info.generator_id!r}: {said}. "
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
