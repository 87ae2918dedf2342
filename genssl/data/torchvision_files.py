"""Smaller public data sets of image files, as torchvision lays them out: what encoders are transferred to.

Official splits; where a validation part stands beside train and test, it is trained on, as in Kornblith et al. 2019
(arXiv 1805.08974).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchvision import datasets

from genssl.data.base import Split
from genssl.data.configs import DownloadableConfig
from genssl.data.configs import ImagenetteConfig as ImagenetteConfig
from genssl.data.files import FileDataset
from genssl.data.torchvision_sets import by_torchvision
from genssl.errors import DataError

TRAIN = {"train": ("train", "val"), "test": ("test",)}
TRAINVAL = {"train": ("trainval",), "test": ("test",)}


class _TorchvisionFiles(FileDataset):
    """Joins the parts that make up a split.

    Raises:
        DataError: if files are missing or damaged.
    """

    title: str
    kind: Any
    expected: Sequence[str]
    parts: Mapping[str, tuple[str, ...]]

    def __init__(self, config: DownloadableConfig, split: Split) -> None:
        root = config.root.expanduser().absolute()
        files: list[tuple[str, int]] = []
        classes: list[str] = []
        for part in self.parts[split]:
            with by_torchvision(self.title, config, self.expected, self.kind, split=part).opening():
                source = self.kind(root, split=part)
                images = source._images if self.kind is datasets.OxfordIIITPet else source._image_files
                files += [(str(path), int(label)) for path, label in zip(images, source._labels, strict=True)]
                classes = list(source.classes)
        super().__init__(config, files, classes)


class DTD(_TorchvisionFiles):
    """Describable Textures (Cimpoi et al. 2014), partition 1: 3,760 train and 1,880 test images, 47 classes."""

    title, kind, parts = "Describable Textures (DTD)", datasets.DTD, TRAIN
    expected = ("dtd/dtd/labels", "dtd/dtd/images")


class Flowers102(_TorchvisionFiles):
    """Oxford Flowers (Nilsback and Zisserman 2008): 2,040 train and 6,149 test images, 102 classes."""

    title, kind, parts = "Oxford Flowers (102 classes)", datasets.Flowers102, TRAIN
    expected = ("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat")


class Pets(_TorchvisionFiles):
    """Oxford-IIIT Pets (Parkhi et al. 2012): 3,680 train and 3,669 test images, 37 breeds."""

    title, kind, parts = "Oxford-IIIT Pets", datasets.OxfordIIITPet, TRAINVAL
    expected = ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations")


class Aircraft(_TorchvisionFiles):
    """FGVC-Aircraft (Maji et al. 2013): 6,667 train and 3,333 test images, 100 variants."""

    title, kind, parts = "FGVC-Aircraft", datasets.FGVCAircraft, TRAINVAL
    expected = ("fgvc-aircraft-2013b/data",)


class Imagenette(FileDataset):
    """Imagenette (fast.ai): 9,469 train and 3,925 validation images of ten classes of ImageNet.

    Raises:
        DataError: if files are missing or damaged.
    """

    def __init__(self, config: ImagenetteConfig, split: Split) -> None:
        root, part = config.root.expanduser().absolute(), "train" if split == "train" else "val"
        folder = "imagenette2" if config.size == "full" else f"imagenette2-{config.size.removesuffix('px')}"
        expected = [f"{folder}/train", f"{folder}/val"]
        with by_torchvision(
            "Imagenette", config, expected, datasets.Imagenette, split=part, size=config.size
        ).opening():
            source = datasets.Imagenette(root, split=part, size=config.size)
        # torchvision numbers the folders it finds: with other folders the same number is another class.
        found = [{path.name for path in (root / name).glob("*/")} for name in expected]
        if differing := sorted(found[0] ^ found[1]):
            raise DataError(
                f"dataset.root: {root / expected[0]} and {root / expected[1]} must have the same class folders; only "
                f"one of them has {differing[0]} ({len(differing)} differ)"
            )
        super().__init__(config, source._samples, [", ".join(synonyms) for synonyms in source.classes])
