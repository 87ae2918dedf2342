"""Rows, draws and images of a generator's training: the same for any number of ranks, in memory or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from genssl.base.ranks import ALONE, Ranks
from genssl.config.views import AugmentationConfig
from genssl.data.configs import FolderConfig
from genssl.data.folder import ImageFolder
from genssl.errors import DataError
from genssl.generator_training.rows import Batches, Draws, Images
from genssl.views.augment import Augment

CPU = torch.device("cpu")
ROWS = 4  # of a rank


def both(draw: Callable[[Draws, int], torch.Tensor], groups: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what one rank draws, twice in a row, and what two ranks draw, put together in the order of the rows."""
    alone = Draws("rows")
    whole = torch.cat([draw(alone, 2 * ROWS) for _ in range(2)])
    ranks = [Draws("rows", ranks=Ranks(rank=rank, size=2)) for rank in range(2)]
    parts = []
    for _ in range(2):
        first, second = (draw(one, ROWS).chunk(groups) for one in ranks)
        parts += [rows for pair in zip(first, second, strict=True) for rows in pair]
    assert torch.equal(*(one.generator.get_state() for one in ranks))
    assert torch.equal(ranks[0].generator.get_state(), alone.generator.get_state())
    return whole, torch.cat(parts)


@pytest.mark.parametrize(
    "draw",
    [
        lambda draws, rows: draws.normal(rows, 3, 2),
        lambda draws, rows: draws.uniform(rows),
        lambda draws, rows: draws.integers(-3, 100, rows),
        lambda draws, rows: torch.stack(draws.integer_columns(2, 0, 100, rows, groups=1), dim=1),
    ],
    ids=["normal", "uniform", "integers", "integer_columns"],
)
def test_two_ranks_draw_what_one_does(draw):
    whole, parts = both(draw)
    assert torch.equal(whole, parts)
    assert len(whole.unique()) > ROWS


def test_groups_are_batches_of_which_each_has_rows_of_all_ranks():
    """As the discriminator's: real images of all ranks, then images made by all ranks."""
    whole, parts = both(lambda draws, rows: torch.stack(draws.integer_columns(2, 0, 100, 2 * rows, 2), dim=1), 2)
    assert torch.equal(whole, parts)


def test_two_ranks_see_the_views_that_one_does():
    augment, images = Augment(AugmentationConfig(), 8), torch.rand(2 * ROWS, 3, 8, 8)
    whole = Draws("views").view(augment, images)
    halves = [
        Draws("views", ranks=Ranks(rank=rank, size=2)).view(augment, part) for rank, part in enumerate(images.chunk(2))
    ]
    assert torch.allclose(whole, torch.cat(halves), atol=1e-6)
    assert not torch.allclose(whole, images, atol=0.1)


@pytest.fixture
def folder(photos: Path) -> ImageFolder:
    return ImageFolder(FolderConfig(root=photos, labels="none", image_size=16), "train")


def test_images_beyond_memory_are_those_in_memory(folder):
    kept, read = Images(folder, CPU), Images(folder, CPU, in_memory_bytes=0)
    assert kept.in_memory
    assert not read.in_memory
    assert len(read) == len(folder)
    rows = torch.tensor([3, 0, 3, 5, 0, 3])
    expected = torch.from_numpy(np.stack([folder.image(row) for row in rows.tolist()]))
    read.read_ahead(torch.tensor([5, 3, 3, 7]))
    for images in (kept, read):
        assert torch.equal(images[rows], expected)
        assert torch.equal(images[rows], expected), "also what was taken once"
    assert torch.equal(read[torch.tensor([7])], kept[torch.tensor([7])]), "read ahead for later"
    for ours, theirs in zip(read.parts(range(2, 9), 3), kept.parts(range(2, 9), 3), strict=True):
        assert torch.equal(ours, theirs)


def test_a_corrupt_file_is_named_when_its_image_is_asked_for(photos, tmp_path):
    for path in photos.rglob("*.png"):
        (tmp_path / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    dataset = ImageFolder(FolderConfig(root=tmp_path, labels="none", image_size=16), "train")
    path = tmp_path / "light-3.png"
    row = next(row for row in range(len(dataset)) if dataset.stored(row).data == path.read_bytes())
    path.write_bytes(path.read_bytes()[:60])
    images = Images(dataset, CPU, in_memory_bytes=0)
    images.read_ahead(torch.arange(len(dataset)))
    others = torch.tensor([other for other in range(len(dataset)) if other != row])
    assert len(images[others]) == len(others)
    for _ in range(2):
        with pytest.raises(DataError, match=r"light-3\.png"):
            images[torch.tensor([row])]
    with pytest.raises(DataError, match=r"light-3\.png"):
        Images(dataset, CPU)


@pytest.mark.parametrize("taken", [0, 1, 3, 4])
def test_batches_go_on_from_their_state(taken):
    def batches() -> tuple[Batches, Draws]:
        draws = Draws("order", ranks=ALONE)
        return Batches(10, 3, draws), draws

    def some(rows: Batches, draws: Draws, count: int) -> list[torch.Tensor]:
        return [torch.cat([next(rows), draws.integers(0, 1000, 2)]) for _ in range(count)]

    whole = torch.stack(some(*batches(), 9))
    rows, draws = batches()
    begun = some(rows, draws, taken)
    state = rows.state_dict()
    some(rows, draws, 2)  # which the process that is killed had taken further
    rows, draws = batches()
    rows.load_state_dict(state)
    assert torch.equal(torch.stack(begun + some(rows, draws, 9 - taken)), whole)


def test_every_epoch_is_an_order_of_its_own_and_known_until_its_end():
    rows, epochs = Batches(9, 3, Draws("order")), []
    for _ in range(2):
        taken = []
        for number in range(3):
            following = rows.following()
            taken.append(next(rows))
            assert torch.equal(following, taken[-1]) if number else len(following) == 0
        epochs.append(torch.cat(taken))
        assert sorted(epochs[-1].tolist()) == list(range(9))
    assert not torch.equal(*epochs)
