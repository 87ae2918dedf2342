"""Every metric of every evaluator: how it and its differences are written, and which way is better."""

from __future__ import annotations

import pytest

from genssl.evaluators.units import declared, difference_shown, shown, unit_of

# name, value, as shown, the difference of 0.25 as shown, what is better
METRICS = [
    ("knn/top1", 0.61944, "61.94 %", "+25.00 points", "higher"),
    ("linear_probe/top1", 1.0, "100.00 %", "+25.00 points", "higher"),
    ("finetune/top1", 0.5, "50.00 %", "+25.00 points", "higher"),
    ("few_shot/top1@5", 0.5, "50.00 %", "+25.00 points", "higher"),
    ("few_shot/top1@5_std", 0.0273, "2.73 %", "+25.00 points", None),
    ("few_shot/top1@5_low", 0.5, "50.00 %", "+25.00 points", None),
    ("few_shot/top1@5_high", 0.5, "50.00 %", "+25.00 points", None),
    ("robustness/clean_top1", 0.5, "50.00 %", "+25.00 points", "higher"),
    ("robustness/noise_top1", 0.5, "50.00 %", "+25.00 points", "higher"),
    ("rankme/effective_rank", 320.4567, "320.5", "+0.25 in rankme/effective_rank", None),
    (
        "alignment_uniformity/alignment_real_variant",
        0.72788,
        "0.7279",
        "+0.25 in alignment_uniformity/alignment_real_variant",
        "lower",
    ),
    (
        "alignment_uniformity/uniformity_real",
        -0.72788,
        "-0.7279",
        "+0.25 in alignment_uniformity/uniformity_real",
        "lower",
    ),
    ("frechet/distance", 12345.6, "12,346", "+0.25 in frechet/distance", "lower"),
    ("frechet/distance_of_real", 12.34567, "12.35", "+0.25 in frechet/distance_of_real", None),
    ("prdc/density", 1.0, "1", "+0.25 in prdc/density", "higher"),
    ("prdc/coverage_of_real", 0.5, "0.5", "+0.25 in prdc/coverage_of_real", None),
    ("vendi/per_source", 1.5, "1.5", "+0.25 in vendi/per_source", None),
    ("lpips_diversity/to_source", 0.123456, "0.1235", "+0.25 in lpips_diversity/to_source", None),
    ("semantic_consistency/cosine", 0.5, "0.5", "+0.25 in semantic_consistency/cosine", None),
    ("semantic_consistency/retrieval@1", 0.5, "50.00 %", "+25.00 points", "higher"),
    ("semantic_consistency/label_agreement", 0.5, "50.00 %", "+25.00 points", "higher"),
    ("semantic_consistency/label_agreement_of_real", 0.5, "50.00 %", "+25.00 points", None),
]


@pytest.mark.parametrize(("metric", "value", "text", "difference", "better"), METRICS)
def test_a_value_and_a_difference(metric, value, text, difference, better):
    assert declared(metric) is not None
    assert shown(metric, value) == text
    assert difference_shown(metric, 0.25) == difference
    assert unit_of(metric).better == better


def test_metrics_of_other_packages():
    assert declared("theirs/top1") is None
    assert shown("theirs/top1", 0.5) == "50.00 %"
    assert shown("theirs/accuracy", 0.5) == "50.00 %"
    assert (shown("theirs/loss", 0.5), unit_of("theirs/loss").better) == ("0.5", None)


@pytest.mark.parametrize(("value", "text"), [(0.0, "+0.00"), (-0.0, "+0.00"), (-1e-9, "+0.00"), (-0.012, "-1.20")])
def test_a_difference_has_one_sign(value, text):
    assert unit_of("knn/top1").difference(value) == text
    assert unit_of("rankme/effective_rank").difference(0.0) == "0"
