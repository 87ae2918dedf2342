"""How counts are written."""

from __future__ import annotations

import pytest

from genssl.base.wording import counted


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "0 shards"),
        (1, "1 shard"),
        (1.0, "1 shard"),
        (2, "2 shards"),
        (1437, "1,437 shards"),
        (0.5, "0.5 shards"),
        (128e6, "128,000,000 shards"),
        (1234.5, "1,234 shards"),
    ],
)
def test_one_is_singular(number, said):
    assert counted(number, "shard") == said


def test_a_plural_of_its_own():
    assert [counted(number, "class", "classes") for number in (1, 2)] == ["1 class", "2 classes"]
