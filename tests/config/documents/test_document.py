"""YAML with line numbers, and overrides upon it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from genssl.config.documents.document import Document, apply_override, dotted, parse_document, read_document
from genssl.errors import ConfigError

TEXT = """\
# a comment
name: x

train:
  epochs: 3
  flow: {a: 1, b: [10,
    20]}
evaluate:
  - name: knn
    k: 5
  - few_shot
"""


ROOT = Path(__file__).resolve().parents[3]
COPY = "genssl recipes copy imagenet/simclr"


def read(text: str, name: str = "f.yaml") -> dict[str, Any]:
    return parse_document(text, name).data


def problem(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_document(text, "f.yaml")
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


# ---- Places ----


def test_every_key_and_list_item_remembers_its_line():
    document = parse_document(TEXT, "f.yaml")
    lines = {dotted(path): place for path, place in document.places.items() if path}
    assert lines == {
        "name": "f.yaml:2",
        "train": "f.yaml:4",
        "train.epochs": "f.yaml:5",
        "train.flow": "f.yaml:6",
        "train.flow.a": "f.yaml:6",
        "train.flow.b": "f.yaml:6",
        "train.flow.b.0": "f.yaml:6",
        "train.flow.b.1": "f.yaml:7",
        "evaluate": "f.yaml:8",
        "evaluate.0": "f.yaml:9",
        "evaluate.0.name": "f.yaml:9",
        "evaluate.0.k": "f.yaml:10",
        "evaluate.1": "f.yaml:11",
    }


def test_what_was_not_written_has_the_place_of_what_it_would_stand_in():
    document = parse_document(TEXT, "f.yaml")
    assert document.where(("evaluate", 0, "temperature")) == "f.yaml:9"
    assert document.where(("train", "batch", "size")) == "f.yaml:4"
    assert document.where(("optimizer", "lr")) == "f.yaml:1"
    assert Document(name="nowhere", data={}).where(("a",)) == "nowhere"


def test_data_are_plain():
    data = read(TEXT)
    assert data == {
        "name": "x",
        "train": {"epochs": 3, "flow": {"a": 1, "b": [10, 20]}},
        "evaluate": [{"name": "knn", "k": 5}, "few_shot"],
    }
    assert (type(data), type(data["evaluate"]), type(data["name"])) == (dict, list, str)


# ---- Scalars ----


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1E+3", 1000.0),
        ("2.", 2.0),
        (".5", 0.5),
        ("-3", -3),
        ("0x1F", 31),
        ("0o17", 15),
        ("0b101", 5),
        ("010", 10),
        ("1_000", 1000),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("none", "none"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("'1e-4'", "1e-4"),
        ('"null"', "null"),
        ("!!str 5", "5"),
        ("{}", {}),
        ("[]", []),
    ],
)
def test_scalars_are_those_of_yaml_1_2(written, value):
    read_value = read(f"key: {written}")["key"]
    assert read_value == value
    assert type(read_value) is type(value)


def test_nan_is_read_in_every_spelling():
    assert all(math.isnan(read(f"key: {spelling}")["key"]) for spelling in (".nan", ".NaN", ".NAN"))


def test_an_alias_repeats_what_its_anchor_holds():
    data = read("a: &x {p: [1]}\nb: *x\n")
    assert data["b"] == {"p": [1]}
    data["b"]["p"].append(2)
    assert data["a"] == {"p": [1]}, "an override of one must not change the other"


# ---- Refusals ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: a: duplicate key; first written on line 1, remove one of them"),
        ("s:\n  a: 1\n\n  a: 2\n", "f.yaml:4: s.a: duplicate key; first written on line 2, remove one of them"),
        ("l:\n- {k: 1, k: 2}\n", "f.yaml:2: l.0.k: duplicate key; first written on line 2, remove one of them"),
        ("", "f.yaml: is empty; a mapping of sections is expected"),
        ("# only a comment\n", "f.yaml: is empty; a mapping of sections is expected"),
        ("- a\n- b\n", "f.yaml:1: a mapping of sections is expected"),
        ("just words\n", "f.yaml:1: a mapping of sections is expected"),
        ("? [a]\n: 1\n", "f.yaml:1: document: keys must be plain words"),
        ("x: &x {p: 1}\ny:\n  <<: *x\n", "f.yaml:3: y: merge keys (<<) are not allowed; write the settings out"),
        ("a: &x\n  - *x\n", "f.yaml:1: a.0: an alias stands inside what it repeats"),
        ("a:\n  b: !!int five\n", "f.yaml:2: a.b: 'five' cannot be read as the YAML type int"),
        ("a: !!bool maybe\n", "f.yaml:1: a: 'maybe' cannot be read as the YAML type bool"),
        ("%YAML 1.1\n---\na: yes\n", "f.yaml:3: a: 'yes' cannot be read as the YAML type bool"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_line(text, expected):
    assert problem(text) == expected


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object:os.system {}",
        "!!python/object/apply:os.system [ls]",
        "!!python/name:str x",
        "!!python/object:int 5",
        "!!binary aGk=",
        "!!set {x, y}",
        "!local [1]",
        "!local 1",
    ],
)
def test_a_tag_is_refused_on_values_of_every_shape(value):
    message = problem(f"name: x\nsection:\n  key: {value}\n")
    assert message.startswith("f.yaml:3: section.key: the tag ")
    assert message.endswith("is not allowed; only plain values are")


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: 1\nb: [1, 2\n", 3), ("a:\n\tb: 1\n", 2), ("a: 1\nb: *nowhere\n", 2), ("a: 1\n---\nb: 2\n", 2)],
)
def test_broken_yaml_is_reported_in_one_line_with_its_place(text, line):
    message = problem(text)
    assert message.startswith(f"f.yaml:{line}: not valid YAML: ")
    assert "\n" not in message


def test_control_characters_are_no_yaml():
    message = problem("a: \x00")
    assert message.startswith("f.yaml: not valid YAML: ")
    assert "\n" not in message


# ---- Files ----


def test_a_missing_file_suggests_its_nearest_neighbour(tmp_path):
    for name in ("simclr_sd.yaml", "byol.yml", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError) as caught:
        read_document(tmp_path / "simclr-sd.yaml")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/simclr-sd.yaml: no such file; ")
    assert f"did you mean '{tmp_path}/simclr_sd.yaml'?" in message
    assert message.endswith(f"allowed: {tmp_path}/byol.yml, {tmp_path}/simclr_sd.yaml")


def test_a_missing_file_without_neighbours_says_so(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_document(tmp_path / "a.yaml")
    assert str(caught.value) == f"{tmp_path}/a.yaml: no such file (no YAML file lies in {tmp_path})"
    with pytest.raises(ConfigError) as caught:
        read_document(tmp_path / "nowhere" / "a.yaml")
    expected = f"{tmp_path}/nowhere/a.yaml: no such file (the folder {tmp_path}/nowhere does not exist)"
    assert str(caught.value) == expected


@pytest.mark.parametrize("name", ["imagenet/simclr", "imagenet/simclr.yaml"])
def test_a_shipped_recipe_is_read_by_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert read_document(Path(name)).data == read_document(ROOT / "recipes" / "imagenet" / "simclr.yaml").data


def test_a_file_of_that_path_wins_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagenet" / "simclr").mkdir(parents=True)
    assert read_document(Path("imagenet/simclr")).data["name"] == "simclr-imagenet"
    (tmp_path / "imagenet" / "byol").write_text("name: mine\n")
    assert read_document(Path("imagenet/byol")).data == {"name": "mine"}


def test_a_path_that_ends_in_a_shipped_name_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_document(Path("recipes/imagenet/simclr.yaml"))
    assert str(caught.value).endswith(
        "no such file; genssl has a recipe of that name: give imagenet/simclr in its place, or copy it with: " + COPY
    )


def test_a_near_miss_of_a_shipped_name_is_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for near, name in {"cifar10/simlcr": "cifar10/simclr", "simclr-sd": "simclr_sd"}.items():
        with pytest.raises(ConfigError, match=f"^{near}: no such file .*; genssl has a recipe {name} "):
            read_document(Path(near))


def test_a_setting_in_place_of_a_file_is_called_that(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^train\.epochs=5: is a setting, and no file of that name is there; "):
        read_document(Path("train.epochs=5"))


def test_the_directory_of_a_run_says_where_its_recipe_is(tmp_path):
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(ConfigError, match=f"directory of a run, whose recipe is {tmp_path}/recipe.yaml$"):
        read_document(tmp_path)


def test_a_folder_or_a_binary_file_cannot_be_read_as_text(tmp_path):
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    for path in (tmp_path, tmp_path / "weights.yaml"):
        with pytest.raises(ConfigError) as caught:
            read_document(path)
        assert str(caught.value).startswith(f"{path}: cannot be read as text: ")


def test_a_file_is_named_as_it_was_given_and_may_have_a_byte_order_mark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_bytes("\ufeffname: Zürich\r\nseed: 1\r\n".encode())
    document = read_document("a.yaml")
    assert document.data == {"name": "Zürich", "seed": 1}
    assert document.where(("seed",)) == "a.yaml:2"


def test_an_address_that_no_yaml_begins_with_is_hinted_at():
    for text, line in (("a: [::1]:50051\n", 1), ("b: 1\na:\n  - [::1]:50051\n", 3)):
        with pytest.raises(ConfigError, match=rf"^f.yaml:{line}: not valid YAML: .* in a file: '\[::1\]:50051'$"):
            parse_document(text, "f.yaml")


# ---- Overrides ----


def overridden(*overrides: str) -> Document:
    document = parse_document(TEXT, "f.yaml")
    for override in overrides:
        apply_override(document, override)
    return document


@pytest.mark.parametrize(
    ("value_text", "value"),
    [
        ("5", 5),
        ("1e-4", 1e-4),
        ("true", True),
        ("none", "none"),
        ("'5'", "5"),
        ("[1, 2]", [1, 2]),
        ("{a: {b: c}}", {"a": {"b": "c"}}),
        ("host:50051", "host:50051"),
        ("[::1]:50051", "[::1]:50051"),
        ("[127.0.0.1:1,[2001:db8::2]:2]", ["127.0.0.1:1", "[2001:db8::2]:2"]),
        ("{address: [::]:0, store: {path: a}}", {"address": "[::]:0", "store": {"path": "a"}}),
        ("'[::1]:50051'", "[::1]:50051"),
        ("a=b", "a=b"),
        ("null", None),
        ("", None),
        (" ", None),
    ],
)
def test_the_value_of_an_override_is_read_as_yaml(value_text, value):
    read_value = overridden(f"train.epochs={value_text}").data["train"]["epochs"]
    assert read_value == value
    assert type(read_value) is type(value)


def test_an_override_reaches_nested_keys_and_list_items_and_leaves_the_rest():
    document = overridden("train.flow.b.1=21", "evaluate.0.k=7", "evaluate.1={name: few_shot}", "name=y")
    assert document.data == {
        "name": "y",
        "train": {"epochs": 3, "flow": {"a": 1, "b": [10, 21]}},
        "evaluate": [{"name": "knn", "k": 7}, {"name": "few_shot"}],
    }


def test_an_override_creates_the_mappings_on_its_way():
    document = overridden("generator.model.revision=abc", "generator.name=g")
    assert document.data["generator"] == {"model": {"revision": "abc"}, "name": "g"}
    filled = parse_document("generator:\n", "f.yaml")
    apply_override(filled, "generator.name=g")
    assert filled.data == {"generator": {"name": "g"}}


def test_digits_are_an_index_in_a_list_and_a_key_in_a_mapping():
    document = overridden("train.5=x", "evaluate.0.007=y")
    assert document.data["train"]["5"] == "x"
    assert document.data["evaluate"][0]["007"] == "y"


def test_the_last_override_of_a_key_counts():
    document = overridden("train.epochs=5", "train={epochs: 6}", "train.epochs=7")
    assert document.data["train"] == {"epochs": 7}


@pytest.mark.parametrize(
    ("override", "paths"),
    [
        ("train.epochs=5", [("train", "epochs")]),
        ("train={epochs: 5}", [("train",), ("train", "epochs"), ("train", "flow", "a")]),
        ("evaluate.0.k=7", [("evaluate", 0, "k")]),
        ("evaluate=[knn, {name: few_shot}]", [("evaluate", 0), ("evaluate", 1, "name"), ("evaluate", 0, "k")]),
        ("a.b.c=1", [("a",), ("a", "b"), ("a", "b", "c"), ("a", "b", "missing")]),
    ],
)
def test_the_place_of_what_an_override_wrote_is_the_override(override, paths):
    document = overridden(override)
    assert {document.where(path) for path in paths} == {f"override {override!r}"}


def test_an_override_leaves_the_places_around_it():
    document = overridden("train.epochs=5", "evaluate.0.k=7")
    assert document.where(("train",)) == "f.yaml:4"
    assert document.where(("train", "flow", "b", 1)) == "f.yaml:7"
    assert document.where(("evaluate", 0, "name")) == "f.yaml:9"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.epochs", "an override is written key.path=value, such as train.epochs=5"),
        ("=5", "an override is written key.path=value, such as train.epochs=5"),
        (" =5", "an override is written key.path=value, such as train.epochs=5"),
        ("train..epochs=5", "an override is written key.path=value, such as train.epochs=5"),
        (".train=5", "an override is written key.path=value, such as train.epochs=5"),
        ("train.epochs.max=5", "train.epochs is 3, which has no keys"),
        ("name.x.y=5", "name is 'x', which has no keys"),
        ("evaluate.2.k=5", "evaluate is a list of 2 items, numbered from 0; '2' is none of them"),
        ("evaluate.2=knn", "evaluate is a list of 2 items, numbered from 0; '2' is none of them"),
        ("evaluate.-1=knn", "evaluate is a list of 2 items, numbered from 0; '-1' is none of them"),
        ("evaluate.first.k=5", "evaluate is a list of 2 items, numbered from 0; 'first' is none of them"),
        ("train=[1", "the value is not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("train=*x", "the value is not valid YAML: found undefined alias 'x'"),
        ("train=!!python/name:str x", None),
        ("train={a: 1, a: 2}", "train.a: duplicate key; first written on line 1, remove one of them"),
    ],
)
def test_an_override_that_cannot_be_applied_is_refused_in_its_own_words(override, problem):
    with pytest.raises(ConfigError) as caught:
        overridden(override)
    if problem is None:
        assert str(caught.value).startswith(f"override {override!r}: train: the tag ")
    else:
        assert caught.value.problems == [f"override {override!r}: {problem}"]
