"""A generator's name covers what is loaded and nothing else, and stores made under its former name are found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_own_unclip, build_tiny_unclip
from tiny_flow import build_tiny_flow

from genssl.base.safetensors_file import header_bytes
from genssl.generators.configs import FlowConfig, ICGANConfig, StableUnCLIPConfig
from genssl.generators.fingerprint import fingerprint_file, fingerprint_folder, network_files
from genssl.generators.open import open_generator
from genssl.generators.retrieval.configs import InterpolationConfig

CPU = torch.device("cpu")
FACTS = ("stable_unclip/1", "float32", "zero_snr=True", "preprocess=clip/2")  # of a config's defaults


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return build_tiny_unclip(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def original(tiny) -> bytes:
    return named(tiny)


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def named(folder: Path, known: tuple[str, ...] = (), **settings) -> bytes:
    config = StableUnCLIPConfig(model=str(folder), num_inference_steps=1, **settings)
    return open_generator(config, CPU, known).spec.fingerprint


def flip(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2, sort_keys=True) + "\n")


def clutter(folder: Path) -> None:
    """Puts into a model's folder what no loader reads."""
    (folder / "notes.txt").write_text("mine")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"weights")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"others")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"unused")
    (folder / "tokenizer" / "notes.json").write_text("{}")


@pytest.mark.parametrize(
    ("config", "fingerprint"),
    [
        (StableUnCLIPConfig(model="builtin:digits-unclip"), "fbe9cbd5e59448384e2ad3e791208763"),
        (FlowConfig(model="builtin:digits-flow"), "60e58766867ed96757b59b2614efafe4"),
        (ICGANConfig(model="builtin:digits-icgan"), "6208ae415554a3b9fa72d0eda8556bdd"),
    ],
)
def test_the_built_in_generators_keep_their_names(config, fingerprint):
    spec = open_generator(config, CPU).spec
    assert spec.fingerprint.hex() == fingerprint
    assert spec.former is not None
    assert spec.former().hex() == fingerprint


def test_what_is_not_loaded_does_not_count(tiny, original, copy):
    clutter(copy)
    for path in copy.rglob("*config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()), indent=7) + "\n\n")
    assert named(copy) == original == fingerprint_folder(tiny, *FACTS)
    assert fingerprint_folder(copy, *FACTS) != original


CHANGES: dict[str, Callable[[Path], None]] = {
    "unet": lambda folder: flip(folder / "unet" / "diffusion_pytorch_model.safetensors"),
    "vae": lambda folder: flip(folder / "vae" / "diffusion_pytorch_model.safetensors"),
    "normaliser": lambda folder: flip(folder / "image_normalizer" / "diffusion_pytorch_model.safetensors"),
    "image encoder": lambda folder: flip(folder / "image_encoder" / "model.safetensors"),
    "text encoder": lambda folder: flip(folder / "text_encoder" / "model.safetensors"),
    "scheduler": lambda folder: edit(folder / "scheduler" / "scheduler_config.json", beta_end=0.013),
    "noising": lambda folder: edit(folder / "image_noising_scheduler" / "scheduler_config.json", beta_end=0.013),
    "preprocessor": lambda folder: edit(folder / "feature_extractor/preprocessor_config.json", image_mean=[0, 0, 0]),
    "decoder": lambda folder: edit(folder / "vae" / "config.json", scaling_factor=0.2),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_loaded_counts(original, copy, change):
    CHANGES[change](copy)
    assert named(copy) != original


def test_an_own_encoder_counts_and_neither_its_digest_nor_a_clip_that_is_gone(tiny, tmp_path):
    own = build_own_unclip(tmp_path / "own", tiny)
    before = named(own)
    (own / "feature_extractor").mkdir()
    (own / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    assert named(own) == before
    path = own / "encoder.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    del header["__metadata__"]["genssl_digest"]
    path.write_bytes(header_bytes(header) + content[end:])  # as older versions wrote it
    assert len(path.read_bytes()) < len(content)
    assert named(own) == before
    assert fingerprint_file(path) == open_generator(StableUnCLIPConfig(model=str(own)), CPU).conditioner_fingerprint()  # type: ignore[attr-defined]
    tensors = load_file(path)
    tensors["conv1.weight"] += 1
    save_file(tensors, path, header["__metadata__"])
    assert named(own) != before


def test_shards_count_and_those_of_an_unused_index_do_not(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert network_files(tmp_path)[1:] == ["model.safetensors.index.json", "model-00001-of-00001.safetensors"]
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert network_files(tmp_path) == ["config.json", "model.safetensors"]


def test_a_replaced_autoencoder_does_not_count(copy):
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng():
        torch.manual_seed(0)
        replacement = AutoencoderTiny(
            encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4,
            num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4,
        )  # fmt: skip
    where = copy.parent / "tiny_vae"
    replacement.save_pretrained(where)
    before = named(copy, tiny_vae=str(where))
    flip(copy / "vae" / "diffusion_pytorch_model.safetensors")
    (where / "notes.txt").write_text("mine")
    assert named(copy, tiny_vae=str(where)) == before
    flip(where / "diffusion_pytorch_model.safetensors")
    assert named(copy, tiny_vae=str(where)) != before


def test_a_flow_counts_its_three_files(tmp_path):
    folder = build_tiny_flow(tmp_path / "flow")

    def named_flow() -> bytes:
        return open_generator(FlowConfig(model=str(folder)), CPU).spec.fingerprint

    before = named_flow()
    (folder / "notes.txt").write_text("mine")
    save_file({"a": torch.zeros(1)}, folder / "others.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    assert named_flow() == before
    (folder / "config.json").write_text(json.dumps(config | {"max_embedding_noise": 0.9}))
    assert named_flow() != before


# ---- Former names ----


def test_a_former_name_that_is_known_is_kept(copy):
    clutter(copy)
    former = fingerprint_folder(copy, *FACTS)
    today = named(copy)
    assert today != former
    assert named(copy, ("00" * 16,)) == today
    assert named(copy, (former.hex(), "00" * 16)) == former
    assert named(copy, (former.hex(), today.hex())) == today, "where both are known, today's is as good"
    flip(copy / "unet" / "diffusion_pytorch_model.safetensors")
    assert named(copy, (former.hex(),)) not in (former, today), "other weights never go by the name of these"


def test_what_is_built_on_a_generator_keeps_its_former_name_too(copy, tmp_path, monkeypatch):
    """Interpolation, a bank's kept embeddings and a folder of embeddings, all made before."""
    clutter(copy)
    (copy / "image_encoder" / "notes.txt").write_text("mine")
    bank = {"images": "digits", "embeddings": str(tmp_path / "bank.safetensors")}
    settings = {"interpolation": InterpolationConfig(**bank), "embedding_cache": str(tmp_path / "kept")}

    def opened(known: tuple[str, ...] = ()):
        config = StableUnCLIPConfig(model=str(copy), num_inference_steps=1, **settings)
        return open_generator(config, CPU, known)

    with monkeypatch.context() as patch:  # as every version before did
        patch.setattr("genssl.generators.diffusion.stable_unclip.fingerprint_model", former_rule)
        patch.setattr("genssl.generators.diffusion.unclip_encoder.fingerprint_model", former_rule)
        before = opened()
        before.kept_embeddings.put([bytes(16)], [torch.ones(33)])
        former = before.spec.fingerprint
        del before
    again = opened((former.hex(),))
    assert again.spec.fingerprint == former
    assert again.kept_embeddings.get(bytes(16)) is not None
    assert opened().spec.fingerprint != former


def former_rule(folder, files, *facts, keep_order=()):
    from genssl.generators.fingerprint import Fingerprint

    digest = fingerprint_folder(folder, *facts)
    return Fingerprint(digest, lambda: digest)
