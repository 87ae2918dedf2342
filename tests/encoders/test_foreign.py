"""The layouts of other tools' checkpoints, by small networks with the same names.

`test_foreign_tools.py` compares with the tools themselves, where they are installed.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_tools import CPU, assert_equal_features, images, loaded, namespace, shaken, state

from genssl.backbones.configs import ResNet18Config, ViTSmallConfig, ViTTinyConfig
from genssl.backbones.resnet import build_resnet
from genssl.backbones.vit import build_vit
from genssl.config.encoder import encoder_block, parse_encoder
from genssl.encoders.load import EncoderError, load_encoder, told_of
from genssl.errors import ConfigError

Weights = dict[str, torch.Tensor]
SIZE, PATCH = 16, 4


def vit_weights(width: int = 192, depth: int = 3, *, layer_scale: bool = False, seed: int = 5) -> Weights:
    """A ViT's tensors by timm's names, drawn at random."""
    draws = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draws)

    weights = {
        "cls_token": drawn(1, 1, width),
        "pos_embed": drawn(1, 1 + (SIZE // PATCH) ** 2, width),
        "patch_embed.proj.weight": drawn(width, 3, PATCH, PATCH) / PATCH,
        "patch_embed.proj.bias": drawn(width),
    }
    for block in range(depth):
        linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for name, (rows, columns) in linears.items():
            scale = (columns * width) ** -0.5
            weights[f"blocks.{block}.{name}.weight"] = scale * drawn(rows * width, columns * width)
            weights[f"blocks.{block}.{name}.bias"] = 0.2 * drawn(rows * width)
        for name in ("norm1", "norm2"):
            weights[f"blocks.{block}.{name}.weight"] = 1 + 0.2 * drawn(width)
            weights[f"blocks.{block}.{name}.bias"] = 0.2 * drawn(width)
        if layer_scale:
            weights |= {f"blocks.{block}.ls{half}.gamma": drawn(width) for half in (1, 2)}
    return weights | {"norm.weight": 1 + 0.2 * drawn(width), "norm.bias": 0.2 * drawn(width)}


def vit_features(weights: Weights, given: torch.Tensor, heads: int, registers: torch.Tensor | None = None) -> Any:
    """The features of a ViT, written down from its papers: no module of genssl is in it."""
    width, count = weights["cls_token"].shape[2], len(given)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    x = F.conv2d(given, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([weights["cls_token"].expand(count, -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    x = x + weights["pos_embed"]
    if registers is not None:
        x = torch.cat([x[:, :1], registers.expand(count, -1, -1), x[:, 1:]], dim=1)
    for block in sorted({name.rpartition(".attn.qkv")[0] for name in weights if ".attn.qkv" in name}):
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        attention = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        y = linear((attention @ v).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        x = x + y * weights.get(f"{block}.ls1.gamma", torch.ones(()))
        y = linear(F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        x = x + y * weights.get(f"{block}.ls2.gamma", torch.ones(()))
    return norm(x, "norm")[:, 0]


def below(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def narrow(seed: int = 4, **settings: Any) -> Any:
    return shaken(build_resnet(ResNet18Config(width=8, **settings)), seed=seed)


# ---- ViTs ----


def test_a_vits_layer_scale_is_not_lost(tmp_path):
    """timm's DINOv2 below a teacher."""
    weights = vit_weights(384, 2, layer_scale=True)
    encoder = loaded(tmp_path / "x.pth", below("teacher.backbone.", weights))
    assert_equal_features(encoder, vit_features(weights, images(SIZE), 6), images(SIZE))
    assert encoder.source["backbone"]["layer_scale"] == 1.0


@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2s_blocks_in_chunks_and_its_registers(tmp_path, chunk, registers):
    weights = vit_weights(depth=4, layer_scale=True)
    theirs = {"mask_token": torch.zeros(1, 192)}
    for name, value in weights.items():
        first, number, rest = (*name.split(".", 2), "", "")[:3]
        theirs[f"blocks.{int(number) // chunk}.{number}.{rest}" if first == "blocks" else name] = value
    tokens = torch.randn(1, registers, 192, generator=torch.Generator().manual_seed(0)) if registers else None
    if tokens is not None:
        theirs["register_tokens"] = tokens
    encoder = loaded(tmp_path / "x.pth", {"teacher": below("backbone.", theirs)})
    assert_equal_features(encoder, vit_features(weights, images(SIZE), 3, tokens), images(SIZE))
    timms = weights | {} if tokens is None else {
        **weights, "reg_token": tokens, "cls_token": weights["cls_token"] + weights["pos_embed"][:, :1],
        "pos_embed": weights["pos_embed"][:, 1:],
    }  # fmt: skip
    again = loaded(tmp_path / "timm.pth", timms)
    assert_equal_features(again, vit_features(weights, images(SIZE), 3, tokens), images(SIZE))


@pytest.mark.parametrize("prefix", ["module.base_encoder.", "base_encoder._orig_mod."])
def test_moco_v3s_small_vit_has_twelve_heads(tmp_path, prefix):
    weights, momentum = vit_weights(384, 2), vit_weights(384, 2, seed=6)
    head = {"head.0.weight": torch.zeros(8, 384), "head.1.running_mean": torch.zeros(8), "head.3.weight": torch.ones(1)}
    content = {
        "arch": "vit_small",
        "state_dict": below(prefix, weights | head) | below(prefix.replace("base", "momentum"), momentum | head),
    }
    encoder = loaded(tmp_path / "x.pth.tar", content)
    assert_equal_features(encoder, vit_features(weights, images(SIZE), 12), images(SIZE))
    assert encoder.source["heads"] == "12 (as MoCo v3's)"
    six = load_encoder(str(tmp_path / "x.pth.tar"), CPU, heads=6, normalize="none")
    assert_equal_features(six, vit_features(weights, images(SIZE), 6), images(SIZE))


def fixed(width: int, *, rows_first: bool) -> torch.Tensor:
    """Sines and cosines of the places, patch by patch."""
    rows = []
    for row in range(SIZE // PATCH):
        for column in range(SIZE // PATCH):
            pair = (row, column) if rows_first else (column, row)
            omega = 10000 ** -(torch.arange(width // 4) / (width // 4))
            rows.append(torch.cat([wave for place in pair for wave in ((place * omega).sin(), (place * omega).cos())]))
    return torch.cat([torch.zeros(1, width), torch.stack(rows)])[None]


@pytest.mark.parametrize(
    ("rows_first", "solo_learn", "heads"), [(True, False, 12), (True, True, 12), (False, True, 12), (False, False, 6)]
)
def test_fixed_positions_tell_moco_v3s_and_solo_learns_vits(tmp_path, rows_first, solo_learn, heads):
    weights = vit_weights(384, 2) | {"pos_embed": fixed(384, rows_first=rows_first)}
    content = below("backbone.", weights)
    if solo_learn:
        content |= {"classifier.weight": torch.zeros(100, 384), "decoder.mask_token": torch.zeros(1, 1, 8)}
    encoder = loaded(tmp_path / "x.ckpt", {"state_dict": content})
    assert_equal_features(encoder, vit_features(weights, images(SIZE), heads), images(SIZE))


def test_heads_are_said_to_be_assumed_and_can_be_given(tmp_path):
    weights = vit_weights(384, 2)
    encoder = loaded(tmp_path / "x.pth", weights)
    assert_equal_features(encoder, vit_features(weights, images(SIZE), 6), images(SIZE))
    assert encoder.source["heads"] == "6 (assumed, one for 64 channels)"
    told = told_of(encoder)
    assert told is not None
    (block,) = shlex.split(told.partition("To say otherwise, change: ")[2])
    assert block == f"{{encoder: {tmp_path / 'x.pth'}, heads: 6, normalize: none}}"
    twelve = load_encoder(block.replace("heads: 6", "heads: 12"), CPU)
    assert_equal_features(twelve, vit_features(weights, images(SIZE), 12), images(SIZE))
    with pytest.raises(EncoderError, match=r"heads: .*there are 384 channels, which 7 heads do not divide"):
        load_encoder(str(tmp_path / "x.pth"), CPU, heads=7)


def test_a_given_vit_has_its_heads_in_its_block(tmp_path):
    weights = vit_weights(384, 2)
    torch.save(weights, tmp_path / "x.pth")
    backbone = f"{{name: vit_small, image_size: {SIZE}, patch_size: {PATCH}, depth: 2, heads: 12}}"
    block = f"{{encoder: {tmp_path / 'x.pth'}, normalize: none, backbone: {backbone}}}"
    assert_equal_features(load_encoder(block, CPU), vit_features(weights, images(SIZE), 12), images(SIZE))
    with pytest.raises(EncoderError, match="heads and stem_padding go with a backbone that is not named"):
        load_encoder(block, CPU, heads=12)


@pytest.mark.parametrize(
    ("extra", "missing", "message"),
    [
        ({"blocks.1.attn.q_norm.weight": torch.ones(64)}, (), r"blocks.1.attn.q_norm.weight left over"),
        ({"dist_token": torch.ones(1, 1, 192)}, (), r"dist_token left over"),
        ({}, ("cls_token",), r"cls_token missing"),
        ({"fc_norm.weight": torch.ones(192)}, ("norm.weight", "norm.bias"), r"norm.weight, norm.bias missing and fc_n"),
        ({"blocks.0.ls1.gamma": torch.ones(192)}, (), r"blocks.0.ls2.gamma, blocks.1.ls1.gamma, .* and 1 more missing"),
        (
            {"reg_token": torch.ones(1, 65, 192), "pos_embed": torch.ones(1, 16, 192)},
            (),
            r"does not hold a ViTTiny: registers: ",
        ),
        ({"pos_embed": torch.ones(1, 1 + 24, 192)}, (), r"3 blocks with positions 1x25x192"),
        ({"pos_embed": torch.ones(1, 1 + 23, 192)}, (), r"a ViT of 192 channels and 3 blocks with positions 1x24x192"),
        ({"pos_embed": torch.ones(1, 16, 192)}, (), r"with positions 1x16x192"),
    ],
)
def test_tensors_without_a_place_and_places_without_tensors_are_named(tmp_path, extra, missing, message):
    weights = {name: value for name, value in (vit_weights() | extra).items() if name not in missing}
    with pytest.raises(EncoderError, match=message) as caught:
        loaded(tmp_path / "x.pth", weights)
    assert "\n" not in str(caught.value)


# ---- ResNets ----


def test_what_is_left_over_of_a_resnet_is_named(tmp_path):
    weights = narrow().state_dict()
    with pytest.raises(EncoderError, match=r"is not a resnet18, with layer1.0.se.conv.weight left over"):
        loaded(tmp_path / "x.pth", weights | {"layer1.0.se.conv.weight": torch.ones(1, 1, 3)})
    heads = {
        "fc.0.weight": torch.ones(2, 2),
        "projection_head.0.weight": torch.ones(2),
        "prototypes.weight": torch.ones(2),
    }
    encoder = loaded(tmp_path / "swav.pth", {f"module.{name}": value for name, value in (weights | heads).items()})
    assert_equal_features(encoder, narrow()(images(32)), images(32))


def test_norms_of_before_torch_counted_their_batches(tmp_path):
    weights = {name: value for name, value in narrow().state_dict().items() if "num_batches" not in name}
    assert_equal_features(loaded(tmp_path / "x.pth", weights), narrow()(images(32)), images(32))


@pytest.mark.parametrize(
    "mark", ["projector.0.weight", "momentum_backbone.x", "prototypes.weight", "head.0.weight", ""]
)
@pytest.mark.parametrize("classes", [10, 100, 37])
def test_solo_learn_is_known_by_more_than_its_classifier(tmp_path, mark, classes):
    """A supervised network with a classifier of this name has an ordinary stem."""
    network = narrow(stem="small")
    content = below("backbone.", network.state_dict()) | {"classifier.weight": torch.zeros(classes, 64)}
    if mark:
        content[mark] = torch.zeros(4)
    encoder = loaded(tmp_path / "x.ckpt", {"state_dict": content})
    solo = bool(mark) and classes in (10, 100)
    assert encoder.source["stem"].endswith("2 (as solo-learn's for CIFAR)" if solo else "1 (assumed)")
    for padding in (1, 2):
        network.conv1.padding = (padding, padding)
        block = f"{{encoder: {tmp_path / 'x.ckpt'}, stem_padding: {padding}, normalize: none}}"
        assert_equal_features(load_encoder(block, CPU), network(images(32)), images(32))
    network.conv1.padding = (2, 2) if solo else (1, 1)
    assert_equal_features(encoder, network(images(32)), images(32))


@pytest.mark.parametrize(
    "settings",
    [
        {"arch": "resnetblur18"},
        {"args": argparse.Namespace(model="resnetaa18.ra_in1k", lr=0.1)},
        {"args": {"model": "timm/resnetblur18"}},
        {"args": argparse.Namespace(model="resnet18", model_kwargs={"output_stride": 16})},
        {"args": argparse.Namespace(model="resnet18", model_kwargs={"act_layer": "silu"})},
    ],
)
def test_a_network_that_calls_itself_another_of_the_same_tensors_is_refused(tmp_path, settings):
    path, network = tmp_path / "x.pth", narrow()
    with pytest.raises(EncoderError, match=r"says that it is .*whose features are others") as caught:
        loaded(path, {"state_dict": network.state_dict()} | settings)
    named = "output" not in str(settings) and "act_layer" not in str(settings)
    assert ("backbone: {name: timm/resnet" in str(caught.value)) == named
    assert "timm/timm/" not in str(caught.value)
    encoder = loaded(path, torch.load(path, weights_only=False), backbone=ResNet18Config(width=8))
    assert_equal_features(encoder, network(images(32)), images(32))


@pytest.mark.parametrize("name", ["resnet18", "resnet50w2", "simclr", "ResNet18", "vit_small", "resnet18.tv_in1k"])
def test_what_a_network_calls_itself_is_said(tmp_path, name):
    network = narrow()
    encoder = loaded(tmp_path / "x.pth", {"arch": name, "state_dict": network.state_dict()})
    assert_equal_features(encoder, network(images(32)), images(32))
    said = told_of(encoder) or ""
    assert f"; says itself: {name}; prefix: " in said
    assert "; blocks: ReLU, strides of the standard network, no anti-aliasing (assumed); stem: " in said


def test_what_no_tensor_tells_of_a_vit_is_said_to_be_assumed(tmp_path):
    said = told_of(loaded(tmp_path / "x.pth", vit_weights())) or ""
    assert "; activation: GELU (assumed); image: " in said
    assert "says itself" not in said
    with pytest.raises(EncoderError, match=r"says that it is vit_tiny_patch4_quickgelu_16"):
        loaded(tmp_path / "x.pth", {"model": vit_weights(), "arch": "vit_tiny_patch4_quickgelu_16"})


# ---- Several networks in a file ----


def test_dinos_full_checkpoint_gives_the_teacher(tmp_path):
    student, teacher = vit_weights(seed=1), vit_weights(seed=2)
    path = tmp_path / "checkpoint.pth"
    content = {
        "student": below("module.backbone.", student) | {"module.head.mlp.0.weight": torch.zeros(2, 2)},
        "teacher": below("backbone.", teacher) | {"head.mlp.0.weight": torch.zeros(2, 2)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        "args": namespace(),
        "dino_loss": {"center": torch.zeros(1, 2)},
    }
    encoder = loaded(path, content)
    assert_equal_features(encoder, vit_features(teacher, images(SIZE), 3), images(SIZE))
    assert encoder.source["prefix"] == "teacher.backbone."
    assert encoder.source["passed over"] == "student.module.backbone."
    for prefix in ("student", "student.module.backbone", "student.module.backbone."):
        other = load_encoder(str(path), CPU, prefix=prefix, normalize="none")
        assert_equal_features(other, vit_features(student, images(SIZE), 3), images(SIZE))
    with pytest.raises(EncoderError, match=r"no network below stu\.; it has student.module.backbone., teacher.backbo"):
        load_encoder(str(path), CPU, prefix="stu")


def test_a_teacher_of_another_kind_is_not_the_students_average(tmp_path):
    content = below("student.", vit_weights()) | below("teacher.", vit_weights(384, 2))
    with pytest.raises(EncoderError, match=r"holds 2 networks, student., teacher.; choose one, such as '\{encoder: "):
        loaded(tmp_path / "x.pth", content)


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
@pytest.mark.parametrize("inner", ["", "module.", "_orig_mod."])
def test_averaged_weights_go_first(tmp_path, key, inner):
    plain, averaged = narrow(1), narrow(2)
    content = {"state_dict" if "state" in key else "model": state(inner, plain), key: state(inner, averaged)}
    encoder = loaded(tmp_path / "x.pth.tar", content | {"arch": "resnet18", "args": namespace()})
    assert_equal_features(encoder, averaged(images(32)), images(32))
    assert encoder.source["prefix"].startswith(f"{key}.")
    plainly = load_encoder(str(tmp_path / "x.pth.tar"), CPU, normalize="none", prefix=min(content, key=len))
    assert_equal_features(plainly, plain(images(32)), images(32))


@pytest.mark.parametrize(
    ("kept", "other"),
    [
        ("module.encoder_q.", "module.encoder_k."),  # MoCo
        ("online_network.", "target_network."),  # BYOL
        ("backbone.", "momentum_backbone."),
        ("backbone.", "backbone_momentum."),
        ("student_backbone.", "momentum_backbone."),
        ("teacher_backbone.", "student_backbone."),
        ("backbone.", "student_backbone."),  # lightly's benchmarks, whose backbone is the teacher
    ],
)
def test_which_network_is_taken(tmp_path, kept, other):
    encoder = loaded(tmp_path / "x.pth", {"state_dict": state(kept, narrow(1)) | state(other, narrow(2))})
    assert_equal_features(encoder, narrow(1)(images(32)), images(32))
    assert encoder.source["passed over"] == f"state_dict.{other}"


def test_a_network_inside_another_is_none_of_its_tensors(tmp_path):
    content = state("model.", narrow(1)) | state("model.momentum.", narrow(2))
    assert_equal_features(loaded(tmp_path / "x.pth", content), narrow(1)(images(32)), images(32))


# ---- Python objects ----


def test_namespaces_are_data_and_nothing_else_is(tmp_path):
    network = narrow()
    encoder = loaded(tmp_path / "x.pth", {"state_dict": network.state_dict(), "args": namespace()})
    assert_equal_features(encoder, network(images(32)), images(32))
    assert argparse.Namespace not in torch.serialization.get_safe_globals(), "allowed for this file alone"
    with pytest.raises(EncoderError, match=r"holds a Python object \(collections.Counter\)|holds a Python object"):
        loaded(tmp_path / "y.pth", {"state_dict": network.state_dict(), "args": argparse.Namespace(x=slice(3))})


@pytest.mark.parametrize("layout", ["state_dict", "teacher and student", "the module itself", "flat"])
def test_the_advice_for_a_file_with_objects_can_be_followed(tmp_path, layout):
    network = narrow()
    content: Any = {
        "state_dict": {"state_dict": network.state_dict(), "hyper_parameters": {"path": Path("/data")}},
        "teacher and student": {
            "teacher": state("backbone.", network), "student": state("backbone.", narrow(9)), "args": slice(1)
        },
        "the module itself": {"model": network, "epoch": 3},
        "flat": OrderedDict(network.state_dict(), extra=slice(1)),
    }[layout]  # fmt: skip
    path = tmp_path / "it's mine.pth"
    torch.save(content, path)
    with pytest.raises(EncoderError, match=r"holds a Python object \(.*take the tensors out into ") as caught:
        load_encoder(str(path), CPU)
    command = str(caught.value).partition("it's mine-tensors.pth: ")[2]
    if layout == "state_dict":
        python = shlex.quote(sys.executable)
        subprocess.run(command.replace("python", python, 1), shell=True, check=True, timeout=100)
    else:  # the same in this process, which has torch loaded
        program, option, code = shlex.split(command)
        assert (program, option) == ("python", "-c")
        exec(code, {})
    encoder = load_encoder(str(tmp_path / "it's mine-tensors.pth"), CPU, normalize="none")
    assert_equal_features(encoder, network(images(32)), images(32))


# ---- The notation ----


def test_a_block_says_what_a_name_alone_does_not():
    assert parse_encoder("runs/x").encoder == "runs/x"
    assert parse_encoder("{encoder: x.pth, heads: 12}").heads == 12
    for name in ("x.pth", "it's: a {file}.pth", "2024", "~/a b.pth"):
        (text,) = shlex.split(encoder_block(name, heads=12))
        assert (parse_encoder(text).encoder, parse_encoder(text).heads) == (str(Path(name).expanduser()), 12)
    with pytest.raises(ConfigError, match=r"encoder '\{encoder: x, prefx: a\}'.*prefx.*prefix"):
        parse_encoder("{encoder: x, prefx: a}")
    with pytest.raises(EncoderError, match=r"torchvision/squeezenet1_1: says itself .* leave the heads out"):
        load_encoder("{encoder: torchvision/squeezenet1_1, heads: 12}", CPU)


@pytest.mark.parametrize("config", [ViTTinyConfig(heads=12), ViTSmallConfig(layer_scale=0.1, registers=2)])
def test_own_vits_have_what_foreign_ones_have(config):
    config = config.model_copy(update={"image_size": SIZE, "patch_size": PATCH, "depth": 2})
    network = shaken(build_vit(config))
    weights = dict(network.state_dict())
    registers = weights.pop("reg_token", None)
    if registers is not None:
        weights["pos_embed"] = torch.cat([torch.zeros(1, 1, config.channels), weights["pos_embed"]], dim=1)
    expected = vit_features(weights, images(SIZE), config.heads or 6, registers)
    torch.testing.assert_close(network(images(SIZE)), expected, atol=1e-4, rtol=1e-4)
