"""CKA of layers, batch by batch: against the plain formula, on encoders whose layers are known."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from genssl.backbones.configs import ResNet18Config, ViTTinyConfig
from genssl.backbones.resnet import build_resnet
from genssl.backbones.vit import build_vit
from genssl.errors import DataError
from genssl.evaluators.representation.cka_matrix import (
    CKAMatrix,
    MinibatchCKA,
    cka_matrix,
    draw_cka_matrix,
    layers,
    recording,
)


class Encoder(nn.Module):
    """As encoders come: the backbone is the only child."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(images)


@pytest.fixture(scope="module")
def resnet() -> Encoder:
    torch.manual_seed(0)
    return Encoder(build_resnet(ResNet18Config(stem="small", width=4))).eval()


@pytest.fixture(scope="module")
def vit() -> Encoder:
    torch.manual_seed(0)
    return Encoder(build_vit(ViTTinyConfig(image_size=8, patch_size=4))).eval()


def hsic_1(x, y):
    """Song et al. 2007 with plain traces, in NumPy."""
    n, k, m = len(x), x @ x.T, y @ y.T
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    total = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def plain_cka(x, y):
    return hsic_1(x, y) / np.sqrt(hsic_1(x, x) * hsic_1(y, y))


def batches(count, n, widths, seed=0):
    """Batches of features of the layers of two encoders; the second's are of the first's, and of noise."""
    random = np.random.default_rng(seed)
    first, second, found = *(random.standard_normal((7, width)) for width in widths), []
    for _ in range(count):
        hidden = random.standard_normal((n, 7)) * np.linspace(1, 3, 7) + 5
        found.append((hidden @ first, hidden @ second + 20 * random.standard_normal((n, widths[1]))))
    return found


def accumulated(parts):
    running = MinibatchCKA()
    for x, y in parts:
        running.update([torch.from_numpy(x)], [torch.from_numpy(y)])
    return running.value().item()


# ---- The estimate ----


@pytest.mark.parametrize(("n", "widths"), [(5, (3, 2)), (40, (6, 9)), (20, (50, 300))])
def test_of_one_batch_it_is_the_debiased_estimate(n, widths):
    ((x, y),) = batches(1, n, widths)
    assert accumulated([(x, y)]) == pytest.approx(plain_cka(x, y), abs=1e-9)


def test_sums_are_divided_once_and_ratios_never_averaged():
    parts = batches(30, 8, (4, 5))
    cross, first, second = (sum(hsic_1(part[a], part[b]) for part in parts) for a, b in ((0, 1), (0, 0), (1, 1)))
    assert accumulated(parts) == pytest.approx(cross / np.sqrt(first * second), abs=1e-9)
    assert abs(accumulated(parts) - np.mean([plain_cka(x, y) for x, y in parts])) > 0.02


def test_batches_of_other_sizes_count_as_much():
    parts = batches(3, 8, (4, 5)) + batches(2, 20, (4, 5), seed=1)
    cross, first, second = (sum(hsic_1(part[a], part[b]) for part in parts) for a, b in ((0, 1), (0, 0), (1, 1)))
    assert accumulated(parts) == pytest.approx(cross / np.sqrt(first * second), abs=1e-9)


def test_many_small_batches_estimate_what_one_large_batch_does():
    parts = batches(150, 8, (4, 5))
    x, y = (np.concatenate(side) for side in zip(*parts, strict=True))
    whole = plain_cka(x, y)
    ratios = np.mean([plain_cka(a, b) for a, b in parts])
    assert accumulated(parts) == pytest.approx(whole, abs=0.03)
    assert abs(ratios - whole) > 2 * abs(accumulated(parts) - whole)


# ---- Layers of encoders ----


def test_the_layers_of_a_resnet_are_its_stem_and_blocks(resnet):
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert [name for name, _ in layers(resnet)] == ["conv1", "bn1", "relu", *blocks]


def test_the_layers_of_a_vit_are_its_embedding_blocks_and_norm(vit):
    blocks = [f"blocks.{block}" for block in range(12)]
    assert [name for name, _ in layers(vit)] == ["patch_embed", *blocks, "norm"]


def test_maps_are_averaged_over_space_and_kept_from_activations_in_place(resnet):
    images = torch.rand((6, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    with recording(resnet) as record:
        found = record(images)
    network = resnet.backbone
    stem = network.bn1(network.conv1(images))
    torch.testing.assert_close(found["bn1"], stem.double().mean(dim=(2, 3)))
    torch.testing.assert_close(found["relu"], stem.clamp(min=0).double().mean(dim=(2, 3)))
    torch.testing.assert_close(found["features"], resnet.encode(images).double())
    assert (found["bn1"] < 0).any(), "else the activation in place would not show"
    assert all(one.dtype == torch.float64 and len(one) == 6 for one in found.values())


def test_outputs_in_float64_are_kept_from_activations_in_place_too():
    torch.manual_seed(0)
    network = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.ReLU(inplace=True), nn.Linear(9, 2))).double()
    with recording(network) as record:
        found = record(torch.rand((5, 3, 8, 8), dtype=torch.float64))
    assert list(found) == ["0", "1", "2", "3", "features"]
    assert (found["1"] < 0).any()
    assert (found["2"] >= 0).all()


def test_tokens_are_averaged_and_hooks_removed(vit):
    images = torch.rand((5, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    seen = []
    hook = vit.backbone.blocks[3].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with recording(vit) as record:
        found = record(images)
    hook.remove()
    torch.testing.assert_close(found["blocks.3"], seen[0].double().mean(dim=1))
    assert not any(module._forward_hooks for module in vit.modules())


def test_the_matrix_of_whole_encoders_equals_the_plain_formula(resnet, vit, digits_test):
    rows = list(range(40, 80))
    matrix = cka_matrix(resnet, vit, digits_test, rows=rows, batch=40)
    images = torch.from_numpy(np.stack([digits_test.image(row) for row in rows])).float() / 255
    with recording(resnet) as one, recording(vit) as other, torch.no_grad():
        first, second = one(images), other(images)
    assert (matrix.first, matrix.second) == (list(first), list(second))
    assert (matrix.images, matrix.batch) == (40, 40)
    expected = [[plain_cka(x.numpy(), y.numpy()) for y in second.values()] for x in first.values()]
    np.testing.assert_allclose(matrix.values, expected, atol=1e-6)


def test_an_encoder_is_like_itself(resnet, digits_test):
    matrix = cka_matrix(resnet, resnet, digits_test, rows=range(100), batch=30)
    np.testing.assert_allclose(np.diag(matrix.values), 1, atol=1e-9)
    np.testing.assert_allclose(matrix.values, matrix.values.T, atol=1e-12)
    assert matrix.batch == 25, "batches are equally large: no small one is left over"


def test_the_second_encoder_may_see_the_images_at_another_size(vit, resnet, digits_test):
    class Larger:
        image_size = 16

        def image(self, row):
            return digits_test.image(row).repeat(2, axis=1).repeat(2, axis=2)

    matrix = cka_matrix(vit, resnet, digits_test, Larger(), rows=range(20))
    alone = cka_matrix(resnet, resnet, Larger(), rows=range(20))
    assert np.isfinite(matrix.values).all()
    assert matrix.second == alone.first


class Sorted:
    """Class 0, then class 1: within a class, the two encoders below see nothing in common."""

    image_size = 2

    def __init__(self, count: int) -> None:
        random = np.random.default_rng(0)
        self._images = random.integers(0, 60, (count, 3, 2, 2), dtype=np.uint8)
        self._images[count // 2 :] += 150

    def __len__(self) -> int:
        return len(self._images)

    def image(self, row: int):
        return self._images[row]


class Channel(nn.Module):
    def __init__(self, channel: int) -> None:
        super().__init__()
        self.channel = channel

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, self.channel].flatten(1)


def test_a_data_set_sorted_by_class_is_shuffled():
    matrix = cka_matrix(Channel(0), Channel(1), Sorted(200), batch=10)
    assert matrix.first == ["features"]
    assert matrix.values[0, 0] > 0.9
    running = MinibatchCKA()
    for start in range(0, 200, 10):
        images = torch.stack([torch.from_numpy(Sorted(200).image(row)) for row in range(start, start + 10)]).double()
        running.update([images[:, 0].flatten(1)], [images[:, 1].flatten(1)])
    assert running.value().item() < 0.3, "in order, batches would hide what the encoders have in common"


def test_equal_seeds_give_equal_matrices(resnet, digits_test):
    one, same, other = (cka_matrix(resnet, resnet, digits_test, rows=range(60), batch=20, seed=s) for s in (1, 1, 2))
    assert np.array_equal(one.values, same.values)
    assert not np.array_equal(one.values, other.values)


def test_too_few_images_are_refused(resnet, digits_test):
    with pytest.raises(DataError, match="3 images are too few; give 4 or more"):
        cka_matrix(resnet, resnet, digits_test, rows=[0, 1, 2])


# ---- The picture ----


class DeadLayer(Encoder):
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(images.flatten(1))


def test_a_layer_that_says_nothing_has_no_value_and_is_drawn_hatched(digits_test):
    torch.manual_seed(0)
    dead = nn.Linear(192, 5)
    nn.init.zeros_(dead.weight)
    encoder = DeadLayer(nn.Sequential(dead, nn.Linear(5, 4)))  # whose output varies by rounding
    matrix = cka_matrix(encoder, Channel(0), digits_test, rows=range(30))
    assert matrix.first == ["0", "1", "features"]
    assert np.isnan(matrix.values).all()
    assert picture_of(draw_cka_matrix(matrix, "dead", "pixels")).size > 0


def picture_of(figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB")).astype(int)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 12), (80, 60)])
def test_the_picture_shows_the_matrix_with_its_labels(rows, columns):
    values = np.linspace(-0.02, 1, rows * columns).reshape(rows, columns)
    names = [[f"stage.{index}" for index in range(count)] for count in (rows, columns)]
    figure = draw_cka_matrix(CKAMatrix(values, *names, images=1000, batch=256), "first/run", "second/run")
    figure.canvas.draw()
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("second/run", "first/run")
    for axis, count in ((axes.xaxis, columns), (axes.yaxis, rows)):
        texts = [label for label in axis.get_ticklabels() if label.get_text()]
        assert 1 <= len(texts) <= 40
        assert len(texts) == count or count > 40
        boxes = sorted((label.get_window_extent() for label in texts), key=lambda box: (box.x0, box.y0))
        assert not any(a.overlaps(b) for a, b in pairwise(boxes)), "labels do not touch"
    assert picture_of(figure).std() > 10
