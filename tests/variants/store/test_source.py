"""The stored source over real stores, alone and with the generator behind it."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from genssl.variants.engine import VariantEngine
from genssl.variants.in_process import InProcessSource
from genssl.variants.ledger import Ledger
from genssl.variants.source import REAL, VariantRequest
from genssl.variants.store.facts import GeneratorFacts, StoredNames, describe_contents, find_generator
from genssl.variants.store.manifest import StoreError, read_manifest
from genssl.variants.store.source import StoredSource, StoredVariants, StoreFetcher
from genssl.variants.store.store import VariantStore

BLOCK = {"name": "g", "model": "m", "noise_level": 3}


@pytest.fixture(scope="module")
def facts(unclip) -> GeneratorFacts:
    spec = unclip.spec
    return GeneratorFacts(spec.name, spec.model, spec.licence, spec.fingerprint, spec.defaults)


@pytest.fixture(scope="module")
def engine(unclip) -> VariantEngine:
    return VariantEngine(unclip, [8], deterministic=True)


def requests_of(dataset, rows, index: int = 0) -> list[VariantRequest]:
    return [VariantRequest(row, dataset.source_id(row), index) for row in rows]


class Maker:
    """A fetcher that makes variants in this process and notes what it was asked for."""

    def __init__(self, engine, dataset) -> None:
        self._source = InProcessSource(engine, dataset, Ledger())
        self.asked: list[tuple[list[VariantRequest], bool]] = []

    def look(self, requests):
        return [None] * len(requests)

    async def fetch(self, requests, *, ahead=False):
        self.asked.append((list(requests), ahead))
        return [(image, "generated") for image in self._source.take(requests).images]

    def describe(self) -> str:
        return "a maker"

    def check(self) -> None:
        pass


def test_what_is_made_is_stored_and_the_next_time_found(tmp_path, facts, engine, digits_test):
    expected = InProcessSource(engine, digits_test, Ledger()).take(requests_of(digits_test, range(6))).images
    for origins in (["generated"] * 6, ["store"] * 6):
        ledger = Ledger()
        behind = InProcessSource(engine, digits_test, ledger)
        source = StoredSource(StoredVariants(VariantStore(tmp_path / "s"), facts), behind=behind)
        delivery = source.take(requests_of(digits_test, range(6)), 0)
        source.close()
        assert delivery.origins == origins
        assert delivery.indices == [0] * 6
        assert np.array_equal(delivery.images, expected)
        assert ledger.calls == (1 if origins[0] == "generated" else 0)


def test_only_what_the_store_lacks_is_asked_for_and_the_order_is_kept(tmp_path, facts, engine, digits_test):
    everything = requests_of(digits_test, range(7))
    expected = InProcessSource(engine, digits_test, Ledger()).take(everything).images
    behind = InProcessSource(engine, digits_test, Ledger())
    source = StoredSource(StoredVariants(VariantStore(tmp_path / "s"), facts), behind=behind)
    source.take(everything[1:6:2])
    assert [image is None for image in source.stored.read(everything)] == [True, False] * 3 + [True]
    delivery = source.take(everything, 1)
    assert delivery.origins == ["generated", "store"] * 3 + ["generated"]
    assert np.array_equal(delivery.images, expected)
    source.close()


def test_a_store_inside_the_fetch_has_at_hand_what_was_fetched_before(tmp_path, facts, engine, digits_test):
    maker, stored = Maker(engine, digits_test), StoredVariants(VariantStore(tmp_path / "s"), facts)
    fetcher = StoreFetcher(stored, maker)
    wanted = requests_of(digits_test, range(4))
    assert fetcher.look(wanted) == [None] * 4
    images = asyncio.run(fetcher.fetch(wanted[1:3], ahead=True))
    assert [origin for _, origin in images] == ["generated"] * 2
    assert maker.asked == [(wanted[1:3], True)]
    found = fetcher.look(wanted)
    assert [image is None for image in found] == [True, False, False, True]
    for image, (pixels, _) in zip(found[1:3], images, strict=True):
        assert image[1] == "store"
        assert np.array_equal(image[0], pixels)
    assert fetcher.describe() == "a maker"
    stored.close()


def test_a_missing_variant_is_an_error_or_the_image_itself(tmp_path, facts, engine, digits_test):
    stored, missing = requests_of(digits_test, range(3)), requests_of(digits_test, range(3), index=5)
    behind = InProcessSource(engine, digits_test, Ledger())
    source = StoredSource(StoredVariants(VariantStore(tmp_path / "s"), facts), behind=behind)
    source.take(stored)
    source.close()
    wanted = [stored[0], missing[1], stored[2], missing[0]]
    with pytest.raises(StoreError, match=r"lacks 2 of the 4 variants .* such as variant 5 of image 1\."):
        StoredSource(StoredVariants(VariantStore(tmp_path / "s", readonly=True), facts)).take(wanted)
    real = StoredSource(StoredVariants(VariantStore(tmp_path / "s", readonly=True), facts), missing="real").take(wanted)
    assert real.origins == ["store", "real", "store", "real"]
    assert real.indices == [0, REAL, 0, REAL]
    assert real.images.shape == (2, 3, 8, 8)


def test_a_full_store_ends_a_strict_source_and_no_other(tmp_path, facts, engine, digits_test):
    for strict in (True, False):
        store = VariantStore(tmp_path / f"{strict}", max_bytes=2**17)
        behind = InProcessSource(engine, digits_test, Ledger())
        source = StoredSource(StoredVariants(store, facts, strict=strict), behind=behind)
        if strict:
            with pytest.raises(StoreError, match="has no room"):
                source.take(requests_of(digits_test, range(120)))
        else:
            assert source.take(requests_of(digits_test, range(120))).origins == ["generated"] * 120
        source.close()


def test_what_arrives_after_the_closing_is_dropped(tmp_path, facts, engine, digits_test):
    stored = StoredVariants(VariantStore(tmp_path / "s"), facts)
    stored.close()
    image = np.zeros((3, 8, 8), np.uint8)
    late = threading.Thread(target=stored.keep, args=(requests_of(digits_test, [0]), [image]))
    late.start()
    late.join()
    with VariantStore(tmp_path / "s", readonly=True) as store:
        assert len(store) == 0


def test_the_names_of_a_store_tell_what_it_lacks(tmp_path, facts):
    keys = facts.keys([bytes([number]) * 16 for number in range(20)], list(range(20)))
    image = np.zeros((3, 8, 8), np.uint8)
    with VariantStore(tmp_path / "s") as store:
        assert StoredNames(store).lack([key.digest() for key in keys]).all()
        store.put_many([(key, image) for key in keys[::2]])
        lacking = StoredNames(store).lack([key.digest() for key in keys])
    assert lacking.tolist() == [False, True] * 10


def test_a_store_knows_the_generator_of_a_block_until_there_are_two(tmp_path, facts):
    with VariantStore(tmp_path / "s") as store:
        assert find_generator(store.manifest, BLOCK) is None
        describe_contents(store, facts, BLOCK, "d" * 32, {"name": "x", "images": 5, "variants": 10})
        describe_contents(store, facts, BLOCK, "d" * 32, {"name": "x", "images": 5, "variants": 3})
        assert find_generator(read_manifest(tmp_path / "s"), BLOCK) == facts
        assert find_generator(store.manifest, BLOCK | {"noise_level": 4}) is None
        assert store.manifest.model_extra["datasets"]["d" * 32]["variants"] == 10
        # The model in the folder has been trained anew: only the generator itself can tell which is meant.
        other = GeneratorFacts(facts.name, facts.model, facts.licence, b"o" * 16, facts.parameters)
        describe_contents(store, other, BLOCK, "d" * 32, {"name": "x", "images": 5})
        assert find_generator(store.manifest, BLOCK) is None


def test_a_block_written_before_some_settings_came_up_means_what_it_did(tmp_path, facts):
    old = {"name": "stable_unclip", "model": "builtin:x", "encoder": {"name": "vit_small"}}
    new = old | {
        "preprocess": None,
        "encoder": {"name": "vit_small", "heads": None, "layer_scale": None, "registers": 0},
    }
    with VariantStore(tmp_path / "s") as store:
        describe_contents(store, facts, old, "d" * 32, {"name": "x", "images": 5})
        manifest = store.manifest
    assert find_generator(manifest, new) == facts
    assert find_generator(manifest, new | {"preprocess": "square"}) == facts
    assert find_generator(manifest, new | {"preprocess": "clip"}) is None
    assert find_generator(manifest, new | {"encoder": {"name": "vit_small", "heads": 12}}) is None
    hub = {"generator_blocks": [manifest.model_extra["generator_blocks"][0] | {"block": old | {"model": "owner/name"}}]}
    assert find_generator(manifest.model_copy(update=hub), new | {"model": "owner/name"}) is None, "now another rule"
    assert (
        find_generator(manifest.model_copy(update=hub), new | {"model": "owner/name", "preprocess": "square"}) == facts
    )


def test_what_someone_else_wrote_into_a_manifest_is_not_believed(tmp_path, facts):
    with VariantStore(tmp_path / "s") as store:
        describe_contents(store, facts, BLOCK, "d" * 32, {"name": "x", "images": 5})
        good = store.manifest
    (entry,) = good.model_extra["generator_blocks"]
    for wrong in ({"fingerprint": "zz"}, {"fingerprint": "00"}, {"parameters": None}, {"parameters": {"a": "b"}}):
        assert find_generator(good.model_copy(update={"generator_blocks": [entry | wrong]}), BLOCK) is None
    assert find_generator(good.model_copy(update={"generator_blocks": "text"}), BLOCK) is None
    assert find_generator(good.model_copy(update={"generator_blocks": [entry]}), BLOCK) == facts
