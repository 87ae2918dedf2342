"""What a client gives to a trainer."""

from __future__ import annotations

import numpy as np
import pytest

from genssl.client.messages import VariantBatch, read_token_file
from genssl.errors import UserError


def test_a_batch_is_shown_in_one_line():
    """A notebook shows what stands last in a cell, and 64 images have half a million numbers."""
    images = np.zeros((3, 3, 64, 64), np.uint8)
    batch = VariantBatch(images, ["generated", "store", "generated"], [bytes(16)] * 3, 0.25, 1)
    assert repr(batch) == "VariantBatch(3 variants of 3x64x64: 2 generated, 1 store; 0.250 s, 1 retry)"
    one = VariantBatch(images[:1], ["store"], [bytes(16)], 1.0, 0)
    assert repr(one) == "VariantBatch(1 variant of 3x64x64: 1 store; 1.000 s, 0 retries)"
    assert repr(VariantBatch(images[:0], [], [], 0.0, 0)) == (
        "VariantBatch(0 variants of 3x64x64: none; 0.000 s, 0 retries)"
    )


def test_the_line_end_is_no_part_of_a_token(tmp_path):
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
