"""Parameters that vary, from a recipe's block to the images: in process, from an embedded server, and from a store."""

from __future__ import annotations

import grpc
import numpy as np
import pytest
import torch
import yaml

from genssl.config.documents.document import parse_document
from genssl.config.documents.dump import to_yaml
from genssl.config.recipe import Recipe
from genssl.config.validate import validate
from genssl.errors import ConfigError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1.generation_pb2_grpc import GenerationServiceStub
from genssl.offline.pregenerate import Shard, pregenerate
from genssl.training.supply.open import open_source
from genssl.training.supply.server import start_server
from genssl.variants.ledger import Ledger
from genssl.variants.source import VariantRequest

VARYING = [
    "generator.guidance_scale=[0.5, 4]",
    "generator.noise_level=adaptive",
    "generator.drift_guard={min_similarity: 0.97, max_tries: 3}",
    "variants.batching=deterministic",
]


def take(recipe, dataset, server=None, folder=None):
    ledger = Ledger()
    requests = [VariantRequest(row, dataset.source_id(row), row % 3) for row in range(24)]
    with open_source(recipe, dataset, ledger, torch.device("cpu"), server, folder) as opened:
        opened.source.announce(requests)
        delivery = opened.source.take(requests)
        return delivery, opened.facts, ledger


@pytest.mark.slow
def test_in_process_served_and_stored_variants_are_the_same(quick_recipe, digits_train, tmp_path):
    store = f"variants.store={tmp_path / 'store'}"
    local, facts, ledger = take(quick_recipe(*VARYING, "variants.source=in_process", store), digits_train)
    assert facts.parameters.keys() >= {"guidance_scale.max", "noise_level.adaptive", "min_similarity", "max_tries"}
    assert ledger.variants_redrawn > 0
    stored, _, _ = take(quick_recipe(*VARYING, "variants.source=stored", store), digits_train)
    assert stored.origins == ["store"] * 24
    assert np.array_equal(local.images, stored.images)
    online = quick_recipe(*VARYING, "variants.source=online", "variants.server=embedded")
    with start_server(online, tmp_path / "log") as server:
        served, served_facts, _ = take(online, digits_train, server, tmp_path)
        assert np.array_equal(local.images, served.images)
        assert served_facts == facts
        # Another client of the same server: its recipe has other ranges, and asks for them in its requests.
        changed = [one for one in VARYING if "noise_level" not in one]
        asks = quick_recipe(*changed, "generator.noise_level=[100, 300]", f"variants.server={server.address}")
        other, other_facts, _ = take(asks, digits_train, folder=tmp_path)
        with grpc.insecure_channel(server.address) as channel:
            statistics = GenerationServiceStub(channel).GetStatistics(pb.GetStatisticsRequest(), timeout=30)
    here, here_facts, _ = take(
        quick_recipe(*changed, "generator.noise_level=[100, 300]", "variants.source=in_process"), digits_train
    )
    assert np.array_equal(other.images, here.images)
    assert here_facts == other_facts
    assert statistics.generators[0].variants_redrawn >= ledger.variants_redrawn


def test_a_resolved_recipe_says_what_varies_and_loads_again(quick_recipe):
    recipe = quick_recipe(*VARYING)
    text = to_yaml(recipe)
    assert yaml.safe_load(text)["generator"]["varying"] == {"guidance_scale": [0.5, 4.0], "noise_level": "adaptive"}
    assert validate(Recipe, parse_document(text, "r.yaml")) == recipe


def test_a_bad_range_is_told_at_its_line(quick_recipe):
    with pytest.raises(ConfigError, match=r"generator.guidance_scale: \[8, 2\]: a number is expected, or a range"):
        quick_recipe("generator.guidance_scale=[8, 2]")


class Silent:
    """Is told how far a store is, and says nothing."""

    def note(self, text): ...

    def start(self, done): ...

    def advance(self, done): ...


@pytest.mark.slow
def test_retrieval_works_in_process_from_a_server_and_ahead_of_time(quick_recipe, digits_train, tmp_path):
    bank = tmp_path / "bank.safetensors"
    block = f"{{name: retrieval, bank: {{images: digits, embeddings: '{bank}'}}, encoder: 'builtin:digits-unclip'}}"
    retrieval = [f"generator={block}", "variants.per_image=2"]
    local, facts, _ = take(quick_recipe(*retrieval, "variants.source=in_process"), digits_train)
    online = quick_recipe(*retrieval, "variants.source=online")
    with start_server(online, tmp_path / "log") as server:
        served, served_facts, _ = take(online, digits_train, server, tmp_path)
        elsewhere = quick_recipe(*retrieval, f"variants.server={server.address}")
        again, _, _ = take(elsewhere, digits_train, folder=tmp_path)
    assert served_facts == facts
    assert np.array_equal(local.images, served.images)
    assert np.array_equal(local.images, again.images)
    ahead = quick_recipe(*retrieval, "variants.source=in_process")
    done = pregenerate(ahead, tmp_path / "store", variants=3, report=Silent(), shard=Shard(0, 40))
    assert done.made == done.total > 0
    stored = quick_recipe(*retrieval, "variants.source=stored", f"variants.store={tmp_path / 'store'}")
    kept, _, _ = take(stored, digits_train)
    assert set(kept.origins) == {"store"}
    assert np.array_equal(local.images, kept.images)
