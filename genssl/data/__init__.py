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
    builtin(__name__, "cifar10", "torchvision_sets:Cifar10", "CIFAR-10, 32x32, 10 classes"),
    builtin(__name__, "cifar100", "torchvision_sets:Cifar100", "CIFAR-100, 32x32, 100 classes"),
    builtin(
        __name__,
        "stl10",
        "torchvision_sets:Stl10",
        "STL-10, 96x96, 10 classes; train split may include the unlabelled images",
    ),
    builtin(__name__, "food101", "torchvision_sets:Food101", "Food-101, 101 classes"),
    builtin(__name__, "places365", "torchvision_sets:Places365", "Places365-Standard, 365 classes"),
    builtin(__name__, "inaturalist2018", "torchvision_sets:INaturalist2018", "iNaturalist 2018, 8,142 classes"),
    builtin(__name__, "imagenet", "torchvision_sets:ImageNet", "ImageNet-1k, 1,000 classes"),
    builtin(__name__, "dtd", "torchvision_files:DTD", "Describable Textures, 47 classes"),
    builtin(__name__, "flowers102", "torchvision_files:Flowers102", "Oxford Flowers, 102 classes"),
    builtin(__name__, "pets", "torchvision_files:Pets", "Oxford-IIIT Pets, 37 classes"),
    builtin(__name__, "aircraft", "torchvision_files:Aircraft", "FGVC-Aircraft, 100 classes"),
    builtin(__name__, "imagenette", "torchvision_files:Imagenette", "Imagenette, 10 classes of ImageNet"),
]
