"""The built-in flow of the digits keeps classes and makes different images, on sources it never saw."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.svm import SVC

from genssl.generators.configs import FlowConfig
from genssl.generators.flow import Flow
from genssl.generators.models import BUILTIN
from genssl.variants.engine import VariantEngine

FOLDER = BUILTIN / "digits-flow"
SOURCES = 180


@pytest.fixture(scope="module")
def variants(digits_test) -> np.ndarray:
    """Two variants of held-out digits at the settings of recipes/simclr_flow.yaml, uint8 [2, SOURCES, 3, 8, 8]."""
    config = FlowConfig(model="builtin:digits-flow", num_inference_steps=2, embedding_noise=0.3)
    engine = VariantEngine(Flow(config, torch.device("cpu")), [60])
    embeddings, _ = engine.embed([digits_test.image(row) for row in range(SOURCES)])
    settings = engine.complete({})
    made = []
    for index in range(2):
        rows = [engine.row(digits_test.source_id(i), embeddings[i], index, settings) for i in range(SOURCES)]
        made.append(np.concatenate([engine.generate(rows[i : i + 60])[0] for i in range(0, SOURCES, 60)]))
    return np.stack(made)


def test_variants_of_held_out_digits_keep_their_class(variants, digits_train, digits_test):
    def pixels(images) -> np.ndarray:
        return np.stack([np.asarray(image, dtype=float).ravel() / 255 for image in images])

    judge = SVC(C=10).fit(
        pixels(digits_train.image(row) for row in range(len(digits_train))),
        [digits_train.label(row) for row in range(len(digits_train))],
    )
    labels = np.array([digits_test.label(row) for row in range(SOURCES)])
    assert judge.score(pixels(digits_test.image(row) for row in range(SOURCES)), labels) > 0.98
    assert np.mean([(judge.predict(pixels(one)) == labels).mean() for one in variants]) >= 0.93


def test_variants_of_one_source_differ_from_each_other_and_from_it(variants, digits_test):
    images = variants.astype(float) / 255
    sources = np.stack([digits_test.image(row) for row in range(SOURCES)]) / 255
    between = np.sqrt(((images[0] - images[1]) ** 2).mean(axis=1).sum(axis=(1, 2)))
    from_source = np.sqrt(((images[0] - sources) ** 2).mean(axis=1).sum(axis=(1, 2)))
    assert between.mean() > 0.6
    assert between.min() > 0.1
    assert from_source.mean() > 0.6


def test_the_model_is_small_and_has_a_card_and_no_pickle():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}
    assert json.loads((FOLDER / "card.json").read_text())["licence"] == "Apache-2.0"
    card = (FOLDER / "README.md").read_text()
    for words in ("genssl train-generator", "no labels", "Apache-2.0", "label agreement"):
        assert words in card
