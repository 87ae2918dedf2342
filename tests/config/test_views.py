"""Presets of augmentations: by name, with settings on top, and for each view of the pair."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from genssl.config.documents.document import parse_document
from genssl.config.documents.dump import to_yaml
from genssl.config.recipe import Recipe
from genssl.config.validate import validate
from genssl.config.views import PRESETS, AugmentationConfig, PairAugmentationConfig, PresetName
from genssl.errors import ConfigError

PLAIN = """\
name: small
dataset: digits
method: simclr
backbone: resnet18
generator: {name: stable_unclip, model: some/model}
optimizer: {lr: 0.1}
train: {epochs: 3, batch_size: 8}
views:
"""


def recipe(views: str) -> Recipe:
    return validate(Recipe, parse_document(f"{PLAIN}  {views}\n", "r.yaml"))


def pair(**settings: Any) -> PairAugmentationConfig:
    return PairAugmentationConfig(**settings)


def colours(config: AugmentationConfig) -> tuple[float, ...]:
    return config.brightness, config.contrast, config.saturation, config.hue


def test_every_preset_has_a_name_and_every_name_a_preset():
    assert list(get_args(PresetName)) == list(PRESETS)
    for name in PRESETS:
        pair(preset=name)


def test_simclr_is_the_default():
    assert pair(preset="simclr").settings() == pair().settings() == AugmentationConfig().settings()


@pytest.mark.parametrize(
    ("name", "jitter", "colour", "blur", "solarize", "scale"),
    [
        ("simclr", 0.8, (0.8, 0.8, 0.8, 0.2), (0.5, 0.5), (0, 0), (0.08, 1)),
        ("moco", 0.8, (0.4, 0.4, 0.4, 0.1), (0.5, 0.5), (0, 0), (0.08, 1)),
        ("byol", 0.8, (0.4, 0.4, 0.2, 0.1), (1.0, 0.1), (0, 0.2), (0.08, 1)),
        ("barlow_twins", 0.8, (0.4, 0.4, 0.2, 0.1), (1.0, 0.1), (0, 0.2), (0.08, 1)),
        ("dino", 0.8, (0.4, 0.4, 0.2, 0.1), (1.0, 0.1), (0, 0.2), (0.4, 1)),
        ("weak", 0.4, (0.4, 0.4, 0.4, 0.1), (0.5, 0.5), (0, 0), (0.2, 1)),
    ],
)
def test_presets_are_those_of_their_papers(name, jitter, colour, blur, solarize, scale):
    views = [recipe(f"augmentation: {name}").views.augmentation.of_view(view) for view in (0, 1)]
    for view, config in enumerate(views):
        assert (config.crop_scale, config.flip_probability, config.grayscale_probability) == (scale, 0.5, 0.2)
        assert (config.jitter_probability, colours(config)) == (jitter, colour)
        assert (config.blur_probability, config.solarize_probability) == (blur[view], solarize[view])


def test_crop_only_and_none_leave_the_rest_out():
    for name, scale in (("crop_only", (0.08, 1.0)), ("none", (1.0, 1.0))):
        config = recipe(f"generated_augmentation: {name}").views.generated_augmentation
        assert config is not None
        assert config.crop_scale == scale
        for probability in ("flip", "jitter", "grayscale", "blur", "solarize"):
            assert getattr(config, f"{probability}_probability") == 0


def test_settings_on_top_of_a_preset_reach_both_views():
    config = recipe("augmentation: {preset: byol, hue: 0.3}").views.augmentation
    assert [config.of_view(view).hue for view in (0, 1, 2)] == [0.3, 0.3, 0.3]
    assert [config.of_view(view).blur_probability for view in (0, 1, 2)] == [1.0, 0.1, 0.1]


@pytest.mark.parametrize(
    ("written", "first", "second"),
    [
        ("{second: {hue: 0.3}}", (0.2, 0.5, 0.0), (0.3, 0.5, 0.0)),
        ("{preset: byol, second: {hue: 0.3}}", (0.1, 1.0, 0.0), (0.3, 0.1, 0.2)),
        ("{preset: byol, second: null}", (0.1, 1.0, 0.0), (0.1, 1.0, 0.0)),
        ("{hue: 0.4, second: moco}", (0.4, 0.5, 0.0), (0.1, 0.5, 0.0)),
        ("{hue: 0.4, second: {preset: moco, blur_probability: 0}}", (0.4, 0.5, 0.0), (0.1, 0.0, 0.0)),
    ],
)
def test_the_second_view_has_what_the_first_has_unless_it_says_otherwise(written, first, second):
    config = recipe(f"augmentation: {written}").views.augmentation
    for view, expected in ((0, first), (1, second)):
        found = config.of_view(view)
        assert (found.hue, found.blur_probability, found.solarize_probability) == expected


@pytest.mark.parametrize(
    "views",
    [
        "augmentation: byol",
        "augmentation: {preset: byol, second: null}",
        "augmentation: {preset: dino, hue: 0.3, second: {hue: 0.2}}",
        "generated_augmentation: none",
        "crops: {size: 4, augmentation: moco}",
    ],
)
def test_the_resolved_recipe_says_every_setting_and_means_the_same(views):
    resolved = recipe(views)
    text = to_yaml(resolved)
    assert validate(Recipe, parse_document(text, "resolved")) == resolved
    assert "solarize_threshold: 0.5" in text


ALLOWED = "allowed: barlow_twins, byol, crop_only, dino, moco, none, simclr, weak"


@pytest.mark.parametrize(
    ("views", "problem"),
    [
        ("augmentation: byoll", f"augmentation.preset: 'byoll' is not allowed; did you mean 'byol'? {ALLOWED}"),
        ("generated_augmentation: {preset: x}", f"generated_augmentation.preset: 'x' is not allowed; {ALLOWED}"),
        ("augmentation: 5", "augmentation: 5: a mapping of settings is expected"),
        ("augmentation: {preset: byol, hue: 3}", "augmentation.hue: 3: input should be less than or equal to 0.5"),
        (
            "augmentation: {second: byol}",
            "augmentation.second: 'byol': the preset 'byol' makes two different views, and here is one; "
            "write out its settings",
        ),
        ("augmentation: {solarize_threshold: 2}", "augmentation.solarize_threshold: 2: input should be less than"),
        ("crops: {count: 2}", "crops.size: is missing; add it"),
        ("crops: {size: 4, scale: [0, 1]}", "crops.scale: [0, 1]: two numbers above 0 and at most 1 are expected"),
        ("real_weight: 0", "real_weight: 0: input should be greater than 0"),
        ("third_count: 0", "third_count: 0: input should be greater than or equal to 1"),
    ],
)
def test_mistakes_are_told(views, problem):
    with pytest.raises(ConfigError) as caught:
        recipe(views)
    (found,) = caught.value.problems
    assert found.startswith(f"r.yaml:9: views.{problem}")


def test_a_single_view_takes_presets_too():
    assert AugmentationConfig.model_validate("weak").crop_scale == (0.2, 1.0)


@pytest.mark.parametrize(
    ("views", "per_image", "slots", "probability"),
    [
        ("policy: second", "fresh", 1, 1.0),
        ("{policy: both, probability: 0.5}", "10", 2, 0.5),
        ("{policy: third, third_count: 3, probability: 0.5}", "10", 3, 0.5),
        ("policy: added", "20", 1, 2 / 3),  # AdaInf on CIFAR-10: 1,000,000 generated, 50,000 real, ten times each
        ("policy: added", "fresh", 1, 1 / 11),
        ("{policy: added, real_weight: 1}", "1", 1, 1 / 2),
        ("policy: none", "fresh", 0, 1.0),
    ],
)
def test_how_many_variants_a_step_wants(views, per_image, slots, probability):
    text = PLAIN.replace("views:\n", f"variants: {{per_image: {per_image}}}\nviews: {views}\n")
    text = text.replace("views: policy: ", "views:\n  policy: ")
    checked = validate(Recipe, parse_document(text, "r.yaml"))
    assert checked.views.variant_slots == slots
    assert checked.variant_probability() == pytest.approx(probability)
    assert checked.uses_variants() is (slots > 0)


@pytest.mark.parametrize(
    ("views", "warning"),
    [
        ("third_count: 2", "views.third_count has no effect: views.policy is second"),
        ("real_weight: 2", "views.real_weight has no effect: views.policy is second"),
    ],
)
def test_settings_that_a_policy_does_not_look_at_are_told(views, warning):
    assert recipe(views).warnings() == [warning]


def test_a_probability_beside_added_is_told():
    text = PLAIN.replace("views:\n", "views: {policy: added, probability: 0.5}\n")
    (warning,) = validate(Recipe, parse_document(text, "r.yaml")).warnings()
    assert warning.startswith("views.probability has no effect: with views.policy added")
