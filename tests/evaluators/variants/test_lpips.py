"""LPIPS by its formula, the means over variants, and what is said when its weights or torchmetrics are not there."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import alexnet
from variants_of_digits import Pixels, noisy

from genssl.errors import DataError, UserError
from genssl.evaluators.base import EvaluationData, FrozenEncoder
from genssl.evaluators.configs import LPIPSDiversityConfig
from genssl.evaluators.variants import lpips as module
from genssl.evaluators.variants.lpips import LPIPS, LPIPSDiversity, distances, load_lpips

ENDS = (2, 5, 8, 10, 12)  # layers of AlexNet after each convolution and its ReLU


def features() -> torch.nn.Sequential:
    """torchvision's own layers; its activations in place are kept from overwriting what is compared."""
    layers = alexnet(weights=None).features
    for layer in layers:
        if isinstance(layer, torch.nn.ReLU):
            layer.inplace = False
    return layers


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """AlexNet and linear heads with random weights, in the files' real formats."""
    folder = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(0)
    state = {f"features.{name}": value for name, value in features().state_dict().items()}
    torch.save(state | {"classifier.6.bias": torch.zeros(1000)}, folder / "alexnet.pth")
    widths = (64, 192, 384, 256, 256)
    heads = {f"lin{number}.model.1.weight": torch.rand(1, width, 1, 1) for number, width in enumerate(widths)}
    torch.save(heads, folder / "heads.pth")
    return folder / "alexnet.pth", folder / "heads.pth"


@pytest.fixture
def network(files, monkeypatch) -> LPIPS:
    monkeypatch.setattr(module, "find_heads", lambda: files[1])
    return load_lpips(files[0])


def by_the_paper(files, first, second):
    """Zhang et al. 2018, equation 1, activation by activation, on images in [0, 1]."""
    layers = features()
    state = torch.load(files[0], weights_only=True)
    layers.load_state_dict({name[9:]: value for name, value in state.items() if name.startswith("features.")})
    heads = torch.load(files[1], weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    total = torch.zeros(len(first))
    for number, end in enumerate(ENDS):
        maps = []
        for images in (first, second):
            x = ((2 * images - 1).permute(0, 2, 3, 1) - shift) / scale
            x = layers[:end](x.permute(0, 3, 1, 2))
            maps.append(x / torch.sqrt((x**2).sum(dim=1, keepdim=True) + 1e-8))
        weighted = heads[f"lin{number}.model.1.weight"][0] * (maps[0] - maps[1]) ** 2
        total += weighted.sum(dim=1).mean(dim=(1, 2))
    return total


def pair(size, count=3):
    random = torch.Generator().manual_seed(size)
    return torch.rand((2, count, 3, size, size), generator=random)


@torch.no_grad()
def test_it_equals_the_papers_formula(files, network):
    first, second = pair(80)
    found = network(network.activations(first), network.activations(second))
    torch.testing.assert_close(found, by_the_paper(files, first, second), rtol=1e-4, atol=1e-6)
    assert (found > 0).all()
    assert network(network.activations(first), network.activations(first)).tolist() == [0, 0, 0]


@torch.no_grad()
def test_small_images_are_enlarged(files, network):
    first, second = pair(8)
    large = (F.interpolate(images, size=(64, 64), mode="bilinear", align_corners=False) for images in (first, second))
    found = network(network.activations(first), network.activations(second))
    torch.testing.assert_close(found, by_the_paper(files, *large), rtol=1e-4, atol=1e-6)


def test_it_equals_torchmetrics_where_that_is_installed(files):
    lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
    theirs = lpips._LPIPS(pnet_rand=True, net="alex")  # the authors' heads, on any AlexNet
    state = torch.load(files[0], weights_only=True)
    ends, parts = [0, *ENDS], [theirs.net.slice1, theirs.net.slice2, theirs.net.slice3, theirs.net.slice4]
    for start, part in zip(ends, [*parts, theirs.net.slice5], strict=False):
        for name, layer in part.named_children():
            assert start <= int(name) < ends[ends.index(start) + 1]
            prefix = f"features.{name}."
            layer.load_state_dict({key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)})
    ours = load_lpips(files[0])
    first, second = pair(96)
    with torch.no_grad():
        found = ours(ours.activations(first), ours.activations(second))
        torch.testing.assert_close(found, theirs(first, second, normalize=True).flatten(), rtol=1e-4, atol=1e-6)


# ---- The means ----


@pytest.mark.parametrize("count", [2, 16, 37])
def test_means_are_over_pairs_and_sources(count):
    random = np.random.default_rng(count)
    sources, *variants = random.integers(0, 256, (4, count, 3, 2, 2), dtype=np.uint8)

    def flat(images):
        return [images.flatten(1)]

    def squared(first, second):
        return (first[0] - second[0]).square().sum(dim=1)

    found = dict(distances(flat, squared, sources, variants, torch.device("cpu")))
    x = [images.reshape(count, -1) / 255 for images in (sources, *variants)]

    def mean(pairs):
        return np.mean([((one - other) ** 2).sum(axis=1).mean() for one, other in pairs])

    assert found["diversity"] == pytest.approx(mean(combinations(x[1:], 2)), rel=1e-5)
    assert found["to_source"] == pytest.approx(mean((x[0], one) for one in x[1:]), rel=1e-5)
    assert found["between_sources"] == pytest.approx(mean([(x[0][:-1], x[0][1:])]), rel=1e-5)


def test_variants_of_digits(files, monkeypatch, digits_train, digits_test):
    monkeypatch.setattr(module, "find_heads", lambda: files[1])
    monkeypatch.setattr("genssl.evaluators.variants.lpips.find_heads", lambda: files[1])
    encoder = FrozenEncoder(Pixels(), torch.device("cpu"))
    results = []
    for strength in (0, 20, 100):
        evaluator = LPIPSDiversity(LPIPSDiversityConfig(images=6, variants=2, weights=files[0]))
        data = EvaluationData(digits_train, digits_test, "test", noisy(strength))
        evaluator.check(data)
        results.append(dict(evaluator.run(encoder, data)))
        assert (evaluator.protocol["images"], evaluator.protocol["variants_of_a_source"]) == (6, 2)
    copies, weak, strong = results
    assert copies["diversity"] == copies["to_source"] == 0
    assert 0 < weak["diversity"] < strong["diversity"]
    assert copies["between_sources"] == strong["between_sources"] > 0


# ---- What is not there ----


def test_without_torchmetrics_it_says_how_to_install_it(monkeypatch, digits_train, digits_test):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    data = EvaluationData(digits_train, digits_test, "test", noisy(0))
    with pytest.raises(UserError, match=r"LPIPS needs torchmetrics, .* run `pip install 'genssl\[metrics\]'`"):
        LPIPSDiversity(LPIPSDiversityConfig()).check(data)


def test_without_weights_it_says_where_they_belong_and_downloads_nothing(files, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_heads", lambda: files[1])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **kwargs: pytest.fail("a download"))
    with pytest.raises(UserError, match=r"not in .*checkpoints/alexnet-owt-7be5be79\.pth; get them with: python -c"):
        load_lpips()
    kept = tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth"
    kept.parent.mkdir()
    kept.write_bytes(files[0].read_bytes())
    assert isinstance(load_lpips(), LPIPS)


def test_other_files_are_refused(files, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_heads", lambda: files[1])
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_lpips(tmp_path / "text.pth")
    torch.save({"features.0.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="is not torchvision's AlexNet"):
        load_lpips(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_lpips(tmp_path / "list.pth")


def test_it_needs_variants(digits_train, digits_test):
    with pytest.raises(DataError, match=r"evaluate.lpips_diversity: this needs variants"):
        LPIPSDiversity(LPIPSDiversityConfig()).check(EvaluationData(digits_train, digits_test, "test"))
