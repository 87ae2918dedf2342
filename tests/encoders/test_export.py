"""Exported encoders, read back as their readers would read them, give the features of the run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn
from trained_networks import lived_in

from genssl.backbones.configs import ResNet10Config, ResNet18Config, ResNet50Config, ViTTinyConfig
from genssl.backbones.resnet import build_resnet
from genssl.backbones.vit import build_vit
from genssl.config.base import ComponentConfig
from genssl.encoders import export
from genssl.encoders.export import ExportError, export_encoder
from genssl.encoders.load import LoadedEncoder, load_encoder
from genssl.generators.conditioner import save_encoder

CPU = torch.device("cpu")


def encoder(folder: Path, config: ComponentConfig, size: int) -> LoadedEncoder:
    network: Any = build_vit(config) if isinstance(config, ViTTinyConfig) else build_resnet(config)  # type: ignore[arg-type]
    folder.mkdir(exist_ok=True)
    save_encoder(folder / "encoder.safetensors", lived_in(network), config, image_size=str(size))
    return load_encoder(str(folder), CPU)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> LoadedEncoder:
    return encoder(tmp_path_factory.mktemp("narrow"), ResNet18Config(stem="small", width=4), 8)


@pytest.fixture(scope="module")
def standard(tmp_path_factory) -> LoadedEncoder:
    return encoder(tmp_path_factory.mktemp("standard"), ResNet18Config(), 32)


def images(size: int, count: int = 5) -> torch.Tensor:
    return torch.rand((count, 3, size, size), generator=torch.Generator().manual_seed(3))


def test_a_state_dict_is_torchvisions(standard, tmp_path):
    for name in ("x.pth", "x.safetensors"):
        exported = export_encoder(standard, "torchvision", tmp_path / name)
        assert (exported.path, exported.difference) == (tmp_path / name, 0.0)
        network = torchvision.models.resnet18(weights=None)
        network.fc = nn.Identity()
        path = tmp_path / name
        network.load_state_dict(
            load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        )
        assert torch.equal(network.eval()(images(32)), standard.module.encode(images(32)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pth", "x.safetensors"]


RESNETS = [
    (ResNet18Config(stem="small", width=16), 8),  # the README's first run
    (ResNet18Config(stem="small"), 16),
    (ResNet18Config(), 32),
    (ResNet10Config(stem="small", width=4, stages=2), 8),
    (ResNet50Config(width=4, stages=3), 32),
]
VITS = [
    (ViTTinyConfig(image_size=16, patch_size=4, depth=2), 16),
    (ViTTinyConfig(image_size=16, patch_size=4, depth=2, heads=12, layer_scale=0.1, registers=2), 16),
]


# Runs programs as they are printed, but for the draws of images, which become those of the test.
RUNNER = """
import json, runpy, sys, numpy, torch
given, found = torch.load(sys.argv[1]), []
for path, size in json.loads(sys.argv[3]):
    images = given[..., :size, :size].contiguous()
    torch.rand = lambda *shape: images.reshape(shape)
    numpy.random.default_rng = lambda seed: type("Draws", (), {
        "random": lambda self, shape, dtype: images.numpy().astype(dtype).reshape(shape)})()
    found.append(torch.as_tensor(runpy.run_path(path)["features"]))
torch.save(found, sys.argv[2])
"""


@pytest.mark.parametrize("cases", [[0, 3, 5], pytest.param([1, 2, 4, 6], marks=pytest.mark.slow)])
def test_what_is_printed_runs_and_gives_the_features(cases, tmp_path):
    """In one Python of their own for all formats, which spares the imports."""
    programs, expected = [], []
    for number in cases:
        config, size = [*RESNETS, *VITS][number]
        own = encoder(tmp_path / f"run{number}", config, size)
        files: list[tuple[Any, str]] = [("safetensors", "own.safetensors")]
        if config.name.startswith("resnet"):
            files += [("torchvision", "it's.pth"), ("torchvision", "x.safetensors")]
        if (config, size) in VITS + RESNETS[1:3] and find_spec("timm"):
            files += [("timm", "timm.pth"), ("timm", "timm.safetensors")]
        if number in (0, 1, 5) and all(map(find_spec, export.ONNX)):
            files.append(("onnx", "x.onnx"))
        for to, name in files:
            exported = export_encoder(own, to, tmp_path / f"{number}{name}")
            features = own.module.encode(images(32, 2)[..., :size, :size])
            assert f"# Images: float32 [B, 3, {size}, {size}], RGB in [0, 1] and not normalised" in exported.usage
            assert f"Features: float32 [B, {features.shape[1]}]" in exported.usage
            programs.append((str(tmp_path / f"{number}{name}.py"), size))
            expected.append(features)
            Path(programs[-1][0]).write_text(exported.usage)
    torch.save(images(32, 2), tmp_path / "images.pt")
    places = [str(tmp_path / "images.pt"), str(tmp_path / "features.pt"), json.dumps(programs)]
    subprocess.run([sys.executable, "-c", RUNNER, *places], check=True, timeout=250)
    for features, wanted in zip(torch.load(tmp_path / "features.pt"), expected, strict=True):
        torch.testing.assert_close(features, wanted, atol=1e-4, rtol=1e-4)


def test_images_of_any_size_are_said_to_be_so(tmp_path):
    own = encoder(tmp_path / "run", ResNet18Config(stem="small", width=4), 8)
    anywhere = export_encoder(replace(own, image_size=None), "safetensors", tmp_path / "x.safetensors")
    assert "float32 [B, 3, S, S], of any side S, such as 32, RGB in [0, 1] and not normalised" in anywhere.usage
    normalised = load_encoder(f"{{encoder: {tmp_path / 'run'}, normalize: imagenet}}", CPU)
    with pytest.raises(ExportError, match="takes images as they are; leave `normalize` out"):
        export_encoder(normalised, "safetensors", tmp_path / "y.safetensors")


def test_genssls_own_file_is_an_encoder_again(narrow, tmp_path):
    exported = export_encoder(narrow, "safetensors", tmp_path / "x.safetensors")
    again = load_encoder(str(tmp_path / "x.safetensors"), CPU)
    assert torch.equal(again.module.encode(images(8)), narrow.module.encode(images(8)))
    assert (again.image_size, again.source["kind"], exported.difference) == (8, "genssl", 0.0)
    assert export_encoder(again, "safetensors", tmp_path / "y.safetensors").difference == 0.0


def test_timm_loads_what_is_written_for_it(standard, tmp_path):
    timm = pytest.importorskip("timm")
    export_encoder(standard, "timm", tmp_path / "x.safetensors")
    network = timm.create_model("resnet18", num_classes=0)
    network.load_state_dict(load_file(tmp_path / "x.safetensors"))
    assert torch.allclose(network.eval()(images(32)), standard.module.encode(images(32)), atol=1e-5)


def test_onnx_takes_any_batch(narrow, tmp_path):
    for library in ("onnx", "onnxscript"):
        pytest.importorskip(library)
    onnxruntime = pytest.importorskip("onnxruntime")
    exported = export_encoder(narrow, "onnx", tmp_path / "x.onnx")
    assert exported.difference < 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    for count in (1, 7):
        (features,) = session.run(["features"], {"images": images(8, count).numpy()})
        assert torch.allclose(torch.from_numpy(features), narrow.module.encode(images(8, count)), atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]


@pytest.mark.parametrize(("to", "library", "suffix"), [("onnx", "onnx", "onnx"), ("timm", "timm", "pth")])
def test_a_library_that_is_missing_is_named_with_the_way_to_get_it(
    standard, tmp_path, monkeypatch, to, library, suffix
):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ExportError, match=rf"--to {to}: {library} is needed to .*; run `pip install 'genssl\[{to}\]'`"):
        export_encoder(standard, to, tmp_path / f"x.{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_networks_that_a_format_has_not(narrow, tmp_path, tmp_path_factory):
    others = tmp_path_factory.mktemp("others")
    shorter = encoder(others / "shorter", ResNet18Config(stages=3), 32)
    shallower = encoder(others / "shallower", ResNet10Config(), 32)
    with pytest.raises(ExportError, match=r"timm has no resnet18 \(stem small, width 4, stages 4\); "):
        export_encoder(narrow, "timm", tmp_path / "x.pth")
    with pytest.raises(ExportError, match=r"timm has no resnet18 \(.*, stages 3\); .* and 4 stages"):
        export_encoder(shorter, "timm", tmp_path / "x.pth")
    with pytest.raises(ExportError, match=r"timm has no resnet10 \(.*\); it has .*ResNet-18, -34 and -50"):
        export_encoder(shallower, "timm", tmp_path / "x.pth")
    vit = encoder(others / "vit", VITS[0][0], 16)
    with pytest.raises(ExportError, match=r"torchvision has no vit_tiny \(.*\); use --to timm, --to safetensors or --"):
        export_encoder(vit, "torchvision", tmp_path / "x.pth")
    foreign = load_encoder("torchvision/squeezenet1_1", CPU)
    with pytest.raises(ExportError, match=r"is not an encoder of genssl; export takes run directories"):
        export_encoder(foreign, "safetensors", tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_places_where_nothing_can_be_written(narrow, tmp_path):
    with pytest.raises(ExportError, match=r"a file for safetensors ends in \.safetensors"):
        export_encoder(narrow, "safetensors", tmp_path / "x.pth")
    with pytest.raises(ExportError, match=r"nowhere does not exist"):
        export_encoder(narrow, "safetensors", tmp_path / "nowhere" / "x.safetensors")
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(ExportError, match=r"is a directory"):
        export_encoder(narrow, "safetensors", tmp_path / "x.safetensors")


def test_what_comes_back_different_is_not_left_behind(narrow, tmp_path, monkeypatch):
    """A writer that spoils one weight: the file that was there stays as it was."""
    honest = export.write_tensors

    def spoiled(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        honest(path, tensors | {"conv1.weight": tensors["conv1.weight"] + 0.01}, metadata)

    monkeypatch.setattr(export, "write_tensors", spoiled)
    (tmp_path / "x.safetensors").write_text("before")
    for name in ("x.safetensors", "y.safetensors"):
        with pytest.raises(ExportError, match=r"features read back from safetensors differ by .* nothing was written"):
            export_encoder(narrow, "safetensors", tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_text() == "before"
