"""The built-in Stable unCLIP of the digits keeps classes and makes different images, on sources it never saw."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.svm import SVC

from genssl.generators.models import BUILTIN
from genssl.variants.engine import VariantEngine
from genssl.variants.in_process import InProcessSource
from genssl.variants.ledger import Ledger
from genssl.variants.source import VariantRequest

FOLDER = BUILTIN / "digits-unclip"
PER_SOURCE = 3


@pytest.fixture(scope="module")
def variants(unclip, digits_test) -> np.ndarray:
    """Variants of every test digit at the settings of recipes/simclr_sd.yaml, uint8 [PER_SOURCE, 360, 3, 8, 8]."""
    source = InProcessSource(VariantEngine(unclip, [64]), digits_test, Ledger())
    rows = range(len(digits_test))
    return np.stack(
        [
            source.take([VariantRequest(row, digits_test.source_id(row), index) for row in rows]).images
            for index in range(PER_SOURCE)
        ]
    )


def test_variants_of_held_out_digits_keep_their_class(variants, digits_train, digits_test):
    def pixels(images) -> np.ndarray:
        return np.stack([np.asarray(image, dtype=float).ravel() / 255 for image in images])

    judge = SVC(C=10).fit(
        pixels(digits_train.image(row) for row in range(len(digits_train))),
        [digits_train.label(row) for row in range(len(digits_train))],
    )
    labels = np.array([digits_test.label(row) for row in range(len(digits_test))])
    real = judge.score(pixels(digits_test.image(row) for row in range(len(digits_test))), labels)
    assert real > 0.98, "the judge itself must know real digits"
    agreement = np.mean([(judge.predict(pixels(one)) == labels).mean() for one in variants])
    assert agreement >= 0.95


def test_variants_of_one_source_differ_from_each_other_and_from_it(variants, digits_test):
    images = variants.astype(float) / 255
    sources = np.stack([digits_test.image(row) for row in range(len(digits_test))]) / 255
    between = np.sqrt(((images[0] - images[1]) ** 2).mean(axis=1).sum(axis=(1, 2)))
    from_source = np.sqrt(((images[0] - sources) ** 2).mean(axis=1).sum(axis=(1, 2)))
    assert between.mean() > 0.7
    assert between.min() > 0.1
    assert from_source.mean() > 0.7


def test_the_model_is_small_and_has_a_card_and_no_pickle():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= 8 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}
    card = (FOLDER / "README.md").read_text()
    for words in ("genssl train-generator", "no labels", "Apache-2.0", "label agreement"):
        assert words in card
