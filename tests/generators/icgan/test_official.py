"""Official IC-GAN checkpoints: architecture from shapes, spectral norm, conversion, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from icgan_checkpoint import official_state, random_tensors, reference_forward, shapes_only
from PIL import Image
from torchvision.models import resnet50
from torchvision.transforms import functional
from typer.testing import CliRunner

from genssl.cli.main import app
from genssl.errors import GeneratorError, UserError
from genssl.generators.configs import ICGANConfig
from genssl.generators.icgan.convert import convert_weights
from genssl.generators.icgan.generator import ICGAN
from genssl.generators.icgan.networks import Architecture, GeneratorNetwork
from genssl.generators.icgan.official import convert_generator, infer_architecture, read_tensors

CPU = torch.device("cpu")
MILLION = 1e6


def small(*, classes: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """A 64 px generator of 4 channels instead of 64, with the official widths of noise and features."""
    return official_state(64, 4, random_tensors(seed), classes=classes, width=16)


@pytest.fixture(scope="module")
def extractor(tmp_path_factory) -> Path:
    """A random ResNet-50 as SwAV's file has it: prefixed, with a projection head and prototypes."""
    with torch.device("meta"):
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in resnet50().state_dict().items()}
    stream = torch.Generator().manual_seed(1)
    state = {}
    for name, (shape, dtype) in shapes.items():
        if dtype == torch.int64:
            tensor = torch.zeros(shape, dtype=dtype)
        elif len(shape) == 4:
            tensor = torch.randn(shape, generator=stream) * (2 / shape[1:].numel()) ** 0.5
        else:
            tensor = torch.rand(shape, generator=stream) + 0.5 * ("var" in name)
        if not name.startswith("fc."):
            state[f"module.{name}"] = tensor
    state["module.projection_head.0.weight"] = state["module.prototypes.weight"] = torch.zeros(3, 3)
    path = tmp_path_factory.mktemp("swav") / "swav_800ep_pretrain.pth.tar"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def converted(extractor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    torch.save(small(), folder / "G_ema_best0.pth")
    arguments = ["convert-weights", str(folder / "G_ema_best0.pth"), "--features", str(extractor)]
    result = CliRunner().invoke(app, [*arguments, "--out", str(folder / "icgan-64")], catch_exceptions=False)
    assert result.exit_code == 0
    assert "64 px" in result.output
    assert "CC-BY-NC-4.0" in result.output
    return folder / "icgan-64"


def load(folder: Path, **settings) -> ICGAN:
    return ICGAN(ICGANConfig(model=str(folder), **settings), CPU)


@pytest.mark.parametrize(
    ("resolution", "ch", "classes", "parameters"),
    [
        (256, 96, False, 90.01),
        (256, 96, True, 92.30),
        (256, 64, False, 42.86),
        (256, 64, True, 44.38),
        (128, 96, False, 77.16),
        (128, 96, True, 79.05),
        (64, 64, False, 36.66),
        (64, 64, True, 37.87),
    ],
)
def test_the_shapes_tell_the_architecture(resolution, ch, classes, parameters):
    """Numbers of parameters were counted on the official code (shared/facts/generators.md, 1.3)."""
    state = official_state(resolution, ch, shapes_only, classes=classes)
    if resolution == 256:
        assert len(state) == 198
    found = infer_architecture(state)
    assert found.resolution == resolution
    assert found.channels[-1] == ch * {256: 1, 128: 1, 64: 2}[resolution]
    assert found.noise_dim == {256: 119, 128: 120, 64: 120}[resolution]
    assert [found.bottom * 2 ** (block + 1) for block in found.attention] == [32 if resolution == 64 else 64]
    assert found.classes == (1000 if classes else 0)
    assert Architecture.from_json(json.loads(json.dumps(found.to_json()))) == found
    with torch.device("meta"):
        network = GeneratorNetwork(found)
    count = sum(parameter.numel() for parameter in network.parameters())
    unused = 0 if classes else 128_000  # official models carry a class embedding that nothing reads
    assert (count + unused) / MILLION == pytest.approx(parameters, abs=0.005)


@pytest.mark.parametrize("classes", [False, True])
def test_images_equal_a_straight_line_forward(classes):
    state = small(classes=classes)
    architecture, weights = convert_generator(state)
    network = GeneratorNetwork(architecture).eval()
    network.load_state_dict(weights)
    make = random_tensors(5)
    noise, features = make(4, architecture.noise_dim), make(4, 2048)
    labels = torch.tensor([0, 7, 999, 7]) if classes else None
    with torch.no_grad():
        ours, reference = network(noise, features, labels), reference_forward(state, noise, features, labels)
    assert reference.std() > 0.2, "the reference made no picture to compare with"
    assert float((ours - reference).abs().max()) <= 1e-4


def test_the_stored_vectors_count_and_not_the_exact_norm():
    state = small()
    weights = convert_generator(state)[1]
    other = convert_generator(state | {"linear.u0": random_tensors(9)(*state["linear.u0"].shape)})[1]
    exact = state["linear.weight"] / torch.linalg.matrix_norm(state["linear.weight"], 2)
    assert not torch.allclose(weights["first.weight"], other["first.weight"], rtol=1e-4)
    assert not torch.allclose(weights["first.weight"], exact, rtol=1e-4)


def test_features_are_those_of_torchvisions_resnet(converted, extractor):
    image = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    with torch.device("meta"):
        network = resnet50()
    network.fc = torch.nn.Identity()
    trunk = {name: tensor for name, tensor in read_tensors(extractor).items() if not name.startswith("pro")}
    network.load_state_dict(trunk, assign=True)
    network.eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = ((torch.from_numpy(image) / 255 - mean) / std)[None]
    inputs = {
        "train": torch.nn.functional.interpolate(x, size=224, mode="bicubic", align_corners=False),
        "colab": torch.nn.functional.interpolate(x, size=224, mode="bicubic", align_corners=True),
        "raw": x,
    }
    for preprocess, shown in inputs.items():
        generator = load(converted, preprocess=preprocess)
        with torch.no_grad():
            expected = network(shown)
        ours = generator.embed(torch.from_numpy(generator.preprocess(image)[None]))
        assert ours.shape == (1, 2048)
        assert float((ours - expected / expected.norm()).abs().max()) <= 1e-5
    assert generator.preprocess(np.zeros((3, 33, 71), np.uint8)).shape == (3, 64, 64)


def test_a_photos_square_is_the_official_codes(converted):
    """CenterCropLongEdge is torchvision's center_crop to the shorter side."""
    generator = load(converted)
    for width, height in ((500, 375), (500, 333), (481, 321), (1067, 1600)):
        pixels = np.random.default_rng(width).integers(0, 256, (3, height, width), dtype=np.uint8)
        square = functional.center_crop(Image.fromarray(pixels.transpose(1, 2, 0)), min(width, height))
        expected = np.asarray(functional.resize(square, [64, 64])).transpose(2, 0, 1)
        np.testing.assert_array_equal(generator.preprocess(pixels), expected)


def test_a_converted_folder_is_a_generator(converted):
    generator = load(converted, output_size=48)
    spec = generator.spec
    assert (spec.licence, spec.embedding_dim, spec.image_size) == ("CC-BY-NC-4.0", 2048, 48)
    assert spec.settings["preprocess"] == "train"
    assert load(converted, preprocess="raw", output_size=48).spec.fingerprint != spec.fingerprint
    embeddings = torch.nn.functional.normalize(random_tensors(2)(5, 2048), dim=1)
    parameters = [{**spec.defaults, "truncation": t} for t in (0.2, 0.7, 0.7, 1.5, 4.0)]
    together = generator.generate(embeddings, list(range(5)), parameters).numpy().astype(int)
    rows = range(5)
    alone = [generator.generate(embeddings[[i]], [i], [parameters[i]]).numpy()[0].astype(int) for i in rows]
    assert together.shape == (5, 3, 48, 48)
    assert np.abs(together - np.stack(alone)).max() <= 1
    assert len({image.tobytes() for image in together}) == 5


def test_classes_are_a_parameter_of_a_row(extractor, tmp_path):
    torch.save(small(classes=True), tmp_path / "G_ema_best1.pth")
    convert_weights(tmp_path / "G_ema_best1.pth", extractor, tmp_path / "cc", "colab")
    generator = load(tmp_path / "cc", class_id=3)
    assert generator.spec.defaults["class_id"] == 3
    assert generator.spec.settings["preprocess"] == "colab"
    embeddings = random_tensors(2)(1, 2048).expand(2, -1)
    parameters = [generator.spec.defaults, {**generator.spec.defaults, "class_id": 4}]
    first, second = generator.generate(embeddings, [1, 1], parameters)
    assert not torch.equal(first, second)
    with pytest.raises(GeneratorError, match=r"class_id: 1000 is outside 0\.\.999"):
        load(tmp_path / "cc", class_id=1000)


class _Surprise:
    def __reduce__(self):
        return (print, ("code ran",))


def _without(name: str):
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("linear.weight"), "no tensor 'linear.weight': it is not an instance-conditioned BigGAN"),
        (_without("blocks.1.0.conv1.weight"), "blocks are incomplete"),
        (_without("blocks.1.0.conv2.bias"), r"blocks.1.0.conv2.bias is missing; \(32,\) is expected"),
        (_without("blocks.1.0.conv2.u0"), "blocks.1.0.conv2.u0 is missing; without it the spectral norm"),
        (lambda s: s | {"blocks.0.0.conv2.weight": torch.zeros(1)}, r"has shape \(1,\); \(64, 64, 3, 3\) is expected"),
        (lambda s: s | {"mapping.w": torch.zeros(1)}, "mapping.w is not part of this architecture"),
        (lambda s: s | {"config": {"G_ch": 4}}, "not a mapping of names to tensors"),
        (lambda s: s | {"config": _Surprise()}, "unpickling those can run code; give the file G_ema_best0.pth"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_written(extractor, tmp_path, capsys, change, message):
    path = tmp_path / "G_ema_best0.pth"
    torch.save(change(small()), path)
    with pytest.raises(GeneratorError, match=message):
        convert_weights(path, extractor, tmp_path / "out", "train")
    assert list(tmp_path.iterdir()) == [path]
    assert "code ran" not in capsys.readouterr().out


def test_other_files_are_refused(extractor, tmp_path):
    path = tmp_path / "G_ema_best0.pth"
    torch.save(small(), path)
    with pytest.raises(GeneratorError, match="the feature extractor is not a ResNet-50"):
        convert_weights(path, path, tmp_path / "out", "train")
    with pytest.raises(GeneratorError, match="cannot be read as a PyTorch checkpoint"):
        convert_weights(tmp_path / "absent.pth", extractor, tmp_path / "out", "train")
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(GeneratorError, match="cannot be read as a PyTorch checkpoint"):
        convert_weights(tmp_path / "broken.pth", extractor, tmp_path / "out", "train")
    with pytest.raises(UserError, match="exists already"):
        convert_weights(path, extractor, tmp_path, "train")
