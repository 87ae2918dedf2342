"""What a recipe may say: rules between its sections, and warnings for what is rarely meant."""

from __future__ import annotations

from typing import Any

import pytest

from genssl.config.documents.document import parse_document
from genssl.config.documents.dump import to_yaml
from genssl.config.recipe import Recipe
from genssl.config.validate import validate
from genssl.config.views import PairAugmentationConfig
from genssl.errors import ConfigError

PLAIN = """\
name: small
dataset: digits
method: simclr
backbone: resnet18
generator: {name: stable_unclip, model: some/model}
optimizer: {lr: 0.1}
train: {epochs: 3, batch_size: 8}
"""


def recipe(text: str = PLAIN, **sections: Any) -> Recipe:
    document = parse_document(text, "r.yaml")
    document.data |= sections
    return validate(Recipe, document)


def problems(text: str = PLAIN, **sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        recipe(text, **sections)
    return caught.value.problems


def test_a_recipe_without_a_source_of_variants_needs_no_generator():
    bare = PLAIN.replace("generator: {name: stable_unclip, model: some/model}\n", "")
    assert recipe(bare, variants={"source": "none"}).generator is None


def test_what_varies_and_splits_batches_is_a_warning_where_it_is_made():
    generator = {
        "name": "stable_unclip",
        "model": "some/model",
        "num_inference_steps": [4, 8],
        "guidance_end": [0.5, 1],
    }
    (warning,) = recipe(generator=generator).warnings()
    assert warning.startswith("generator.num_inference_steps varies between variants")
    assert recipe(generator=generator, variants={"source": "none"}).warnings() == []


@pytest.mark.parametrize("source", ["online", "in_process"])
def test_a_source_of_variants_needs_a_generator(source):
    text = PLAIN.replace("generator: {name: stable_unclip, model: some/model}", f"variants:\n  source: {source}")
    rule = f"variants.source is '{source}' but there is no generator block; add one, or set variants.source: none"
    assert problems(text) == [f"r.yaml:5: variants: {rule}"]


def test_the_default_source_needs_a_generator_too():
    (problem,) = problems(PLAIN.replace("generator: {name: stable_unclip, model: some/model}\n", ""))
    assert problem.startswith("r.yaml:1: variants: variants.source is 'online' but there is no generator block")


@pytest.mark.parametrize("warmup", [3, 3.5, 10])
def test_warmup_is_shorter_than_the_run(warmup):
    rule = f"schedule.warmup_epochs is {warmup:g} but train.epochs is 3; warm-up must be shorter"
    assert problems(schedule={"warmup_epochs": warmup}) == [f"r.yaml:7: train: {rule}"]
    assert recipe(schedule={"warmup_epochs": 2.9}).schedule.warmup_epochs == 2.9


def test_an_evaluator_is_named_once():
    (problem,) = problems(evaluate=["knn", "linear_probe", {"name": "knn", "k": 1}])
    assert problem == "r.yaml:1: evaluate: more than one block names knn; their results would overwrite each other"
    assert [block.name for block in recipe(evaluate=["knn", "linear_probe"]).evaluate] == ["knn", "linear_probe"]


def test_rules_between_sections_are_reported_with_all_other_problems():
    text = PLAIN.replace("generator: {name: stable_unclip, model: some/model}\n", "")
    found = problems(text, evaluate=["knn", "knn"], schedule={"warmup_epochs": 9}, seed=-1, foo=1)
    assert [line.split(": ")[1] for line in found] == ["seed", "variants", "train", "evaluate", "foo"]


@pytest.mark.parametrize(
    ("views", "source", "uses", "warning"),
    [
        ({}, "online", True, None),
        ({"policy": "second", "probability": 0.5}, "in_process", True, None),
        ({"policy": "both", "probability": 0.5}, "online", True, None),
        ({}, "none", False, None),
        ({"policy": "both"}, "none", False, None),
        ({"policy": "both"}, "online", True, "both views of every pair are variants"),
        ({"policy": "none"}, "online", False, "no view can be a variant"),
        ({"probability": 0.0}, "in_process", False, "no view can be a variant"),
    ],
)
def test_whether_variants_are_used_and_what_is_rarely_meant(views, source, uses, warning):
    checked = recipe(views=views, variants={"source": source})
    assert checked.uses_variants() is uses
    if warning is None:
        assert checked.warnings() == []
    else:
        (found,) = checked.warnings()
        assert found.startswith(warning)


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("crop_scale", [0.5, 1.0], True),
        ("crop_scale", [1.0, 1.0], True),
        ("crop_scale", [0.5, 1.1], False),
        ("crop_scale", [0.0, 1.0], False),
        ("crop_ratio", [1.0, 2.0], True),
        ("crop_ratio", [2.0, 1.0], False),
        ("blur_sigma", [-1.0, 1.0], False),
        ("blur_sigma", [1.0], False),
        ("hue", 0.5, True),
        ("hue", 0.51, False),
        ("flip_probability", 1.01, False),
    ],
)
def test_augmentations_stay_within_what_can_be_drawn(setting, value, allowed):
    augmentation = {"augmentation": {setting: value}}
    if allowed:
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(recipe(views=augmentation).views.augmentation, setting) == expected
    else:
        (problem,) = problems(views=augmentation)
        assert f": views.augmentation.{setting}" in problem


@pytest.mark.parametrize(
    ("server", "allowed"),
    [
        ("embedded", True),
        ("127.0.0.1:50051", True),
        ("gpu-7.example.org:50051", True),
        ("unix:/run/genssl.sock", True),
        ("unix:", False),
        ("localhost", False),
        (":50051", False),
        ("localhost:70000", False),
        ("localhost:²", False),
    ],
)
def test_a_server_is_embedded_or_an_address(server, allowed):
    if allowed:
        assert recipe(variants={"server": server}).variants.server == server
    else:
        (problem,) = problems(variants={"server": server})
        assert problem.startswith(f"r.yaml:1: variants.server: {server!r}: ")
        assert "such as" in problem, "a message about an address shows one"


@pytest.mark.parametrize("name", ["a b", "../up", "a/b", ""])
def test_a_name_is_one_plain_word_since_it_names_a_folder(name):
    (problem,) = problems(name=name)
    assert problem.startswith("r.yaml:1: name: ")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3"])
def test_devices(device):
    assert recipe(train={"epochs": 1, "batch_size": 2, "device": device}).train.device == device


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU"])
def test_other_words_are_no_devices(device):
    (problem,) = problems(train={"epochs": 1, "batch_size": 2, "device": device})
    assert problem.startswith(f"r.yaml:7: train.device: {device!r}: ")


def test_a_recipe_cannot_be_changed_after_it_was_checked():
    checked = recipe()
    with pytest.raises(ValueError, match="frozen"):
        checked.train.epochs = 0  # type: ignore[misc]


def test_defaults_are_not_shared_with_what_another_recipe_writes():
    assert recipe(views={"augmentation": {"hue": 0.0}}).views.augmentation.hue == 0.0
    assert recipe().views.augmentation == PairAugmentationConfig()


def assert_round_trip(checked: Recipe) -> None:
    text = to_yaml(checked)
    assert list(parse_document(text, "shown").data) == list(Recipe.model_fields), "the sections keep their order"
    assert validate(Recipe, parse_document(text, "shown")) == checked


@pytest.mark.parametrize(
    "name", ["null", "1e3", "0x1F", "true", "010", "1_000", "none", "on", ".inf", "2026-01-01", "...", "---"]
)
def test_a_name_that_looks_like_another_type_survives_being_written_back(name):
    assert_round_trip(recipe(name=name))


@pytest.mark.parametrize(
    "model", ["a # b", "a: b", "x\ny", " x ", "é😀", "'q'", "!tag", "*x", "- x", "~", "[b]", "word " * 60, "a" * 300]
)
def test_any_string_survives_being_written_back(model):
    assert_round_trip(recipe(generator={"name": "stable_unclip", "model": model}))
