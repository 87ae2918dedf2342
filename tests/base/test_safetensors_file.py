"""Files of weights: equal runs write equal bytes, and no reader takes one that has changed since."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from genssl.backbones.configs import ResNet10Config, ResNet18Config
from genssl.backbones.resnet import build_resnet
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.encoders import load as encoders
from genssl.encoders.export import export_encoder
from genssl.errors import UserError
from genssl.generators import conditioner
from genssl.generators.conditioner import load_encoder, save_encoder

CPU = torch.device("cpu")
CONFIG = ResNet10Config(stem="small", width=8, stages=1)
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits" / "simclr.yaml"


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "encoder.safetensors"
    save_encoder(path, build_resnet(CONFIG), CONFIG, image_size="8")
    return path


def flipped(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def values(path: Path) -> tuple[object, ...]:
    network, config, size = load_encoder(path)
    return [(name, value.tolist()) for name, value in network.state_dict().items()], config, size


def test_equal_runs_write_equal_bytes(tmp_path):
    """The library orders metadata by chance, anew for every file as for every process."""
    network, recipe = build_resnet(CONFIG), load(Recipe, RECIPE)
    for run in range(16):
        save_encoder(tmp_path / f"{run}.safetensors", network, recipe.backbone, recipe=recipe.name)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_no_flipped_bit_of_an_encoder_changes_what_is_read(encoder):
    content, written = encoder.read_bytes(), values(encoder)
    header = 8 + int.from_bytes(content[:8], "little")
    refused = dict.fromkeys([*range(0, header, 61), *range(header, len(content), len(content) // 200)], "")
    for position in refused:
        flipped(encoder, position)
        try:
            assert values(encoder) == written, f"byte {position} has changed without a word"
        except UserError as error:
            refused[position] = str(error)
        encoder.write_bytes(content)
    damaged = [text for position, text in refused.items() if position >= header]
    assert len(damaged) > 100
    assert all("encoder.safetensors: cannot be read as safetensors (the file is damaged" in text for text in damaged)


@pytest.mark.parametrize("to", ["safetensors", "torchvision"])
def test_exported_weights_are_checked_by_who_reads_them(encoder, tmp_path, to):
    if to == "torchvision":  # which has one width only
        config = ResNet18Config(stem="small")
        save_encoder(encoder, build_resnet(config), config, image_size="8")
    exported = tmp_path / "exported.safetensors"
    export_encoder(encoders.load_encoder(str(encoder.parent), CPU), to, exported)
    encoders.load_encoder(str(exported), CPU)
    flipped(exported, exported.stat().st_size - 7)
    with pytest.raises(UserError, match=r"exported.safetensors: cannot be read as safetensors \(the file is damaged"):
        encoders.load_encoder(str(exported), CPU)


def test_files_without_a_digest_are_read_as_before(encoder):
    written = values(encoder)
    with safe_open(encoder, framework="pt") as file:
        metadata = file.metadata()
    older = {name: metadata[name] for name in ("backbone", "image_size", "format")}
    save_file(load_file(encoder), encoder, older)
    assert values(encoder) == written


def test_tensors_of_every_kind_come_back(tmp_path):
    from genssl.base.safetensors_file import read_tensors, write_tensors

    tensors = {
        "half": torch.randn(3, 2).to(torch.bfloat16),
        "transposed": torch.randn(3, 2).T,
        "one": torch.tensor(7),
        "none": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
        "größe": torch.arange(3),
    }
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors, {"b": "2", "a": "größe"})
    found, metadata = read_tensors(path)
    assert metadata == {"a": "größe", "b": "2"}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert all(torch.equal(load_file(path)[name], tensor) for name, tensor in tensors.items()), "others read it too"
    end = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert list(json.loads(path.read_bytes()[8:end])["__metadata__"]) == ["a", "b", "genssl_digest"]
    assert end % 8 == 0


def test_metadata_is_covered_too(tmp_path, encoder):
    """An encoder that is shown images of another size gives other features, with the same weights."""
    content = encoder.read_bytes()
    encoder.write_bytes(content.replace(b'"image_size":"8"', b'"image_size":"9"'))
    assert encoder.read_bytes() != content
    with pytest.raises(UserError, match="is damaged"):
        conditioner.Conditioner.load(encoder.parent, CPU)


def test_a_digest_is_of_the_names_too(tmp_path):
    from genssl.base.safetensors_file import digest_of, read_tensors, write_tensors

    one, two = torch.zeros(2), torch.ones(2)
    assert digest_of({"a": one, "b": two}, {}) != digest_of({"a": two, "b": one}, {})
    write_tensors(tmp_path / "x.safetensors", {"a": one, "b": two})
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content.replace(b'"a":', b'"c":'))
    with pytest.raises(SafetensorError, match="is damaged"):
        read_tensors(tmp_path / "x.safetensors")
