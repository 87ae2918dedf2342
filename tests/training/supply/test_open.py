"""What a recipe hands to the client of the servers, and what is refused before."""

from __future__ import annotations

import pytest

from genssl.errors import RequestRefusedError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.training.supply.open import _check_same_model
from genssl.training.supply.server import server_threads


def test_another_generator_is_refused_with_all_the_servers(quick_recipe):
    info = pb.GeneratorInfo(generator_id="stable_unclip", name="stable_unclip", model="other")
    recipe = quick_recipe("variants.server=[127.0.0.1:1, 127.0.0.1:2]")
    with pytest.raises(RequestRefusedError, match=r"the server at 127.0.0.1:1, 127.0.0.1:2 has another generator"):
        _check_same_model(recipe, info)


def test_a_folder_is_compared_by_the_name_that_servers_tell(quick_recipe, tmp_path):
    info = pb.GeneratorInfo(generator_id="stable_unclip", name="stable_unclip", model="my-unclip")
    _check_same_model(quick_recipe("variants.server=127.0.0.1:1", "generator.model=/models/my-unclip"), info)
    with pytest.raises(RequestRefusedError, match=r"model my-unclip \(the recipe: /models/other\)"):
        _check_same_model(quick_recipe("variants.server=127.0.0.1:1", "generator.model=/models/other"), info)


def test_a_deterministic_embedded_server_computes_with_the_trainers_threads(quick_recipe):
    assert server_threads(quick_recipe("variants.batching=deterministic", "train.threads=3")) == 3
    assert server_threads(quick_recipe("train.threads=3")) == server_threads(quick_recipe("train.threads=1"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["variants.refresh={budget: 4}"], "variants.refresh has no effect: only variants.late: reuse"),
        (["variants.late=reuse", "variants.source=in_process"], "with variants.source in_process no variant is late"),
        (["variants.late=reuse", "variants.replay=log"], "a replay waits for what its log names"),
        (["variants.batching=deterministic", "train.threads=auto"], "set train.threads"),
        (["variants.late=reuse", "variants.refresh={budget: 4}"], None),
        (["variants.batching=deterministic", "train.threads=1"], None),
    ],
)
def test_settings_of_no_effect_are_told(quick_recipe, overrides, said):
    found = quick_recipe(*overrides).warnings()
    assert found == [] if said is None else said in found[0]
