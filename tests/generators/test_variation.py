"""Parameters that vary: how they are written, named, refused, and settled by seed and source."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from genssl.errors import RequestRefusedError
from genssl.generators.configs import FlowConfig, ICGANConfig, StableUnCLIPConfig
from genssl.generators.diffusion.unclip_encoder import foreground_ratio
from genssl.generators.open import open_generator
from genssl.generators.parameters import merge
from genssl.generators.variation import Variation, adaptive_noise_level, complete, redraw_seed, varying_parameters
from genssl.variants.key import parameters_digest

MODEL = "builtin:digits-unclip"
CPU = torch.device("cpu")


def test_a_range_and_adaptive_stand_in_place_of_a_number_and_survive_a_dump():
    config = StableUnCLIPConfig(model=MODEL, guidance_scale=[2, 8], noise_level="adaptive")
    assert (config.guidance_scale, config.noise_level) == (2, 0)
    assert varying_parameters(config) == {"guidance_scale.max": 8, "noise_level.adaptive": 1}
    assert StableUnCLIPConfig.model_validate(config.model_dump(mode="json")) == config
    assert varying_parameters(ICGANConfig(model="m", truncation=[0.3, 1])) == {"truncation.max": 1}


@pytest.mark.parametrize(
    ("config", "settings", "said"),
    [
        (StableUnCLIPConfig, {"guidance_scale": [8, 2]}, r"range \[low, high\] with low < high"),
        (StableUnCLIPConfig, {"guidance_scale": [2, 101]}, "guidance_scale: 101: .*less than or equal to 100"),
        (StableUnCLIPConfig, {"num_inference_steps": [1, 4.5]}, "4.5"),
        (StableUnCLIPConfig, {"output_size": [8, 16]}, "one size"),
        (
            StableUnCLIPConfig,
            {"varying": {"dtype": [1, 2]}},
            "not a number that can vary; there are num_inference_steps",
        ),
        (StableUnCLIPConfig, {"guidance_scale": 3, "varying": {"guidance_scale": [2, 8]}}, "give one of the two"),
        (FlowConfig, {"embedding_noise": "adaptive"}, "valid number"),
        (FlowConfig, {"varying": {"noise_level": "adaptive"}}, "only noise_level can be adaptive, where"),
        (FlowConfig, {"drift_guard": {"min_similarity": 2}}, "less than or equal to 1"),
    ],
)
def test_what_cannot_vary_is_refused(config, settings, said):
    with pytest.raises(ValidationError, match=said):
        config(model="m", **settings)


def test_what_varies_is_part_of_the_name_and_what_does_not_leaves_it_as_it_was(unclip):
    plain, _, nothing = complete(unclip, {})
    assert plain == unclip.spec.defaults
    assert nothing is None
    ranged, given, variation = complete(unclip, {"guidance_scale": 2, "guidance_scale.max": 8})
    assert given == {**plain, "guidance_scale": 2.0}
    assert variation == Variation(ranges={"guidance_scale": (2.0, 8.0)})
    names = {parameters_digest(mapping) for mapping in (plain, given, ranged)}
    assert len(names) == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"guidance.max": 8}, "no parameter 'guidance.max'"),
        ({"guidance_scale": 5, "guidance_scale.max": 3}, "is 3.0, below 5.0, where the range"),
        ({"guidance_scale.max": 300}, "guidance_scale: 300.0 is outside 0..100"),
        ({"output_size.max": 99}, "one size"),
        ({"noise_level.max": 400.5}, "whole number"),
        ({"noise_level.adaptive": 2}, "is 1"),
        ({"min_similarity": 1.5}, r"min_similarity is 1.5"),
        ({"min_similarity": 0.5, "max_tries": 0}, "max_tries 0"),
        ({"guidance_scale.max": float("inf")}, "finite"),
    ],
)
def test_a_client_is_told_what_cannot_vary(unclip, given, said):
    with pytest.raises(RequestRefusedError, match=said):
        complete(unclip, given)


def test_a_number_given_replaces_a_range_by_default():
    defaults = {"guidance_scale": 2.0, "guidance_scale.max": 8.0, "noise_level": 0, "noise_level.adaptive": 1}
    assert merge(defaults, {"guidance_scale": 3.0, "noise_level": 5}) == {"guidance_scale": 3.0, "noise_level": 5}
    assert merge(defaults, {"guidance_scale.max": 9.0})["guidance_scale"] == 2.0
    assert merge({}, {"min_similarity": 0.5}) == {"min_similarity": 0.5, "max_tries": 4}


def test_values_are_drawn_evenly_by_seed_and_name_alone():
    variation = Variation(ranges={"a": (2.0, 8.0), "n": (1, 4)}, whole=frozenset({"n"}))
    drawn = [variation.settle({"a": 2.0, "n": 1}, seed, None) for seed in range(4000)]
    values = np.array([one["a"] for one in drawn])
    assert 2 <= values.min() < 2.01 < 7.99 < values.max() < 8
    assert abs(values.mean() - 5) < 4 * np.sqrt(3 / 4000), "four standard errors of a uniform draw"
    counts = np.bincount([one["n"] for one in drawn])
    assert len(counts) == 5
    assert counts[0] == 0
    assert counts[1:].min() > 890, "four standard errors below 1000"
    assert abs(np.corrcoef(values, [one["n"] for one in drawn])[0, 1]) < 0.07
    alone = Variation(ranges={"a": (2.0, 8.0)}).settle({"a": 2.0}, 7, None)
    assert alone["a"] == drawn[7]["a"]
    assert len({redraw_seed(seed, number) for seed in range(50) for number in range(1, 5)}) == 200


def test_genviews_rule():
    levels = [adaptive_noise_level(ratio) for ratio in (0, 0.19, 0.21, 0.5, 0.61, 0.79, 0.81, 1)]
    assert levels == [0, 0, 100, 200, 300, 300, 400, 400]


def test_the_foreground_is_what_stands_out_from_the_border_whatever_the_sign():
    random = torch.Generator().manual_seed(0)
    background, thing = torch.randn(2, 1, 16, generator=random)
    maps = []
    for side in (2, 4, 6):
        mask = torch.zeros(8, 8, 1)
        start = (8 - side) // 2
        mask[start : start + side, start : start + side] = 1
        noise = 0.01 * torch.randn(8, 8, 16, generator=random)
        maps.append((background * (1 - mask) + thing * mask + noise).flatten(0, 1))
    together = torch.stack([*maps, -maps[1], torch.ones(64, 16)])
    ratios = foreground_ratio(together)
    assert ratios.tolist() == [4 / 64, 16 / 64, 36 / 64, 16 / 64, 0]
    assert torch.equal(foreground_ratio(together[1:2]), ratios[1:2])


def test_the_foreground_comes_beside_the_same_embeddings(unclip, digits_test):
    images = torch.stack([torch.from_numpy(unclip.preprocess(digits_test.image(row))) for row in range(40)])
    both = unclip.embed_with_foreground(images)
    assert torch.equal(both[:, :-1], unclip.embed(images))
    assert 0 <= both[:, -1].min() < both[:, -1].max() <= 1
    assert len({adaptive_noise_level(float(ratio)) for ratio in both[:, -1]}) > 2


def test_a_generator_opens_with_what_varies_in_its_defaults_and_its_fingerprint_stays():
    plain = open_generator(StableUnCLIPConfig(model=MODEL), CPU)
    varied = open_generator(StableUnCLIPConfig(model=MODEL, noise_level=[0, 400]), CPU)
    assert varied.spec.defaults == plain.spec.defaults | {"noise_level.max": 400}
    assert varied.spec.fingerprint == plain.spec.fingerprint
