"""Moving averages, queues and centres: exact formulas, exact contents."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import draw_views, make

from genssl.methods.parts import Queue, cosine_momentum, follow, momentum_copy

# ---- Momentum ----


@pytest.mark.parametrize(
    ("done", "expected"), [(0.0, 0.99), (0.25, 1 - 0.01 * (math.sqrt(0.5) + 1) / 2), (0.5, 0.995), (1.0, 1.0)]
)
def test_the_momentum_rises_by_half_a_cosine(done, expected):
    assert cosine_momentum(0.99, 1.0, done) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("byol", [("backbone", "target_backbone"), ("projector", "target_projector")]),
        ("moco", [("backbone", "key_backbone"), ("projector", "key_projector")]),
        ("dino", [("backbone", "teacher_backbone"), ("head", "teacher_head")]),
    ],
)
def test_after_a_step_every_weight_is_the_weighted_mean(name, pairs):
    method = make(name, momentum_start=0.9, momentum_end=0.98)
    states = [(getattr(method, a), getattr(method, b)) for a, b in pairs]
    assert all(_same(online, target) for online, target in states), "the momentum network starts as a copy"
    with torch.no_grad():
        for online, _ in states:
            for parameter in online.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    before = [[parameter.double() for parameter in target.parameters()] for _, target in states]
    method.step(draw_views(4))
    method.after_step(0.3)
    momentum = 0.98 - (0.98 - 0.9) * (math.cos(0.3 * math.pi) + 1) / 2
    for (online, target), olds in zip(states, before, strict=True):
        for theirs, ours, old in zip(online.parameters(), target.parameters(), olds, strict=True):
            torch.testing.assert_close(ours.double(), momentum * old + (1 - momentum) * theirs.double())


def _same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_momentum_one_leaves_the_weights_alone_and_zero_copies_them():
    online, generator = nn.Linear(3, 3), torch.Generator().manual_seed(0)
    target = momentum_copy(online)
    kept = target.weight.clone()
    with torch.no_grad():
        online.weight.copy_(torch.randn((3, 3), generator=generator))
    follow(target, online, 1.0)
    assert torch.equal(target.weight, kept)
    follow(target, online, 0.0)
    assert torch.equal(target.weight, online.weight)


def test_running_statistics_are_the_targets_own_and_other_buffers_are_copied():
    """Codes whose average skips buffers leave a target in eval mode with statistics of 0 and 1."""

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2, momentum=1.0)
            self.register_buffer("seen", torch.zeros(()))

    online = Counted()
    target = momentum_copy(online)
    online.norm(torch.tensor([[0.0, 0], [2, 2]]))
    target.norm(torch.tensor([[4.0, 4], [6, 6]]))
    online.seen.fill_(3)
    follow(target, online, 0.5)
    assert target.norm.running_mean.tolist() == [5, 5]
    assert float(target.seen) == 3


# ---- The queue ----


@pytest.mark.parametrize("batches", [[3, 3, 3], [7], [8], [5, 9, 2], [19], [16, 1], [1] * 9])
def test_the_queue_holds_the_last_keys_whatever_the_batches(batches):
    """Official MoCo demands a divisor of the size, and lightly's bank drops what overflows its end."""
    queue, generator = Queue(7, 3), torch.Generator().manual_seed(0)
    one_by_one, pointer = queue.keys.clone(), 0
    for count in batches:
        keys = torch.randn((count, 3), generator=generator)
        queue.push(keys)
        for key in keys:
            one_by_one[pointer] = F.normalize(key, dim=0)
            pointer = (pointer + 1) % 7
    torch.testing.assert_close(queue.keys, one_by_one)
    assert int(queue.pointer) == pointer


def test_a_queue_starts_with_unit_rows():
    torch.testing.assert_close(Queue(50, 4).keys.norm(dim=1), torch.ones(50))


def test_moco_queues_the_momentum_keys_of_both_views_of_every_micro_batch():
    method = make("moco", queue_size=20)
    views = [draw_views(3, seed) for seed in range(2)]
    expected = [
        F.normalize(method.key_projector(method.key_backbone(view)), dim=1) for batch in views for view in batch.pair
    ]
    for batch in views:
        method.step(batch)
    rest = method.queue.keys[12:].clone()
    method.after_step(0.1)
    torch.testing.assert_close(method.queue.keys[:12], torch.cat(expected))
    assert torch.equal(method.queue.keys[12:], rest)
    method.after_step(0.2)
    assert int(method.queue.pointer) == 12, "what has entered the queue does not enter it again"


def test_moco_compares_with_the_queue_as_it_was_before_the_batch():
    method, views = make("moco"), draw_views(4)
    loss = method.step(views).loss
    q = F.normalize(method.projector(method.backbone(torch.cat(views.pair))), dim=1)
    k = F.normalize(method.key_projector(method.key_backbone(torch.cat(views.pair))), dim=1).roll(4, 0)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ method.queue.keys.T], 1) / 0.2
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.zeros(8, dtype=torch.int64)))


def test_nnclr_takes_the_nearest_neighbour_of_the_other_view():
    method, views = make("nnclr"), draw_views(4)
    method.eval()
    z1, z2 = (F.normalize(method.projector(method.backbone(view)), dim=1) for view in views.pair)
    p1, p2 = (F.normalize(method.predictor(method.projector(method.backbone(view))), dim=1) for view in views.pair)
    keys, own = method.queue.keys.clone(), torch.arange(4)
    losses = []
    for z, p in ((z1, p2), (z2, p1)):
        nearest = torch.stack([keys[int((keys - row).norm(dim=1).argmin())] for row in z])
        losses.append(F.cross_entropy(nearest @ p.T / 0.1, own))
    torch.testing.assert_close(method.step(views).loss, (losses[0] + losses[1]) / 2)
    method.after_step(0.5)
    torch.testing.assert_close(method.queue.keys[:4], z1)
    assert torch.equal(method.queue.keys[4:], keys[4:])


# ---- DINO ----


def test_dinos_centre_is_the_moving_average_of_the_teachers_logits():
    method, views = make("dino", centre_momentum=0.8), draw_views(5)
    logits = method.teacher_head(method.teacher_backbone(torch.cat(views.pair)))
    method.step(views)
    method.after_step(0.5)
    torch.testing.assert_close(method.centre, 0.2 * logits.mean(dim=0))


def test_dinos_teacher_temperature_rises_and_is_in_the_state():
    method = make("dino", teacher_temperature_start=0.02, teacher_temperature=0.06, teacher_warmup=0.4)
    found = []
    for done in (0.0, 0.1, 0.4, 1.0):
        if done:
            method.after_step(done)
        found.append(float(method.state_dict()["teacher_temperature"]))
    assert found == pytest.approx([0.02, 0.03, 0.06, 0.06])


def test_dinos_prototypes_stay_until_they_are_released():
    method = make("dino", freeze_prototypes=0.2)
    optimizer = torch.optim.AdamW(method.head.parameters(), lr=0.1, weight_decay=0.5)
    start = F.normalize(method.head.prototypes.detach(), dim=1)
    for done in (0.1, 0.2):
        method.step(draw_views(4)).loss.backward()
        optimizer.step()
        method.after_step(done)
        optimizer.zero_grad()
        torch.testing.assert_close(F.normalize(method.head.prototypes.detach(), dim=1), start)
    method.step(draw_views(4)).loss.backward()
    assert method.head.prototypes.grad.abs().sum() > 0


def test_dino_compares_every_view_with_the_teachers_other_ones():
    """Two terms of the pair, and two for each crop; their mean."""
    method, views = make("dino"), draw_views(4, crops=2)
    method.centre.normal_(generator=torch.Generator().manual_seed(0))
    seen = [*views.pair, *views.crops]
    students = [method.head(method.backbone(view)) / 0.1 for view in seen]
    teachers = [
        ((method.teacher_head(method.teacher_backbone(view)) - method.centre) / 0.04).softmax(1) for view in views.pair
    ]
    terms = [
        F.cross_entropy(student, teacher)
        for t, teacher in enumerate(teachers)
        for s, student in enumerate(students)
        if s != t
    ]
    assert len(terms) == 6
    torch.testing.assert_close(method.step(views).loss, torch.stack(terms).mean())
