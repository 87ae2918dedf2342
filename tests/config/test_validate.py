"""Every mistake in a file or an override becomes one line that says where, what was found and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, Field

from genssl.config.base import Section
from genssl.config.documents.document import apply_override, parse_document
from genssl.config.generator_recipes.base import GeneratorRecipe
from genssl.config.load import load, model_of
from genssl.config.protocol import Protocol
from genssl.config.recipe import Recipe, TrainConfig
from genssl.config.server import ServerFile
from genssl.config.study import Study
from genssl.config.validate import validate
from genssl.config.views import PairAugmentationConfig
from genssl.data.configs import DigitsConfig
from genssl.errors import ConfigError
from genssl.evaluators.configs import FewShotConfig, KNNConfig
from genssl.methods.configs import SimCLRConfig
from genssl.registry import REGISTRIES

ROOT = Path(__file__).resolve().parents[2]

COMPLETE = """\
name: small
dataset: {name: digits}
method:
  name: simclr
  temperature: 0.2
backbone: {name: resnet18, width: 16}
views:
  probability: 0.5
  augmentation:
    hue: 0.1
generator:
  name: stable_unclip
  model: some/model
variants: {per_image: 10}
optimizer: {name: sgd, lr: 0.1}
schedule: {warmup_epochs: 1}
train:
  epochs: 3
  batch_size: 8
evaluate:
  - {name: knn, k: 5}
  - name: few_shot
    draws: 4
"""

NOT_AN_INTEGER = "input should be a valid integer, unable to parse string as an integer"
BLOCK = "a block with a name is expected, {name: ...}; allowed names:"


def keys(model: type[BaseModel]) -> str:
    return ", ".join(sorted(model.model_fields))


def names(kind: str) -> str:
    return ", ".join(REGISTRIES[kind].names())


def changed(*changes: tuple[str, str]) -> str:
    """Returns the complete recipe with each (old, new) replaced; `old` must occur once."""
    text = COMPLETE
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def problems(text: str, *overrides: str, model: type = Recipe) -> list[str]:
    document = parse_document(text, "r.yaml")
    for override in overrides:
        apply_override(document, override)
    with pytest.raises(ConfigError) as caught:
        validate(model, document)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def test_a_complete_recipe_is_what_it_says():
    recipe = validate(Recipe, parse_document(COMPLETE, "r.yaml"))
    assert (recipe.name, recipe.train.epochs, recipe.views.augmentation.hue) == ("small", 3, 0.1)
    assert [type(block).__name__ for block in (recipe.dataset, recipe.method, recipe.backbone, recipe.generator)] == [
        "DigitsConfig",
        "SimCLRConfig",
        "ResNet18Config",
        "StableUnCLIPConfig",
    ]
    assert recipe.evaluate[1].draws == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("old", "new", "place", "nearest", "model"),
    [
        ("name: small", "name: small\nsed: 1", "r.yaml:2: sed", "seed", Recipe),
        ("batch_size: 8", "batch_size: 8\n  epoch: 3", "r.yaml:20: train.epoch", "epochs", TrainConfig),
        ("hue: 0.1", "zebra: 1", "r.yaml:10: views.augmentation.zebra", None, PairAugmentationConfig),
        ("temperature: 0.2", "temprature: 0.2", "r.yaml:5: method.temprature", "temperature", SimCLRConfig),
        ("k: 5", "kk: 5", "r.yaml:21: evaluate.0.kk", "k", KNNConfig),
        ("draws: 4", "drawn: 4", "r.yaml:23: evaluate.1.drawn", "draws", FewShotConfig),
        ("{name: digits}", "{name: digits, root: /data}", "r.yaml:2: dataset.root", None, DigitsConfig),
    ],
)
def test_an_unknown_key_meets_its_nearest_match_and_all_keys(old, new, place, nearest, model):
    hint = f"; did you mean {nearest!r}?" if nearest else ";"
    assert problems(changed((old, new))) == [f"{place}: unknown key{hint} allowed: {keys(model)}"]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("epochs: 3", "epochs: many", f"r.yaml:18: train.epochs: 'many': {NOT_AN_INTEGER}"),
        ("epochs: 3", "epochs: yes", f"r.yaml:18: train.epochs: 'yes': {NOT_AN_INTEGER}"),
        ("epochs: 3", "epochs:", "r.yaml:18: train.epochs: None: input should be a valid integer"),
        (
            "epochs: 3",
            "epochs: 2.5",
            "r.yaml:18: train.epochs: 2.5: input should be a valid integer, got a number with a fractional part",
        ),
        ("{warmup_epochs: 1}", "cosine", "r.yaml:16: schedule: 'cosine': a mapping of settings is expected"),
        ("hue: 0.1", "crop_scale: 0.5", "r.yaml:10: views.augmentation.crop_scale: 0.5: a list is expected"),
        ("draws: 4", "draws: [4]", "r.yaml:23: evaluate.1.draws: [4]: input should be a valid integer"),
    ],
)
def test_a_wrong_type(old, new, problem):
    assert problems(changed((old, new))) == [problem]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("epochs: 3", "epochs: 0", "r.yaml:18: train.epochs: 0: input should be greater than or equal to 1"),
        ("temperature: 0.2", "temperature: 0", "r.yaml:5: method.temperature: 0: input should be greater than 0"),
        ("k: 5", "k: 0", "r.yaml:21: evaluate.0.k: 0: input should be greater than or equal to 1"),
        ("lr: 0.1", "lr: .inf", "r.yaml:15: optimizer.lr: inf: input should be a finite number"),
        ("lr: 0.1", "lr: .nan", "r.yaml:15: optimizer.lr: nan: input should be a finite number"),
    ],
)
def test_out_of_range(old, new, problem):
    assert problems(changed((old, new))) == [problem]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "{name: sgd,",
            "{name: adam,",
            "r.yaml:15: optimizer.name: 'adam' is not allowed; did you mean 'adamw'? allowed: adamw, lars, sgd",
        ),
        (
            "probability: 0.5",
            "policy: first",
            "r.yaml:8: views.policy: 'first' is not allowed; allowed: added, both, none, second, third",
        ),
        (
            "per_image: 10",
            "per_image: frsh",
            f"r.yaml:14: variants.per_image: 'frsh': input should be 'fresh', or {NOT_AN_INTEGER}",
        ),
        (
            "per_image: 10",
            "per_image: 0",
            "r.yaml:14: variants.per_image: 0: input should be 'fresh', or input should be greater than or equal to 1",
        ),
    ],
)
def test_a_word_that_is_none_of_the_choices(old, new, problem):
    assert problems(changed((old, new))) == [problem]


@pytest.mark.parametrize(
    ("old", "problem"),
    [
        ("  batch_size: 8\n", "r.yaml:17: train.batch_size: is missing; add it"),
        ("  model: some/model\n", "r.yaml:11: generator.model: is missing; add it"),
        ("backbone: {name: resnet18, width: 16}\n", "r.yaml:1: backbone: is missing; add it"),
    ],
)
def test_a_missing_key(old, problem):
    assert problems(changed((old, ""))) == [problem]


@pytest.mark.parametrize(
    ("old", "new", "place", "nearest", "kind"),
    [
        ("name: simclr", "name: simclar", "r.yaml:4: method.name: 'simclar'", "simclr", "methods"),
        ("name: resnet18", "name: resnet_18", "r.yaml:6: backbone.name: 'resnet_18'", "resnet18", "backbones"),
        ("name: digits", "name: zzz", "r.yaml:2: dataset.name: 'zzz'", None, "datasets"),
        ("name: knn", "name: kn", "r.yaml:21: evaluate.0.name: 'kn'", "knn", "evaluators"),
        ("{name: knn, k: 5}", "kn", "r.yaml:21: evaluate.0.name: 'kn'", "knn", "evaluators"),
    ],
)
def test_an_unknown_component_meets_its_nearest_match_and_all_names(old, new, place, nearest, kind):
    hint = f"; did you mean {nearest!r}?" if nearest else ";"
    assert problems(changed((old, new))) == [f"{place} is not one of the {kind}{hint} allowed: {names(kind)}"]


@pytest.mark.parametrize("written", ["18", "[resnet18]", "{width: 16}", "{name: 18}", "{}", ""])
def test_a_component_is_a_block_with_a_name(written):
    text = changed(("{name: resnet18, width: 16}", written))
    assert problems(text) == [f"r.yaml:6: backbone: {BLOCK} {names('backbones')}"]


def test_a_list_of_components_is_a_list_of_blocks():
    assert problems(changed(("- {name: knn, k: 5}", "- 5"))) == [
        f"r.yaml:21: evaluate.0: {BLOCK} {names('evaluators')}"
    ]
    for written in ("{name: knn}", "knn", ""):
        text = COMPLETE.partition("evaluate:")[0] + f"evaluate: {written}\n"
        assert problems(text) == ["r.yaml:20: evaluate: a list of blocks is expected, [{name: ...}, ...]"]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.epoch=5", f"train.epoch: unknown key; did you mean 'epochs'? allowed: {keys(TrainConfig)}"),
        ("train.epochs=0", "train.epochs: 0: input should be greater than or equal to 1"),
        ("train.epochs=", "train.epochs: None: input should be a valid integer"),
        ("train={epochs: 5}", "train.batch_size: is missing; add it"),
        ("dataset.nme=x", "dataset.nme: unknown key; did you mean 'name'? allowed: name"),
        ("evaluate.0.k=few", f"evaluate.0.k: 'few': {NOT_AN_INTEGER}"),
        ("new.section.deep=1", f"new: unknown key; did you mean 'name'? allowed: {keys(Recipe)}"),
        ("optimizer=sgd", "optimizer: 'sgd': a mapping of settings is expected"),
    ],
)
def test_a_mistake_in_an_override_names_the_override(override, problem):
    assert problems(COMPLETE, override) == [f"override {override!r}: {problem}"]


def test_an_override_mends_the_file():
    document = parse_document(changed(("epochs: 3", "epochs: 0")), "r.yaml")
    apply_override(document, "train.epochs=4")
    assert validate(Recipe, document).train.epochs == 4


def test_all_mistakes_are_reported_at_once():
    text = changed(
        ("name: small", "name: small\nfoo: 1"),
        ("temperature: 0.2", "temperature: warm"),
        ("  model: some/model", "  modl: some/model"),
        ("epochs: 3", "epochs: 0"),
        ("k: 5", "k: 0"),
        ("- name: few_shot", "- name: many_shot"),
    )
    found = problems(text, "views.policy=first")
    assert [line.split(": ")[:2] for line in found] == [
        ["r.yaml:6", "method.temperature"],
        ["r.yaml:12", "generator.model"],
        ["r.yaml:14", "generator.modl"],
        ["r.yaml:22", "evaluate.0.k"],
        ["r.yaml:23", "evaluate.1.name"],
        ["override 'views.policy=first'", "views.policy"],
        ["r.yaml:19", "train.epochs"],
        ["r.yaml:2", "foo"],
    ]


def test_a_broken_block_causes_no_second_complaint():
    assert len(problems(changed(("name: stable_unclip", "name: stable_unclap")))) == 1, "the generator is there"
    server = "generators:\n- {name: stable_unclip}\n"
    assert problems(server, model=ServerFile) == ["r.yaml:2: generators.0.model: is missing; add it"]
    # Whether two broken blocks are the same thing cannot be said yet.
    two = "generators:\n- {name: stable_unclip, model: a}\n- {name: stable_unclip, id: b, size: 1}\n"
    assert [line.split(": ")[1] for line in problems(two, model=ServerFile)] == [
        "generators.1.model",
        "generators.1.size",
    ]


def test_a_name_alone_is_short_for_its_block():
    text = changed(("dataset: {name: digits}", "dataset: digits"), ("- {name: knn, k: 5}", "- knn"))
    recipe = validate(Recipe, parse_document(text, "r.yaml"))
    assert (recipe.dataset.name, recipe.evaluate[0].k) == ("digits", 20)  # type: ignore[attr-defined]
    short = problems(changed(("dataset: {name: digits}", "dataset: folder")))
    assert short == ["r.yaml:2: dataset.root: is missing; add it"]


class Inner(Section):
    size: int = 1


class Outer(Section):
    """What plug-ins may nest."""

    items: list[Inner] = Field(default_factory=list)
    maybe: Inner | None = None
    words: list[Literal["a"] | int] = Field(default_factory=list)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("items:\n- size: 1\n- sise: 2\n", "r.yaml:3: items.1.sise: unknown key; did you mean 'size'? allowed: size"),
        ("items:\n- 5\n", "r.yaml:2: items.0: 5: a mapping of settings is expected"),
        ("maybe:\n  sise: 2\n", "r.yaml:2: maybe.sise: unknown key; did you mean 'size'? allowed: size"),
        ("maybe:\n  size: x\n", f"r.yaml:2: maybe.size: 'x': {NOT_AN_INTEGER}"),
        ("\nwords: [a, b]\n", f"r.yaml:2: words.1: 'b': input should be 'a', or {NOT_AN_INTEGER}"),
    ],
)
def test_key_paths_are_those_of_the_file_however_the_model_nests(text, problem):
    assert problems(text, model=Outer) == [problem]


def test_load_reads_overrides_and_validates(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(COMPLETE)
    assert load(Recipe, path, ["train.epochs=5", "train.epochs=6", "seed=7"]).train.epochs == 6
    with pytest.raises(ConfigError) as caught:
        load(Recipe, path, ["train.epoch=5"])
    assert str(caught.value).startswith("override 'train.epoch=5': train.epoch: unknown key; did you mean 'epochs'?")
    path.write_text(changed(("epochs: 3", "epochs: 0")))
    with pytest.raises(ConfigError) as caught:
        load(Recipe, str(path))
    assert str(caught.value) == f"{path}:18: train.epochs: 0: input should be greater than or equal to 1"


# ---- The files that ship with genssl ----

SHIPPED = sorted(path for folder in ("recipes", "servers") for path in (ROOT / folder).rglob("*.y*ml"))


def test_there_are_files_to_check():
    assert any(path.parent == ROOT / "recipes" for path in SHIPPED)
    assert any(path.parent == ROOT / "recipes" / "generators" for path in SHIPPED)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_file_validates_as_what_its_folder_says(path):
    document = parse_document(path.read_text(), path.name)
    model = model_of(document)
    folder = path.relative_to(ROOT).parts[:-1]
    expected = ServerFile if folder[0] == "servers" else GeneratorRecipe if "generators" in folder else Recipe
    if "studies" in folder or path.name == "online_vs_offline.yaml":
        expected = Study
    if "linear_probe" in folder:
        expected = Protocol
    assert model is expected
    validated = validate(model, document)
    if isinstance(validated, Recipe):
        assert validated.warnings() == []
