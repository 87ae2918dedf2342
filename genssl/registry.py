"""What a recipe can name: methods, backbones, generators, evaluators, data sets.

Built-ins are strings ("module:attribute"), so that listing and validating import neither torch nor diffusers.
A plug-in is either registered by a decorator in code that is already imported,

    @METHODS.register("my_method", config=MyConfig)
    class MyMethod(nn.Module): ...

or found through an entry point of the group `genssl.<kind>`, which is loaded only when its name is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from genssl.errors import UserError, suggest

T = TypeVar("T")

ANY = "<model>"  # an entry "library/<model>" stands for all names "library/..."


@dataclass(frozen=True)
class Entry:
    """One registered name. `target` and `config` are "module:attribute" or the object itself."""

    name: str
    target: Any
    config: Any
    summary: str
    origin: str = "genssl"
    licence: str = ""  # of the weights
    cost: str = ""  # of one result


class UnknownNameError(UserError):
    """A name that no registry entry and no entry point has."""


class PluginError(UserError):
    """A plug-in that is installed but cannot be imported, or is not made as one must be."""


class Registry:
    """Names of one kind, each with the thing it stands for and the pydantic `Config` that validates its block.

    Args:
        kind: plural noun used in messages and as the suffix of the entry-point group, such as "methods".
        builtins: the entries that ship with genssl.
    """

    def __init__(self, kind: str, builtins: list[Entry]) -> None:
        self.kind = kind
        self._entries = {entry.name: entry for entry in builtins}

    def register(
        self, name: str, *, config: Any = None, summary: str = "", licence: str = "", cost: str = ""
    ) -> Callable[[T], T]:
        """Returns a decorator that adds a class or function under `name`.

        Args:
            name: what recipes write.
            config: the block's pydantic model; by default the object's attribute `Config`.
            summary: one line for `genssl list`; by default the first line of the docstring.
            licence, cost: of weights and of one result, for `genssl list -v`.

        Raises:
            ValueError: if the name is taken, or if there is no Config.
        """

        def add(target: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind}: {name!r} is registered already (by {self._entries[name].origin})")
            model = config if config is not None else getattr(target, "Config", None)
            if model is None:
                raise ValueError(f"{self.kind}: {name!r} has no Config; pass config=... or give it an attribute Config")
            text = summary or (target.__doc__ or "").strip().split("\n")[0]
            origin = getattr(target, "__module__", "unknown")
            self._entries[name] = Entry(
                name=name, target=target, config=model, summary=text, origin=origin, licence=licence, cost=cost
            )
            return target

        return add

    def get(self, name: str) -> Any:
        """Returns the registered class or function, importing it now.

        Raises:
            UnknownNameError: with the nearest match and all names.
            PluginError: if it is a plug-in that cannot be imported or has no Config.
        """
        return _load(self._entry(name).target)

    def config(self, name: str) -> Any:
        """Returns the pydantic model that validates a block with this name; imports no heavy library for built-ins.

        Raises:
            UnknownNameError: with the nearest match and all names.
            PluginError: if it is a plug-in that cannot be imported or has no Config.
        """
        return _load(self._entry(name).config)

    def names(self) -> list[str]:
        """Returns every name, entry points included, sorted; loads nothing."""
        return sorted({*self._entries, *self._entry_points()})

    def describe(self) -> list[tuple[str, str, str]]:
        """Returns (name, summary, origin) of every entry, sorted by name; loads nothing."""
        rows = {entry.name: (entry.name, entry.summary, entry.origin) for entry in self._entries.values()}
        for point in self._entry_points().values():
            rows.setdefault(point.name, (point.name, "", point.value.partition(":")[0]))
        return [rows[name] for name in sorted(rows)]

    def details(self) -> dict[str, tuple[str, str]]:
        """Returns licence and cost by name, of the entries that say one of them; loads nothing."""
        entries = self._entries.values()
        return {entry.name: (entry.licence, entry.cost) for entry in entries if entry.licence or entry.cost}

    def _entry_points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=f"genssl.{self.kind}")}

    def _entry(self, name: str) -> Entry:
        if name in self._entries:
            return self._entries[name]
        library, _, model = name.partition("/")
        if model and (entry := self._entries.get(f"{library}/{ANY}")) is not None:
            return entry
        point = self._entry_points().get(name)
        if point is None:
            raise UnknownNameError(f"{name!r} is not one of the {self.kind}{suggest(name, self.names())}")
        try:
            target = point.load()
            if name not in self._entries:  # the plug-in may have used the decorator itself
                self.register(name)(target)
        except ImportError as error:
            raise PluginError(
                f"the plug-in for {name!r} ({point.value}) cannot be imported: {error}; "
                "install what it needs, or uninstall it"
            ) from error
        except Exception as error:  # whatever foreign code raises while it is imported, or has no Config
            raise PluginError(
                f"the plug-in for {name!r} ({point.value}) cannot be used: {type(error).__name__}: {error}; "
                "correct it, or uninstall it"
            ) from error
        return self._entries[name]


def _load(reference: Any) -> Any:
    if not isinstance(reference, str):
        return reference
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _builtin(
    package: str, name: str, attribute: str, config: str, summary: str, *, licence: str = "", cost: str = ""
) -> Entry:
    return Entry(
        name=name,
        target=f"genssl.{package}.{attribute}",
        config=f"genssl.{package}.configs:{config}",
        summary=summary,
        licence=licence,
        cost=cost,
    )


DATASETS = Registry(
    "datasets",
    [
        _builtin(
            "data", "digits", "digits:Digits", "DigitsConfig", "1,797 scanned digits, 8x8, embedded (no download)"
        ),
        _builtin(
            "data",
            "folder",
            "folder:ImageFolder",
            "FolderConfig",
            "any tree of images; labels from sub-folders or none",
        ),
        *(
            _builtin("data", name, f"torchvision_sets:{attribute}", f"{attribute}Config", summary)
            for name, attribute, summary in [
                ("cifar10", "Cifar10", "CIFAR-10, 32x32, 10 classes"),
                ("cifar100", "Cifar100", "CIFAR-100, 32x32, 100 classes"),
                ("stl10", "Stl10", "STL-10, 96x96, 10 classes; train split may include the unlabelled images"),
                ("food101", "Food101", "Food-101, 101 classes"),
                ("places365", "Places365", "Places365-Standard, 365 classes"),
                ("inaturalist2018", "INaturalist2018", "iNaturalist 2018, 8,142 classes"),
                ("imagenet", "ImageNet", "ImageNet-1k, 1,000 classes"),
            ]
        ),
        *(
            _builtin("data", name, f"torchvision_files:{attribute}", f"{attribute}Config", summary)
            for name, attribute, summary in [
                ("dtd", "DTD", "Describable Textures, 47 classes"),
                ("flowers102", "Flowers102", "Oxford Flowers, 102 classes"),
                ("pets", "Pets", "Oxford-IIIT Pets, 37 classes"),
                ("aircraft", "Aircraft", "FGVC-Aircraft, 100 classes"),
                ("imagenette", "Imagenette", "Imagenette, 10 classes of ImageNet"),
            ]
        ),
    ],
)

BACKBONES = Registry(
    "backbones",
    [
        *(
            _builtin(
                "backbones",
                f"resnet{depth}",
                "resnet:build_resnet",
                f"ResNet{depth}Config",
                f"ResNet-{depth} with ImageNet or small-image stem, any width, and fewer stages if wanted",
            )
            for depth in (10, 18, 34, 50)
        ),
        *(
            _builtin(
                "backbones",
                f"vit_{size.lower()}",
                "vit:build_vit",
                f"ViT{size}Config",
                f"ViT-{size} for any image and patch size",
            )
            for size in ("Tiny", "Small", "Base", "Large")
        ),
        _builtin(
            "backbones",
            f"timm/{ANY}",
            "timm:build_timm",
            "TimmConfig",
            "any model of timm, by the extra `timm`; nothing is downloaded",
        ),
    ],
)

GENERATORS = Registry(
    "generators",
    [
        _builtin(
            "generators",
            "stable_unclip",
            "diffusion.stable_unclip:StableUnCLIP",
            "StableUnCLIPConfig",
            "Stable Diffusion unCLIP: image embedding in, image out; any diffusers folder or hub id",
            licence="CreativeML OpenRAIL++-M (Stable Diffusion 2.1); builtin:digits-unclip Apache-2.0",
            # tests/generators/diffusion/test_full_size.py counts the parts, a spec's `tflops` the whole.
            cost="48.7 TFLOP an image as unclip-paper, 91.7 as unclip, 4.24 at 256 px in 10 guided steps",
        ),
        _builtin(
            "generators",
            "flow",
            "flow:Flow",
            "FlowConfig",
            "rectified flow on self-supervised features; train your own",
            licence="of what you train; builtin:digits-flow Apache-2.0",
            cost="0.00011 TFLOP an image as builtin:digits-flow in 4 steps",
        ),
        _builtin(
            "generators",
            "icgan",
            "icgan.generator:ICGAN",
            "ICGANConfig",
            "instance-conditioned GAN, one forward pass: official weights that you bring, or train your own",
            licence="CC BY-NC 4.0 (official weights); builtin:digits-icgan Apache-2.0",
            cost="0.146 TFLOP an image at 256 px, 0.042 at 128, 0.0145 at 64",
        ),
        _builtin(
            "generators",
            "retrieval",
            "retrieval.generator:Retrieval",
            "RetrievalConfig",
            "no model: the source's nearest neighbours in a bank of images, the control for all of them",
        ),
        *(
            Entry(
                name=name,
                target=f"genssl.generators.diffusion.{name}:{attribute}",
                config=f"genssl.generators.diffusion.configs:{attribute}Config",
                summary=summary,
                licence=licence,
            )
            for name, attribute, summary, licence in [
                (
                    "image_variation",
                    "ImageVariation",
                    "Stable Diffusion image variations: CLIP embedding instead of a prompt",
                    "CreativeML OpenRAIL-M (Stable Diffusion 1)",
                ),
                (
                    "ip_adapter",
                    "IPAdapter",
                    "Stable Diffusion 1.5 or SDXL with an IP-Adapter; few-step LoRAs (LCM, Hyper-SD)",
                    "Apache-2.0 (IP-Adapter), OpenRAIL (Stable Diffusion)",
                ),
                (
                    "kandinsky",
                    "Kandinsky",
                    "Kandinsky 2.2's decoder: CLIP bigG embedding in, image out, no text",
                    "Apache-2.0",
                ),
                (
                    "flux2_klein",
                    "Flux2Klein",
                    "FLUX.2 klein: reference image and one constant prompt, 4 steps",
                    "Apache-2.0 (klein 4B)",
                ),
            ]
        ),
    ],
)

METHODS = Registry(
    "methods",
    [
        _builtin("methods", name, f"{name}:{attribute}", f"{attribute}Config", summary)
        for name, attribute, summary in [
            ("simclr", "SimCLR", "SimCLR (Chen et al. 2020, arXiv 2002.05709): NT-Xent over two views"),
            ("simsiam", "SimSiam", "SimSiam (Chen and He 2021, arXiv 2011.10566): predictor and stop-gradient"),
            ("byol", "BYOL", "BYOL (Grill et al. 2020, arXiv 2006.07733): predicts a momentum network"),
            ("barlow_twins", "BarlowTwins", "Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230): decorrelation"),
            ("moco", "MoCo", "MoCo v2+ (He et al. 2020, arXiv 1911.05722; v2: 2003.04297): momentum queue, symmetric"),
            ("vicreg", "VICReg", "VICReg (Bardes et al. 2022, arXiv 2105.04906): variance, invariance, covariance"),
            ("nnclr", "NNCLR", "NNCLR (Dwibedi et al. 2021, arXiv 2104.14548): nearest neighbours as positives"),
            ("dino", "DINO", "DINO (Caron et al. 2021, arXiv 2104.14294): self-distillation, multi-crop"),
        ]
    ],
)

EVALUATORS = Registry(
    "evaluators",
    [
        _builtin(
            "evaluators", "knn", "probes.knn:KNN", "KNNConfig", "cosine k-nearest-neighbour vote on frozen features"
        ),
        _builtin(
            "evaluators",
            "linear_probe",
            "probes.linear_probe:LinearProbe",
            "LinearProbeConfig",
            "logistic regression on frozen features",
        ),
        _builtin(
            "evaluators",
            "few_shot",
            "probes.few_shot:FewShot",
            "FewShotConfig",
            "logistic regression on a few labels a class, over many draws",
        ),
        *(
            _builtin("evaluators", name, f"{place}:{attribute}", f"{attribute}Config", summary)
            for name, place, attribute, summary in [
                (
                    "finetune",
                    "probes.finetune",
                    "Finetune",
                    "a copy of the encoder and a head trained on all or some labels",
                ),
                (
                    "robustness",
                    "probes.robustness",
                    "Robustness",
                    "linear probe under the 15 corruptions of ImageNet-C's kinds",
                ),
                ("rankme", "representation.rankme", "RankMe", "effective rank of the features; needs no labels"),
                (
                    "alignment_uniformity",
                    "representation.alignment_uniformity",
                    "AlignmentUniformity",
                    "on the unit sphere, of real and generated views; needs no labels",
                ),
            ]
        ),
        *(
            Entry(
                name=name,
                target=f"genssl.evaluators.variants.{place}:{attribute}",
                config=f"genssl.evaluators.metric_configs:{attribute}Config",
                summary=summary,
            )
            for name, place, attribute, summary in [
                (
                    "frechet",
                    "frechet",
                    "Frechet",
                    "Frechet distance of variants to real images, beside that of real ones",
                ),
                ("prdc", "prdc", "PRDC", "precision, recall, density and coverage of variants among real images"),
                ("vendi", "vendi", "Vendi", "effective number of different variants, of all and of each source"),
                (
                    "lpips_diversity",
                    "lpips_diversity",
                    "LPIPSDiversity",
                    "perceptual distance between variants, by the extra `metrics`",
                ),
                (
                    "semantic_consistency",
                    "consistency",
                    "SemanticConsistency",
                    "cosine, retrieval and label agreement of variants and their source",
                ),
            ]
        ),
    ],
)

REGISTRIES: dict[str, Registry] = {
    registry.kind: registry for registry in (METHODS, BACKBONES, GENERATORS, EVALUATORS, DATASETS)
}

TRAINABLE = Registry(
    "trainable_generators",
    [
        Entry(
            name=name,
            target=f"genssl.generator_training.{place}",
            config=f"genssl.config.generator_recipes.{recipe}",
            summary=summary,
        )
        for name, place, recipe, summary in [
            ("flow", "flow:FlowTraining", "flow:FlowRecipe", "rectified flow, and its student of few steps"),
            ("icgan", "icgan:ICGANTraining", "icgan:ICGANRecipe", "instance-conditioned GAN"),
            (
                "stable_unclip",
                "unclip:StableUnCLIPTraining",
                "unclip:StableUnCLIPRecipe",
                "miniature Stable unCLIP, an ordinary diffusers folder",
            ),
        ]
    ],
)
"""The `family` of a generator's recipe: a `GeneratorTraining` as target, its `GeneratorRecipe` as config."""
