"""A token is the text of its file."""

from __future__ import annotations

import pytest

from genssl.client.token_file import read_token_file
from genssl.errors import UserError


def test_the_line_end_is_no_part_of_it(tmp_path):
    (tmp_path / "token").write_text("secret\n")
    assert read_token_file(tmp_path / "token", "--token-file") == "secret"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, r"cannot be read \(No such file"), (b" \n", "holds no token"), (b"\xff\xfe", r"cannot be read \(not text")],
)
def test_a_file_without_a_token_is_one_sentence(tmp_path, content, words):
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    with pytest.raises(UserError, match=rf"variants.token_file: .*/token {words}"):
        read_token_file(tmp_path / "token", "variants.token_file")
