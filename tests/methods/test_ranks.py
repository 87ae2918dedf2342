"""Two gloo processes with different data compute the loss, gradient and state of one process on the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from two_ranks import CASES, RANKS, coefficients, train

from genssl.base.gather import gather, gather_weights, mean_over_ranks

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Results:
    """What each rank computed for every case; the processes are started once, since importing torch takes seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    script, environment = Path(__file__).parents[1] / "helpers" / "two_ranks.py", {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder / "store"), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * RANKS, "\n".join(outputs)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one_process_on_the_whole_batch(ranks, case):
    alone = train(case, None)
    for rank in ranks:
        for part in ("losses", "gradients", "state"):
            torch.testing.assert_close(rank[case][part], alone[part], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_end_with_equal_bits(ranks, case):
    """Queues and centres too: they are not averaged by DDP, and would drift apart unnoticed."""
    torch.testing.assert_close(ranks[0][case]["state"], ranks[1][case]["state"], rtol=0, atol=0)


def test_gathered_rows_are_in_rank_order(ranks):
    expected = torch.cat([torch.full((3, 4), float(rank)) for rank in range(RANKS)])
    assert all(torch.equal(rank["gather"]["gathered"], expected) for rank in ranks)


def test_the_gradient_of_gather_is_summed_over_the_ranks_for_any_memory_layout(ranks):
    """torch.distributed.nn's all_gather fails this under gloo: it sends a transposed gradient as if it were not."""
    total = coefficients().sum(dim=0).T
    for number, rank in enumerate(ranks):
        torch.testing.assert_close(rank["gather"]["gradient"], total[3 * number : 3 * number + 3])


def test_without_a_process_group_gathering_changes_nothing():
    rows = torch.rand((3, 2), requires_grad=True)
    assert gather(rows) is rows
    assert gather_weights(None) is None
    assert torch.equal(mean_over_ranks(rows), rows)
