"""Backbones: networks that map images to features."""

from __future__ import annotations

from genssl.registry import builtin

ENTRIES = [
    *(
        builtin(
            __name__,
            f"resnet{depth}",
            "resnet:build_resnet",
            f"ResNet-{depth} with ImageNet or small-image stem, any width, and fewer stages if wanted",
            config=f"configs:ResNet{depth}Config",
        )
        for depth in (10, 18, 34, 50)
    ),
    *(
        builtin(
            __name__,
            f"vit_{size.lower()}",
            "vit:build_vit",
            f"ViT-{size} for any image and patch size",
            config=f"configs:ViT{size}Config",
        )
        for size in ("Tiny", "Small", "Base", "Large")
    ),
    builtin(
        __name__,
        "timm/<model>",
        "timm:build_timm",
        "any model of timm, by the extra `timm`; nothing is downloaded",
        config="configs:TimmConfig",
    ),
]
