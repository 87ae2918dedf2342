"""Encoders by the classes of other packages: what genssl loads gives their features to 1e-5, or it is refused.

Packages that are not installed are skipped. The code of DINO, DINOv2 and MoCo v3 is no package: it is looked for in the
folders dino, dinov2 and moco-v3 of $GENSSL_REFERENCES. `test_foreign.py` pins the same layouts without them.
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from foreign_tools import CPU, assert_equal_features, images, loaded, namespace, shaken, state
from torch import nn

from genssl.encoders.load import EncoderError, load_encoder


def reference(folder: str, file: str) -> Any:
    """Imports a file of a repository that is no package, against the timm that there is."""
    path = Path(os.environ.get("GENSSL_REFERENCES", "")) / folder
    if "GENSSL_REFERENCES" not in os.environ or not path.is_dir():
        pytest.skip(f"{folder} is not in $GENSSL_REFERENCES")
    if folder in ("moco-v3", "solo-learn"):
        old_timm()
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    return importlib.import_module(file)


def old_timm() -> None:
    """Gives timm the names that MoCo v3 and solo-learn know it by."""
    timm = pytest.importorskip("timm")
    sys.modules["timm.models.layers"] = importlib.import_module("timm.layers")
    sys.modules["timm.models.layers.helpers"] = importlib.import_module("timm.layers.helpers")
    sys.modules["timm.models.registry"] = importlib.import_module("timm.models._registry")
    timm.models.vision_transformer.VisionTransformer.num_tokens = property(lambda self: self.num_prefix_tokens)


def timm_model(name: str, **settings: Any) -> Any:
    return shaken(pytest.importorskip("timm").create_model(name, num_classes=7, **settings))


def features(model: Any, given: torch.Tensor) -> torch.Tensor:
    return model.forward_head(model.forward_features(given), pre_logits=True)


# ---- timm ----

SMALL = {"img_size": 28, "depth": 3}
SAME = [
    ("resnet50", {}, 64),
    ("resnet18", {}, 64),
    ("vit_small_patch16_224", {"img_size": 32, "depth": 3}, 32),
    ("vit_tiny_patch16_224", {"img_size": 48, "depth": 2}, 48),
    ("vit_base_patch16_224", {"img_size": 32, "depth": 2}, 32),
    ("vit_small_patch14_dinov2", SMALL, 28),
    ("vit_small_patch14_reg4_dinov2", SMALL, 28),
]


@pytest.mark.parametrize(("name", "settings", "size"), SAME)
def test_timm(tmp_path, name, settings, size):
    model = timm_model(name, **settings)
    for number, prefix in enumerate(["", "teacher.backbone.", "_orig_mod.module."]):
        encoder = loaded(tmp_path / f"{number}.pth", state(prefix, model))
        assert_equal_features(encoder, features(model, images(size)), images(size))


OTHERS = [  # what timm has that neither ResNet nor ViT of genssl is
    ("resnet50d", {}),
    ("ecaresnet50t", {}),
    ("seresnet50", {}),
    ("resnext50_32x4d", {}),
    ("wide_resnet50_2", {}),
    ("resnetv2_50", {}),
    ("deit_small_distilled_patch16_224", {"img_size": 32}),
    ("vit_small_patch16_rope_224", {}),
    ("deit3_small_patch16_224", {"img_size": 32, "depth": 2}),  # its class token has no position
    ("vit_small_patch16_dinov3", {}),
    ("vit_relpos_small_patch16_224", {}),
    ("beit_base_patch16_224", {"depth": 1}),
    ("vit_base_patch32_clip_224", {"depth": 1}),
    ("vit_base_patch16_siglip_224", {"depth": 1}),
    ("swin_tiny_patch4_window7_224", {}),
    ("xcit_nano_12_p16_224", {}),
    ("vit_small_patch16_18x2_224", {"depth": 1}),
    ("convnext_atto", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), OTHERS)
def test_timm_has_networks_that_are_refused(tmp_path, name, settings):
    timm = pytest.importorskip("timm")
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with pytest.raises(
        EncoderError, match=r"missing|left over|is a ResNet of|is a ViT of|no ResNet and no ViT|is not a re"
    ):
        loaded(tmp_path / "x.pth", timm_model(name, **settings).state_dict())


@pytest.mark.parametrize(
    "settings",
    [{"qk_norm": True}, {"class_token": False, "global_pool": "avg"}, {"global_pool": "avg"}, {"mlp_ratio": 3}],
)
def test_timms_vits_of_another_make_are_refused(tmp_path, settings):
    timm = pytest.importorskip("timm")
    model = shaken(timm.models.VisionTransformer(img_size=32, embed_dim=384, depth=2, num_heads=6, **settings))
    with pytest.raises(
        EncoderError, match=r"is not a vit_small.*(missing|left over)|mlp.fc1.weight is 1152x384|with positions 1x4x384"
    ):
        loaded(tmp_path / "x.pth", model.state_dict())


def test_a_checkpoint_of_a_network_that_timm_alone_has_loads_by_its_name(tmp_path):
    """The advice of a refusal, with timm's own statistics and size."""
    model = timm_model("vit_base_patch16_clip_224.openai", depth=1)
    path = tmp_path / "x.pth"
    torch.save({"state_dict": state("module.", model)}, path)
    with pytest.raises(EncoderError, match=r"norm_pre.weight.* left over.*'\{encoder: .*, backbone: \{name: timm/NAME"):
        load_encoder(str(path), CPU)
    deep = timm_model("resnet26d")
    torch.save({"state_dict": state("module.", deep)}, path)
    encoder = load_encoder(f"{{encoder: {path}, backbone: {{name: timm/resnet26d}}}}", CPU)
    mean, std = (torch.tensor(deep.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert_equal_features(encoder, features(deep, (images(64) - mean) / std), images(64))
    assert encoder.image_size == deep.pretrained_cfg["input_size"][-1]


def test_timms_blurred_resnet_is_known_by_its_name_and_loads_by_it(tmp_path):
    model, path = timm_model("resnetblur18"), tmp_path / "x.pth"
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with pytest.raises(EncoderError, match=r"says that it is resnetblur18") as caught:
        loaded(path, {"arch": "resnetblur18", "state_dict": model.state_dict()})
    (block, *_) = [part for part in shlex.split(str(caught.value).replace(";", " ")) if part.startswith("{encoder")]
    assert_equal_features(load_encoder(block, CPU), features(model, (images(64) - mean) / std), images(64))


def test_timms_training_checkpoint_gives_the_averaged_weights(tmp_path):
    timm_model("resnet18")
    saver_module = importlib.import_module("timm.utils.checkpoint_saver")
    utils = importlib.import_module("timm.utils")
    model = timm_model("vit_small_patch14_dinov2", **SMALL)
    average = utils.ModelEmaV3(model)
    shaken(average.module, seed=9)
    optimizer = torch.optim.AdamW(model.parameters())
    arguments = namespace()
    arguments.model = "vit_small_patch14_dinov2"
    saver = saver_module.CheckpointSaver(
        model, optimizer, args=arguments, model_ema=average, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver._save(str(tmp_path / "checkpoint-1.pth.tar"), 1)
    encoder = load_encoder(str(tmp_path / "checkpoint-1.pth.tar"), CPU, normalize="none")
    assert_equal_features(encoder, features(average.module, images(28)), images(28))
    assert (encoder.source["prefix"], encoder.source["passed over"]) == ("state_dict_ema.", "state_dict.")
    other = load_encoder(str(tmp_path / "checkpoint-1.pth.tar"), CPU, normalize="none", prefix="state_dict")
    assert_equal_features(other, features(model, images(28)), images(28))


# ---- lightly ----


@pytest.mark.parametrize("name", ["resnet-9", "resnet-18", "resnet-34", "resnet-50"])
@pytest.mark.parametrize("splits", [0, 4])
def test_lightlys_own_resnet(tmp_path, name, splits):
    models = pytest.importorskip("lightly.models")
    resnet = shaken(models.ResNetGenerator(name, width=0.25, num_splits=splits)).train().eval()
    backbone = nn.Sequential(*list(resnet.children())[:-1], nn.AdaptiveAvgPool2d(1))
    content = {"state_dict": state("backbone.", backbone) | state("backbone_momentum.", backbone), "epoch": 1}
    encoder = loaded(tmp_path / "x.ckpt", content)
    assert_equal_features(encoder, backbone(images(32)).flatten(1), images(32))
    whole = loaded(tmp_path / "whole.pth", {"state_dict": state("resnet.", resnet)})
    resnet.linear = nn.Identity()
    assert_equal_features(whole, resnet(images(32)), images(32))


def test_lightlys_masked_vit_of_timm(tmp_path):
    timm, modules = pytest.importorskip("timm"), pytest.importorskip("lightly.models.modules")
    vit = timm.create_model("vit_small_patch16_224", img_size=32, depth=2, num_classes=0)
    student, teacher = (shaken(modules.MaskedVisionTransformerTIMM(vit=vit), seed=seed) for seed in (1, 2))
    content = {"state_dict": state("student_backbone.", student) | state("teacher_backbone.", teacher)}
    assert_equal_features(loaded(tmp_path / "x.ckpt", content), teacher(images(32)), images(32))


def test_lightlys_children_of_torchvisions_resnet(tmp_path):
    pytest.importorskip("lightly")
    backbone = shaken(nn.Sequential(*list(torchvision.models.resnet50().children())[:-1]))
    assert_equal_features(
        loaded(tmp_path / "x.ckpt", state("backbone.", backbone)), backbone(images(64)).flatten(1), images(64)
    )


# ---- solo-learn ----


def solo_learn(method: str, backbone: str, dataset: str, classes: int, **settings: Any) -> Any:
    """Builds a method of solo-learn as its main_pretrain.py does."""
    omegaconf = pytest.importorskip("omegaconf")
    methods = reference("solo-learn", "solo.methods")
    kwargs = {"proj_hidden_dim": 16, "proj_output_dim": 8, "pred_hidden_dim": 16, "temperature": 0.2, "lamb": 0.1,
              "scale_loss": 0.1, "queue_size": 16, "num_prototypes": 8, "clip_grad": 0, "freeze_last_layer": 1,
              "norm_last_layer": True, "use_bn_in_head": False, "mask_ratio": 0.75, "decoder_embed_dim": 16,
              "decoder_depth": 1, "decoder_num_heads": 2, "norm_pix_loss": False, "sinkhorn": 1}  # fmt: skip
    cfg = {
        "name": "x", "method": method, "backbone": {"name": backbone, "kwargs": settings}, "max_epochs": 2,
        "data": {"dataset": dataset, "num_classes": classes, "num_large_crops": 2, "num_small_crops": 0},
        "optimizer": {"name": "sgd", "batch_size": 4, "lr": 0.1, "weight_decay": 0, "classifier_lr": 0.1,
                      "kwargs": {}},
        "scheduler": {"name": "none"}, "method_kwargs": kwargs,
        "momentum": {"base_tau": 0.99, "final_tau": 1.0},
    }  # fmt: skip
    return shaken(methods.METHODS[method](omegaconf.OmegaConf.create(cfg)), keep="pos_embed")


@pytest.mark.parametrize("method", ["simclr", "byol", "barlow_twins", "mocov2plus", "mocov3", "dino", "vicreg"])
@pytest.mark.parametrize(("dataset", "classes"), [("cifar10", 10), ("cifar100", 100), ("stl10", 10)])
def test_solo_learns_resnets(tmp_path, method, dataset, classes):
    model = solo_learn(method, "resnet18", dataset, classes)
    encoder = loaded(tmp_path / "x.ckpt", {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.1.2"})
    assert_equal_features(encoder, model.backbone(images(64)), images(64))
    said = encoder.source["stem"]
    assert ("padded by 2 (as solo-learn's for CIFAR)" in said) == dataset.startswith("cifar")


@pytest.mark.parametrize("method", ["simclr", "mocov3", "mae", "dino"])
@pytest.mark.parametrize("backbone", ["vit_tiny", "vit_small"])
def test_solo_learns_vits(tmp_path, method, backbone):
    model = solo_learn(method, backbone, "imagenet100", 100, img_size=32, patch_size=8)
    encoder = loaded(tmp_path / "x.ckpt", {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.1.2"})
    assert_equal_features(encoder, model.backbone(images(32)), images(32))


# ---- DINO, DINOv2, MoCo v3 ----


@pytest.mark.parametrize("name", ["vit_tiny", "vit_small"])
def test_dinos_full_checkpoint_gives_the_teacher(tmp_path, name):
    utils, vits = reference("dino", "utils"), reference("dino", "vision_transformer")
    student, teacher = (
        shaken(utils.MultiCropWrapper(backbone, vits.DINOHead(backbone.embed_dim, 16)), seed=seed)
        for seed in (1, 2)
        for backbone in [getattr(vits, name)(patch_size=16, img_size=[32])]
    )
    content = {
        "student": state("module.", student),
        "teacher": teacher.state_dict(),
        "optimizer": torch.optim.AdamW(student.parameters()).state_dict(),
        "epoch": 100,
        "args": namespace(),
        "dino_loss": {"center": torch.zeros(1, 16)},
    }
    path = tmp_path / "checkpoint.pth"
    encoder = loaded(path, content)
    assert_equal_features(encoder, teacher.backbone(images(32)), images(32))
    assert encoder.source["passed over"] == "student.module.backbone."
    other = load_encoder(f"{{encoder: {path}, prefix: student}}", CPU, normalize="none")
    assert_equal_features(other, student.backbone(images(32)), images(32))


@pytest.mark.parametrize("chunks", [0, 1, 4])
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2(tmp_path, chunks, registers):
    vits = reference("dinov2", "dinov2.models.vision_transformer")
    model = shaken(
        vits.vit_small(patch_size=14, num_register_tokens=registers, img_size=28, init_values=1.0, block_chunks=chunks)
    )
    for number, content in enumerate([model.state_dict(), {"teacher": state("backbone.", model)}]):
        encoder = loaded(tmp_path / f"{number}.pth", content)
        assert_equal_features(encoder, model(images(28)), images(28))
        assert encoder.source["backbone"]["registers"] == registers
    swiglu = vits.vit_small(patch_size=14, img_size=28, init_values=1.0, block_chunks=0, ffn_layer="swiglu")
    with pytest.raises(
        EncoderError, match=r"blocks.0.mlp.fc1.weight.* missing and blocks.0.mlp.w12.weight.* left over"
    ):
        loaded(tmp_path / "swiglu.pth", swiglu.state_dict())


@pytest.mark.parametrize("name", ["vit_small", "vit_base"])
@pytest.mark.parametrize("keep", ["pos_embed", "nothing"])
def test_moco_v3s_vits(tmp_path, name, keep):
    vits, builder = reference("moco-v3", "vits"), reference("moco-v3", "moco.builder")
    make = lambda num_classes: getattr(vits, name)(img_size=32, num_classes=num_classes)  # noqa: E731
    model = shaken(builder.MoCo_ViT(make, 16, 32, 0.2), keep=keep)
    content = {"epoch": 1, "arch": name, "state_dict": state("module.", model), "optimizer": {}}
    encoder = loaded(tmp_path / "x.pth.tar", content)
    expected = features(model.base_encoder, images(32))
    assert_equal_features(encoder, expected, images(32))
    assert encoder.source["heads"] == "12 (as MoCo v3's)"
    assert encoder.source["prefix"] == "state_dict.module.base_encoder."
    plain = loaded(tmp_path / "plain.pth", model.base_encoder.state_dict(), heads=12)
    assert_equal_features(plain, expected, images(32))


def test_moco_v3s_resnet(tmp_path):
    builder = reference("moco-v3", "moco.builder")
    model = shaken(builder.MoCo_ResNet(lambda **settings: torchvision.models.resnet50(**settings), 16, 32, 0.2))
    encoder = loaded(tmp_path / "x.pth.tar", {"state_dict": state("module.", model)})
    model.base_encoder.fc = nn.Identity()
    assert_equal_features(encoder, model.base_encoder(images(64)), images(64))


def test_moco_v3s_convolutional_stem_is_refused(tmp_path):
    vits = reference("moco-v3", "vits")

    def stem(img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any) -> Any:
        return vits.ConvStem(img_size, patch_size, in_chans, embed_dim)

    model = vits.VisionTransformerMoCo(embed_dim=384, depth=2, num_heads=12, embed_layer=stem)
    with pytest.raises(EncoderError, match=r"no ResNet and no ViT"):
        loaded(tmp_path / "x.pth", model.state_dict())
