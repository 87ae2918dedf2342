"""What recipes can name: built-ins, decorated classes, and plug-ins found through entry points."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from genssl.config.base import ComponentConfig
from genssl.config.documents.document import parse_document
from genssl.config.recipe import Recipe
from genssl.config.validate import validate
from genssl.errors import ConfigError
from genssl.registry import REGISTRIES, Entry, Registry, UnknownNameError

ROOT = Path(__file__).resolve().parent.parent


class ToyConfig(ComponentConfig):
    name: str = "toy"


@pytest.fixture
def toys() -> Registry:
    builtin = Entry(name="ball", target="collections:OrderedDict", config="collections:Counter", summary="rolls")
    return Registry("toys", [builtin])


# ---- The decorator ----


def test_a_decorated_class_has_its_name_and_is_returned_unchanged(toys):
    class Train:
        """Runs on rails.

        More about it.
        """

        Config = ToyConfig

    assert toys.register("train")(Train) is Train
    assert toys.get("train") is Train
    assert toys.config("train") is ToyConfig
    assert toys.names() == ["ball", "train"]
    assert toys.describe() == [("ball", "rolls", "genssl"), ("train", "Runs on rails.", __name__)]


def test_config_and_summary_may_be_given_to_the_decorator(toys):
    @toys.register("kite", config=ToyConfig, summary="flies")
    def build_kite() -> str:
        return "kite"

    assert toys.get("kite")() == "kite"
    assert toys.config("kite") is ToyConfig
    assert toys.describe()[1] == ("kite", "flies", __name__)


def test_a_taken_name_is_refused(toys):
    with pytest.raises(ValueError, match=r"^toys: 'ball' is registered already \(by genssl\)$"):
        toys.register("ball", config=ToyConfig)(object)
    toys.register("kite", config=ToyConfig)(ToyConfig)
    with pytest.raises(ValueError, match=rf"^toys: 'kite' is registered already \(by {__name__}\)$"):
        toys.register("kite", config=ToyConfig)(object)
    assert toys.get("kite") is ToyConfig


def test_a_thing_without_a_config_is_refused(toys):
    with pytest.raises(ValueError, match=r"^toys: 'kite' has no Config; pass config="):
        toys.register("kite")(object)
    assert toys.names() == ["ball"]


# ---- Names ----


def test_built_ins_are_imported_when_they_are_asked_for(toys):
    from collections import Counter, OrderedDict

    assert toys.get("ball") is OrderedDict
    assert toys.config("ball") is Counter


@pytest.mark.parametrize("ask", ["get", "config"])
def test_an_unknown_name_meets_its_nearest_match_and_all_names(toys, ask):
    toys.register("kite", config=ToyConfig)(ToyConfig)
    with pytest.raises(UnknownNameError) as caught:
        getattr(toys, ask)("bal")
    assert str(caught.value) == "'bal' is not one of the toys; did you mean 'ball'? allowed: ball, kite"
    with pytest.raises(UnknownNameError) as caught:
        getattr(toys, ask)("xyz")
    assert str(caught.value) == "'xyz' is not one of the toys; allowed: ball, kite"


def test_an_empty_registry_allows_nothing():
    with pytest.raises(UnknownNameError) as caught:
        Registry("toys", []).get("ball")
    assert str(caught.value) == "'ball' is not one of the toys; nothing is allowed here"


# ---- What ships with genssl ----

BUILTINS = [
    (kind, name)
    for kind, registry in REGISTRIES.items()
    for name, _, origin in registry.describe()
    if origin == "genssl"
]


def test_every_kind_has_a_built_in():
    assert {kind for kind, _ in BUILTINS} == {"methods", "backbones", "generators", "evaluators", "datasets"}


@pytest.mark.parametrize(("kind", "name"), BUILTINS)
def test_a_built_in_exists_and_its_config_has_its_name(kind, name):
    assert callable(REGISTRIES[kind].get(name))
    config = REGISTRIES[kind].config(name)
    assert issubclass(config, ComponentConfig)
    assert config is not ComponentConfig
    assert config.model_fields["name"].default == name
    assert config.__doc__, "`genssl list` and readers rely on it"
    assert {row[0]: row[1] for row in REGISTRIES[kind].describe()}[name], "every built-in has a summary"


# ---- Entry points ----

TOY_MODULE = '''
from typing import Literal

from genssl.config.base import ComponentConfig


class ToyConfig(ComponentConfig):
    """Settings of the toy."""

    name: Literal["toy"] = "toy"
    strength: int


class Toy:
    """A toy method."""

    Config = ToyConfig
'''

DECORATED_MODULE = '''
from genssl.registry import METHODS
from toy_plain import ToyConfig


class WoodenConfig(ToyConfig):
    """Settings of the wooden toy."""

    name: str = "wooden"


@METHODS.register("wooden", config=WoodenConfig)
class Wooden:
    """Registered by the decorator, found through the entry point."""
'''

RECIPE = """\
name: with-toy
dataset: digits
method: {name: toy, strength: 3}
backbone: resnet18
variants: {source: none}
optimizer: {lr: 0.1}
train: {epochs: 1, batch_size: 8}
"""


@pytest.fixture
def site(tmp_path) -> Path:
    """A folder like site-packages with an installed distribution that has three plug-ins, one of them broken."""
    folder = tmp_path / "site"
    metadata = folder / "genssl_toys-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / "toy_plain.py").write_text(TOY_MODULE)
    (folder / "toy_decorated.py").write_text(DECORATED_MODULE)
    (folder / "toy_broken.py").write_text("import a_library_that_nobody_has\n")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: genssl-toys\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[genssl.methods]\ntoy = toy_plain:Toy\nwooden = toy_decorated:Wooden\nbroken = toy_broken:Broken\n"
    )
    return folder


def genssl(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "genssl", *arguments],
        env={**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200"},
        cwd=site.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_list_shows_plug_ins_and_where_they_come_from_without_loading_them(site):
    listed = genssl(site, "list", "methods")
    assert (listed.returncode, listed.stderr) == (0, "")
    rows = {line.split()[0]: line for line in listed.stdout.splitlines()[1:]}
    assert rows["toy"].split() == ["toy", "from", "toy_plain"]
    assert rows["wooden"].split()[-1] == "toy_decorated"
    assert rows["broken"].split()[-1] == "toy_broken", "a broken plug-in does not keep the others from being listed"
    assert "from" not in rows["simclr"].split()


def test_a_recipe_names_a_plug_in_like_a_built_in(site):
    (site.parent / "r.yaml").write_text(RECIPE)
    valid = genssl(site, "validate", "r.yaml", "method.strength=4")
    assert (valid.returncode, valid.stdout, valid.stderr) == (0, "r.yaml: valid\n", "")
    shown = genssl(site, "show", "r.yaml")
    assert "strength: 3" in shown.stdout


def test_the_config_of_a_plug_in_judges_its_block(site):
    (site.parent / "r.yaml").write_text(RECIPE)
    refused = genssl(site, "validate", "r.yaml", "method={name: toy, strenth: 3}")
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        "genssl: override 'method={name: toy, strenth: 3}': method.strength: is missing; add it",
        "override 'method={name: toy, strenth: 3}': method.strenth: unknown key; did you mean 'strength'? "
        "allowed: name, strength",
    ]
    misspelt = genssl(site, "validate", "r.yaml", "method.name=toyy")
    assert misspelt.returncode == 2
    assert "'toyy' is not one of the methods; did you mean 'toy'? allowed: " in misspelt.stderr


def test_an_entry_point_may_lead_to_a_decorated_class(site):
    (site.parent / "r.yaml").write_text(RECIPE)
    valid = genssl(site, "validate", "r.yaml", "method.name=wooden")
    assert (valid.returncode, valid.stdout, valid.stderr) == (0, "r.yaml: valid\n", "")


def test_a_plug_in_that_cannot_be_imported_says_what_it_lacks(site):
    (site.parent / "r.yaml").write_text(RECIPE)
    refused = genssl(site, "validate", "r.yaml", "method.name=broken")
    assert refused.returncode == 2
    assert refused.stderr == (
        "genssl: override 'method.name=broken': method.name: the plug-in for 'broken' (toy_broken:Broken) cannot be "
        "imported: No module named 'a_library_that_nobody_has'; install what it needs, or uninstall it\n"
    )


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        (
            "class Config(BaseModel):\n    name: str\nclass Method:\n    Config = Config\n",
            "among the methods cannot be used: its Config is foreign.Config, which does not derive from "
            "genssl.config.base.ComponentConfig; correct that in the plug-in, or uninstall it",
        ),
        (
            "class Method:\n    Config = dict(name='foreign')\n",
            "among the methods cannot be used: its Config is {'name': 'foreign'}, which does not derive from ",
        ),
        (
            "class Method:\n    pass\n",
            "(foreign:Method) cannot be used: ValueError: methods: 'foreign' has no Config; pass config=",
        ),
        ("class Other:\n    pass\n", "(foreign:Method) cannot be used: AttributeError: module 'foreign' has no "),
        ("def (:\n", "(foreign:Method) cannot be used: SyntaxError: "),
    ],
    ids=["other base", "no class", "no config", "no such name", "no python"],
)
def test_a_plug_in_that_is_not_made_as_one_must_be_gets_a_sentence(site, monkeypatch, module, problem):
    (site / "foreign.py").write_text(f"from pydantic import BaseModel\n{module}")
    entry_points = site / "genssl_toys-1.0.dist-info" / "entry_points.txt"
    entry_points.write_text("[genssl.methods]\nforeign = foreign:Method\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "foreign", raising=False)
    monkeypatch.setattr(REGISTRIES["methods"], "_entries", dict(REGISTRIES["methods"]._entries))
    document = parse_document(RECIPE.replace("{name: toy, strength: 3}", "foreign"), "r.yaml")
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, document)
    (said,) = caught.value.problems
    assert said.startswith(f"r.yaml:3: method.name: the plug-in for 'foreign' {problem}")
    with pytest.raises(ConfigError, match="cannot be used"):
        validate(Recipe, document)  # also where it is known by now


def test_without_its_distribution_a_plug_in_is_unknown(site):
    (site.parent / "r.yaml").write_text(RECIPE)
    refused = genssl(site.parent, "validate", str(site.parent / "r.yaml"))
    assert refused.returncode == 2
    assert "'toy' is not one of the methods" in refused.stderr


# ---- A method in a package of its own trains ----

METHOD_MODULE = '''
"""W-MSE's little sister: pulls two views together and keeps the embeddings white, in one short file."""

from typing import Literal

import torch
from torch import nn

from genssl.config.base import ComponentConfig
from genssl.methods.base import StepOutput


class DecorrelateConfig(ComponentConfig):
    """Settings of the method."""

    name: Literal["decorrelate"] = "decorrelate"
    dim: int = 16


class Decorrelate(nn.Module):
    """Squared distance of two views, and distance of the batch's covariance from the identity."""

    Config = DecorrelateConfig

    def __init__(self, config, backbone):
        super().__init__()
        self.backbone, self.feature_dim = backbone, backbone.feature_dim
        self.projector = nn.Linear(backbone.feature_dim, config.dim)

    def step(self, views):
        first, second = (self.projector(self.backbone(view)) for view in views.pair)
        centred = first - first.mean(dim=0)
        covariance = centred.T @ centred / (len(first) - 1)
        loss = (first - second).square().mean() + (covariance - torch.eye(len(covariance))).square().mean()
        return StepOutput(loss)

    def encode(self, images):
        return self.backbone(images)

    def after_step(self, done):
        pass
'''


def test_a_method_of_another_package_trains_from_a_recipe(site, tmp_path):
    (site / "decorrelate.py").write_text(METHOD_MODULE)
    metadata = site / "genssl_toys-1.0.dist-info" / "entry_points.txt"
    metadata.write_text("[genssl.methods]\ndecorrelate = decorrelate:Decorrelate\n")
    (tmp_path / "r.yaml").write_text(
        RECIPE.replace("{name: toy, strength: 3}", "{name: decorrelate, dim: 8}")
        .replace("backbone: resnet18", "backbone: {name: resnet18, stem: small, width: 4}")
        .replace("batch_size: 8", "batch_size: 128, threads: 1")
        + "evaluate: [knn]\n"
    )
    done = genssl(site, "run", "r.yaml", "--out", "out")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0.2 < results["metrics"]["knn/top1"] <= 1, "ten classes: better than chance"
    assert (tmp_path / "out" / "encoder.safetensors").exists()
