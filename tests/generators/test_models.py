"""What of a model's name others may see."""

from __future__ import annotations

import pytest

from genssl.generators.models import shown


@pytest.mark.parametrize("name", ["builtin:digits-unclip", "owner/name", "my-flow", "", "float32", "a photo / " * 500])
def test_what_is_no_path_is_shown_as_it_is(name):
    assert shown(name) == name


def test_a_path_is_shown_by_its_last_part(tmp_path, monkeypatch):
    (tmp_path / "models" / "flow").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "models" / "flow", "models/flow", "models/flow/", "./models/flow", "/not/here/flow"):
        assert shown(str(path)) == "flow"
    assert shown("models/other") == "models/other", "a hub id"
