"""Self-supervised methods, one short file each."""

from __future__ import annotations

from genssl.registry import builtin

ENTRIES = [
    builtin(__name__, "simclr", "simclr:SimCLR", "SimCLR (Chen et al. 2020, arXiv 2002.05709): NT-Xent over two views"),
    builtin(
        __name__,
        "simsiam",
        "simsiam:SimSiam",
        "SimSiam (Chen and He 2021, arXiv 2011.10566): predictor and stop-gradient",
    ),
    builtin(__name__, "byol", "byol:BYOL", "BYOL (Grill et al. 2020, arXiv 2006.07733): predicts a momentum network"),
    builtin(
        __name__,
        "barlow_twins",
        "barlow_twins:BarlowTwins",
        "Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230): decorrelation",
    ),
    builtin(
        __name__,
        "moco",
        "moco:MoCo",
        "MoCo v2+ (He et al. 2020, arXiv 1911.05722; v2: 2003.04297): momentum queue, symmetric",
    ),
    builtin(
        __name__,
        "vicreg",
        "vicreg:VICReg",
        "VICReg (Bardes et al. 2022, arXiv 2105.04906): variance, invariance, covariance",
    ),
    builtin(
        __name__,
        "nnclr",
        "nnclr:NNCLR",
        "NNCLR (Dwibedi et al. 2021, arXiv 2104.14548): nearest neighbours as positives",
    ),
    builtin(__name__, "dino", "dino:DINO", "DINO (Caron et al. 2021, arXiv 2104.14294): self-distillation, multi-crop"),
]
