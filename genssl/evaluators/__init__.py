"""Evaluators of frozen encoders, one short file each."""

from __future__ import annotations

from genssl.registry import builtin

ENTRIES = [
    builtin(__name__, "knn", "probes.knn:KNN", "cosine k-nearest-neighbour vote on frozen features"),
    builtin(__name__, "linear_probe", "probes.linear_probe:LinearProbe", "logistic regression on frozen features"),
    builtin(
        __name__, "few_shot", "probes.few_shot:FewShot", "logistic regression on a few labels a class, over many draws"
    ),
    builtin(
        __name__,
        "finetune",
        "probes.finetune:Finetune",
        "a copy of the encoder and a head trained on all or some labels",
    ),
    builtin(
        __name__,
        "robustness",
        "probes.robustness:Robustness",
        "linear probe under the 15 corruptions of ImageNet-C's kinds",
    ),
    builtin(__name__, "rankme", "representation.rankme:RankMe", "effective rank of the features; needs no labels"),
    builtin(
        __name__,
        "alignment_uniformity",
        "representation.alignment_uniformity:AlignmentUniformity",
        "on the unit sphere, of real and generated views; needs no labels",
    ),
    builtin(
        __name__,
        "frechet",
        "variants.frechet:Frechet",
        "Frechet distance of variants to real images, beside that of real ones",
    ),
    builtin(
        __name__,
        "prdc",
        "variants.prdc:PRDC",
        "precision, recall, density and coverage of variants among real images",
    ),
    builtin(
        __name__,
        "vendi",
        "variants.vendi:Vendi",
        "effective number of different variants, of all and of each source",
    ),
    builtin(
        __name__,
        "lpips_diversity",
        "variants.lpips:LPIPSDiversity",
        "perceptual distance between variants, by the extra `metrics`",
    ),
    builtin(
        __name__,
        "semantic_consistency",
        "variants.consistency:SemanticConsistency",
        "cosine, retrieval and label agreement of variants and their source",
    ),
]
