"""Exported encoders, read back as their readers would read them, give the features of the run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from genssl.backbones.configs import ResNet10Config, ResNet18Config, ViTTinyConfig
from genssl.backbones.resnet import build_resnet
from genssl.backbones.vit import build_vit
from genssl.config.base import ComponentConfig
from genssl.generators.conditioner import save_encoder
from genssl.training import export
from genssl.training.encoders import LoadedEncoder, load_encoder
from genssl.training.export import ExportError, export_encoder

sys.path.insert(0, str(Path(__file__).parent))
from trained_networks import lived_in

CPU = torch.device("cpu")


def encoder(folder: Path, config: ComponentConfig, size: int) -> LoadedEncoder:
    network: Any = build_vit(config) if isinstance(config, ViTTinyConfig) else build_resnet(config)  # type: ignore[arg-type]
    folder.mkdir(exist_ok=True)
    save_encoder(folder / "encoder.safetensors", lived_in(network), config, size)
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


def test_the_usage_that_is_printed_works(tmp_path):
    small = encoder(tmp_path / "run", ResNet18Config(stem="small"), 16)
    exported = export_encoder(small, "torchvision", tmp_path / "x.pth")
    names: dict[str, Any] = {"torch": torch, "torchvision": torchvision}
    exec(exported.usage, names)
    assert torch.equal(names["model"].eval()(images(16)), small.module.encode(images(16)))


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
    vit = encoder(tmp_path / "vit", ViTTinyConfig(image_size=16, patch_size=4, depth=2), 16)
    exported = export_encoder(vit, "timm", tmp_path / "vit.pth")
    names: dict[str, Any] = {"torch": torch, "timm": timm}
    exec(exported.usage, names)
    assert torch.allclose(names["model"].eval()(images(16)), vit.module.encode(images(16)), atol=1e-5)


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
    with pytest.raises(
        ExportError, match=r"torchvision has no resnet18 \(stem small, width 4, stages 4\); .* use --to safetensors"
    ):
        export_encoder(narrow, "torchvision", tmp_path / "x.pth")
    with pytest.raises(ExportError, match=r"timm has no resnet18 \(stem small, width 4, stages 4\); "):
        export_encoder(narrow, "timm", tmp_path / "x.pth")
    for to in ("torchvision", "timm"):
        with pytest.raises(ExportError, match=rf"{to} has no resnet18 \(.*, stages 3\); .* and 4 stages"):
            export_encoder(shorter, to, tmp_path / "x.pth")
        with pytest.raises(ExportError, match=rf"{to} has no resnet10 \(.*\); it has .*ResNet-18, -34 and -50"):
            export_encoder(shallower, to, tmp_path / "x.pth")
    foreign = load_encoder("torchvision/squeezenet1_1", CPU)
    with pytest.raises(ExportError, match=r"is no encoder of genssl; export takes run directories"):
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
