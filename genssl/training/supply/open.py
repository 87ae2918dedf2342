"""Opens the variant source that a recipe asks for, and closes it, with its server, on every way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genssl.client.messages import Priority, read_token_file
from genssl.client.source import RemoteSource
from genssl.config.recipe import Recipe
from genssl.config.server import generator_id
from genssl.data.base import ImageDataset
from genssl.data.load import dataset_digest
from genssl.errors import RequestRefusedError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generators.configs import GeneratorConfig
from genssl.generators.models import shown, small_variants
from genssl.generators.parameters import Parameters
from genssl.generators.variation import varying_parameters
from genssl.server.process import EmbeddedServer
from genssl.training.supply.stores import (
    dataset_block,
    generator_block,
    pregenerate_command,
    refuse_foreign,
    require_planned,
    store_provenance,
)
from genssl.variants.in_process import InProcessSource, load_engine
from genssl.variants.ledger import Ledger
from genssl.variants.plan import ViewPlan
from genssl.variants.prefetch.lateness import VariantLimit
from genssl.variants.prefetch.pool import MOST_PER_SOURCE, VariantPool
from genssl.variants.replay import Replay
from genssl.variants.source import VariantRequest, VariantSource
from genssl.variants.store.facts import GeneratorFacts, describe_contents, find_generator
from genssl.variants.store.manifest import StoreError, read_manifest
from genssl.variants.store.record import Encoding
from genssl.variants.store.source import StoredSource, StoredVariants
from genssl.variants.store.store import VariantStore


@dataclass
class OpenSource:
    """A variant source ready for use.

    Attributes:
        source, remote: gives the variants; the same once more, if it asks servers.
        provenance: what results.json says of it.
        facts: of its generator.
        image_size: side of its variants in pixels; 0 if that is not known.
        stored: the store that it reads or fills, if there is one.
    """

    source: VariantSource
    provenance: dict[str, Any]
    facts: GeneratorFacts
    remote: RemoteSource | None = None
    image_size: int = 0
    stored: StoredVariants | None = None

    def smaller_than(self, views: int) -> str | None:
        """Says that the variants are smaller than views of so many pixels; None if they are not."""
        return small_variants(self.image_size, views) if self.image_size else None


@contextmanager
def open_source(
    recipe: Recipe,
    dataset: ImageDataset,
    ledger: Ledger,
    device: torch.device,
    server: EmbeddedServer | None,
    folder: Path | None = None,
    known: Sequence[str] = (),
) -> Iterator[OpenSource | None]:
    """Yields the recipe's variant source, or None if no view of it is a variant.

    Args:
        device: of in-process generation.
        server: the run's own, if it has one.
        folder: for what `late: reuse` keeps on disk while the source is open; None if no step is to be taken.
        known: fingerprints in hexadecimal, in place of those of the recipe's store; see `open_generator`.

    Raises:
        ServerUnavailableError, RequestRefusedError, GeneratorError, StoreError: if there are no variants to be had.
    """
    if not recipe.uses_variants():
        yield None
        return
    variants = recipe.variants
    with ExitStack() as stack:
        if variants.store is not None:
            refuse_foreign(variants.store, "variants.store")
        if variants.source == "stored" and variants.missing != "generate":
            opened = open_stored(recipe, dataset, lambda: open_in_process(recipe, dataset, ledger, device).facts)
        elif variants.source == "online":
            opened = open_remote(recipe, dataset, ledger, server, _open_pool(recipe, folder))
        else:
            opened = open_in_process(recipe, dataset, ledger, device, known)
            opened.provenance["source"] = variants.source
        stack.callback(lambda: opened.source.close())  # by then it may have a store before it
        if variants.store is not None and opened.stored is None:
            with_store(opened, recipe, dataset, variants.store)
        if variants.source == "stored":
            opened.provenance["missing"] = variants.missing
        yield opened


@contextmanager
def open_stored_source(
    recipe: Recipe, dataset: ImageDataset, plan: ViewPlan, ledger: Ledger, device: torch.device
) -> Iterator[OpenSource | None]:
    """Yields the open source of a recipe that reads a store, or None for any other recipe.

    Raises:
        StoreError: if there is no store, or it lacks variants of the plan that are neither made nor replaced.
    """
    if recipe.variants.source != "stored":
        yield None
        return
    with open_source(recipe, dataset, ledger, device, None) as opened:
        if recipe.variants.replay is None:
            require_stored(recipe, dataset, plan, opened)
        yield opened


def require_stored(recipe: Recipe, dataset: ImageDataset, plan: ViewPlan | Replay, opened: OpenSource | None) -> None:
    """Raises StoreError if every planned variant must be in the store and one is not."""
    variants = recipe.variants
    if variants.source == "stored" and variants.missing == "fail" and opened is not None:
        assert opened.stored is not None
        require_planned(opened.stored, plan, recipe.train.epochs, dataset, variants)


def with_store(
    opened: OpenSource,
    recipe: Recipe,
    dataset: ImageDataset,
    folder: Path,
    *,
    strict: bool = False,
    encoding: Encoding = "raw",
    variants: int = 0,
) -> StoredVariants:
    """Gives a source that is open a store, made if it is absent: inside its fetch, or before it.

    The manifest gets the generator, the recipe's block of it, and the data set with the number of `variants` of each
    image that are made in all, unless that is 0. For `strict` see `StoredVariants`.

    Raises:
        StoreError: if the store cannot be opened for this generator.
    """
    store = VariantStore(folder, fingerprint=opened.facts.fingerprint, encoding=encoding)
    try:
        described = {"name": dataset.name, "images": len(dataset)} | ({"variants": variants} if variants else {})
        blocks = generator_block(recipe), dataset_block(recipe)
        describe_contents(store, opened.facts, blocks[0], dataset_digest(dataset), described, blocks[1])
    except BaseException:
        store.close()
        raise
    stored = StoredVariants(store, opened.facts, strict=strict)
    if opened.remote is not None:
        opened.remote.with_store(stored)
    else:
        opened.source = StoredSource(stored, behind=opened.source)
    opened.stored = stored
    opened.provenance["store"] = store_provenance(stored.store)
    return stored


def open_stored(recipe: Recipe, dataset: ImageDataset, load: Callable[[], GeneratorFacts]) -> OpenSource:
    """Opens a store to be read alone; what it lacks is an error, or a real image if the recipe says so.

    The generator is loaded only if the store's manifest does not know what this recipe's block came to; what was used
    is told by its fingerprint in results.json.

    Raises:
        StoreError: if there is no store, or it is pinned to another generator.
    """
    variants = recipe.variants
    assert variants.store is not None
    if not variants.store.exists():
        made = pregenerate_command(variants)
        raise StoreError(f"variants.store: {variants.store} does not exist; make it: {made}")
    facts = find_generator(read_manifest(variants.store), generator_block(recipe)) or load()
    stored = StoredVariants(VariantStore(variants.store, readonly=True, fingerprint=facts.fingerprint), facts)
    try:
        (first,) = stored.read([VariantRequest(0, dataset.source_id(0), 0)])
        kept = store_provenance(stored.store)
    except BaseException:
        stored.close()
        raise
    return OpenSource(
        StoredSource(stored, missing="real" if variants.missing == "real" else "fail"),
        {"source": "stored", **_identity(facts), "missing": variants.missing, "store": kept},
        facts,
        image_size=0 if first is None else min(first.shape[1:]),
        stored=stored,
    )


def open_in_process(
    recipe: Recipe, dataset: ImageDataset, ledger: Ledger, device: torch.device, known: Sequence[str] = ()
) -> OpenSource:
    """Loads the generator into this process, as `load_engine` does; raises GeneratorError if it cannot be had."""
    engine = load_engine(recipe, device, known)
    spec = engine.generator.spec
    facts = GeneratorFacts(spec.name, spec.model, spec.licence, spec.fingerprint, dict(spec.defaults), spec.tflops)
    source = InProcessSource(engine, dataset, ledger)
    return OpenSource(source, {"source": "in_process", **_identity(facts)}, facts, image_size=spec.image_size)


def open_remote(
    recipe: Recipe,
    dataset: ImageDataset,
    ledger: Ledger,
    server: EmbeddedServer | None,
    pool: VariantPool | None = None,
    *,
    client_id: str = "genssl run",
    priority: Priority = "training",
) -> OpenSource:
    """Connects to the recipe's servers, or to its own; the other arguments are those of `RemoteSource`.

    Raises ServerUnavailableError or RequestRefusedError if there are no variants to be had.
    """
    assert recipe.generator is not None
    variants = recipe.variants
    if server is not None:
        server.wait_until_bound()
    token_file = variants.token_file if server is None else None
    remote = RemoteSource(
        targets=[server.address] if server else variants.targets,
        generator_id=generator_id(recipe.generator),
        parameters=_parameters(recipe, server),
        dataset=dataset,
        # A replay waits for exactly the variants that its log names.
        config=variants.model_copy(update={"late": "block"}) if variants.replay is not None else variants,
        ledger=ledger,
        pool=pool,
        limit=_variant_limit(recipe, dataset) if pool is not None else None,
        token=read_token_file(token_file, "variants.token_file") if token_file is not None else None,
        tls=variants.tls if server is None else None,
        check=server.check if server else lambda: None,
        client_id=client_id,
        priority=priority,
    )
    info = remote.generator
    try:
        if server is None:
            _check_same_model(recipe, info)
    except BaseException:
        remote.close()
        raise
    facts = GeneratorFacts(
        info.name, info.model, info.licence, info.fingerprint, remote.parameters, info.tflops or None
    )
    address = {"address": "embedded", "pid": server.pid} if server else {"address": ", ".join(recipe.variants.targets)}
    provenance = {"source": "online", **_identity(facts), "server": address}
    return OpenSource(remote, provenance, facts, remote, remote.image_size)


def _identity(facts: GeneratorFacts) -> dict[str, Any]:
    return {
        "model": facts.model,
        "fingerprint": facts.fingerprint.hex(),
        "licence": facts.licence,
        "tflops_per_variant": facts.tflops,
        "parameters": dict(facts.parameters),
    }


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
        max_per_source=MOST_PER_SOURCE if variants.per_image == "fresh" else max(MOST_PER_SOURCE, variants.per_image),
    )


def _variant_limit(recipe: Recipe, dataset: ImageDataset) -> VariantLimit | None:
    if recipe.variants.budget is None:
        return None
    batch = recipe.train.batch_size
    visits = recipe.train.epochs * (len(dataset) // batch * batch) / len(dataset)  # an epoch drops its last rows
    return VariantLimit(recipe.variants.budget, visits * recipe.views_per_pair(), len(dataset))


def _check_same_model(recipe: Recipe, info: pb.GeneratorInfo) -> None:
    """Refuses a server whose generator is another than the recipe's: the run would not be what its recipe says."""
    assert recipe.generator is not None
    served = {"name": info.name, "model": info.model, **info.settings}
    asked = {key: str(getattr(recipe.generator, key, value)) for key, value in served.items()}
    differing = [key for key in served if served[key] not in (asked[key], shown(asked[key]))]
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
    numbers = {
        key: value for key, value in given.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
    varying = varying_parameters(recipe.generator) if isinstance(recipe.generator, GeneratorConfig) else {}
    return numbers | varying
