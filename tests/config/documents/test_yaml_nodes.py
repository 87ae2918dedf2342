"""What a YAML text may come to; the limits are set low here, and the texts lie just above them."""

from __future__ import annotations

from typing import Any

import pytest

from genssl.config.documents.document import _Reader, apply_override, parse_document, read_document
from genssl.errors import ConfigError


def read(text: str) -> dict[str, Any]:
    return parse_document(text, "f.yaml").data


def problem(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_document(text, "f.yaml")
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


@pytest.fixture
def low_limits(monkeypatch):
    monkeypatch.setattr("genssl.config.documents.yaml_nodes.MAX_VALUES", 40)
    monkeypatch.setattr("genssl.config.documents.yaml_nodes.MAX_DEPTH", 5)


def doubling(count: int) -> str:
    """Each list repeats the one before twice; the last comes to 3 * 2**count - 1 values."""
    return "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, count + 1))


@pytest.mark.usefixtures("low_limits")
@pytest.mark.parametrize(
    ("fits", "too_much", "line", "limit"),
    [
        ("a: [[[x]]]", "a: [[[[x]]]]", 1, "is nested more than 5 levels deep"),
        ("a:\n b:\n  c:\n   d: 1", "a:\n b:\n  c:\n   d:\n    e: 1", 5, "is nested more than 5 levels deep"),
        ("k: &k [[x]]\na: [*k]", "k: &k [[x]]\na:\n- [*k]", 3, "is nested more than 5 levels deep"),
        (f"a: [{'x, ' * 37}]", f"a:\n- [{'x, ' * 36}\n x, x]", 3, "holds more than 40 keys and values"),
        ("k: &k [1, 2]\na: [*k, *k, *k]", f"k: &k [1, 2]\na: [{'*k, ' * 14}]", 2, "holds more than 40 keys and values"),
    ],
)
def test_text_is_read_up_to_a_limit(fits, too_much, line, limit):
    assert read(fits)
    message = problem(too_much)
    assert message.startswith(f"f.yaml:{line}: the text {limit}")
    assert "\n" not in message


def test_what_aliases_repeat_is_counted_before_it_is_repeated(monkeypatch):
    """The values that are made stay within the limit, whatever the text would come to."""
    made = 0
    scalar = _Reader._scalar

    def counted(self, *arguments):
        nonlocal made
        made += 1
        return scalar(self, *arguments)

    monkeypatch.setattr(_Reader, "_scalar", counted)
    assert problem(doubling(15)).startswith("f.yaml:14: the text holds more than 20000 keys and values, what aliases ")
    assert made == 0


def test_a_text_is_of_bounded_length(tmp_path, monkeypatch):
    monkeypatch.setattr("genssl.config.documents.yaml_nodes.MAX_CHARACTERS", 100)
    monkeypatch.setattr("genssl.config.documents.document.MAX_CHARACTERS", 100)
    path = tmp_path / "f.yaml"
    path.write_text("a: 1".ljust(100))
    assert read_document(path).data == {"a": 1}
    path.write_text("a: 1".ljust(101))
    with pytest.raises(ConfigError, match=r"f\.yaml:1: the text has more than 100 characters$"):
        read_document(path)


@pytest.mark.parametrize("number", [2**64 - 1, -(2**63), 0])
@pytest.mark.parametrize("written", [str, hex, oct])
def test_integers_of_64_bits_are_read(number, written):
    assert read(f"a: {written(number)}") == {"a": number}


@pytest.mark.parametrize("written", [str(2**64), str(-(2**63) - 1), hex(2**64), "1" * 4301, "0x" + "f" * 4000])
def test_larger_integers_are_refused(written):
    message = problem(f"x: 1\na:\n  b: {written}\n")
    assert message.startswith("f.yaml:3: a.b: the integer ")
    assert message.endswith(" is too large; those from -2**63 to 2**64 - 1 are read (quote what is text)")
    assert len(message) < 200


@pytest.mark.usefixtures("low_limits")
@pytest.mark.parametrize("override", ["a=[[[[[[1]]]]]]", f"a=[{'1, ' * 41}]", f"a={2**64}"])
def test_overrides_have_the_same_limits(override):
    document = parse_document("a: 1\n", "f.yaml")
    with pytest.raises(ConfigError, match=r"^override 'a=.*(the text (is nested|holds) more than|is too large)"):
        apply_override(document, override)
    assert document.data == {"a": 1}


def test_the_key_path_of_an_override_is_of_bounded_depth():
    with pytest.raises(ConfigError, match=r"the key path has 51 parts; at most 50 are allowed"):
        apply_override(parse_document("a: 1\n", "f.yaml"), f"{'.'.join('b' * 51)}=1")
