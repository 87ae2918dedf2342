"""Data sets: uint8 images with a label or none, each named by the digest of its stored bytes."""

from __future__ import annotations

from genssl.registry import builtin

ENTRIES = [
    builtin(__name__, "digits", "digits:Digits", "1,797 scanned digits, 8x8, embedded (no download)"),
    builtin(
        __name__,
        "folder",
        "folder:ImageFolder",
        "any tree of images; labels from sub-folders or none",
        config="configs:FolderConfig",
    ),
    builtin(__name__, "cifar10", "torchvision:Cifar10", "CIFAR-10, 32x32, 10 classes"),
    builtin(__name__, "cifar100", "torchvision:Cifar100", "CIFAR-100, 32x32, 100 classes"),
    builtin(
        __name__,
        "stl10",
        "torchvision:Stl10",
        "STL-10, 96x96, 10 classes; train split may include the unlabelled images",
    ),
    builtin(__name__, "food101", "torchvision:ReleasedFiles", "Food-101, 101 classes", config="configs:Food101Config"),
    builtin(__name__, "places365", "torchvision:Places365", "Places365-Standard, 365 classes"),
    builtin(__name__, "inaturalist2018", "torchvision:INaturalist2018", "iNaturalist 2018, 8,142 classes"),
    builtin(__name__, "imagenet", "torchvision:ImageNet", "ImageNet-1k, 1,000 classes"),
    builtin(
        __name__, "dtd", "torchvision:ReleasedFiles", "Describable Textures, 47 classes", config="configs:DTDConfig"
    ),
    builtin(
        __name__,
        "flowers102",
        "torchvision:ReleasedFiles",
        "Oxford Flowers, 102 classes",
        config="configs:Flowers102Config",
    ),
    builtin(__name__, "pets", "torchvision:ReleasedFiles", "Oxford-IIIT Pets, 37 classes", config="configs:PetsConfig"),
    builtin(
        __name__, "aircraft", "torchvision:ReleasedFiles", "FGVC-Aircraft, 100 classes", config="configs:AircraftConfig"
    ),
    builtin(__name__, "imagenette", "torchvision:Imagenette", "Imagenette, 10 classes of ImageNet"),
]
