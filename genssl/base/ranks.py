"""The ranks of a run under torchrun; a run that is alone is one rank of one.

Beside torch's process group, whose calls block until all ranks take part, the ranks have torchrun's key-value store, in
which one can say that it has failed, or look for what another has said, without waiting for anybody.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from genssl.errors import UserError

PATIENCE = timedelta(minutes=30)  # of a collective call: as long as rank 0 may measure or write between two steps
POLL_SECONDS = 0.1
GRACE_SECONDS = 3.0  # in which a rank that has failed says so, before its end is taken for a failure of another


class PeerFailedError(Exception):
    """Another rank has failed, and has said why."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: its number; rank 0 writes, logs, and runs the evaluators that are not shared.
        size: how many there are.
        local: its number on this machine.
        local_size: how many there are on this machine.
        node: the machine's number.
        store: what all of them can write to and read from; None for a run that is alone.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1
    node: int = 0
    store: Any = None

    @property
    def first(self) -> bool:
        """Says whether this is the rank that writes."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """Returns this rank's device: on a machine with several, the one of its number.

        Raises:
            UserError: if there are fewer devices than ranks.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        if device.index is not None and device.index != self.local:
            raise UserError(f"device {device} names one device for {self.size} ranks; set it to cuda or auto")
        if self.local_size > torch.cuda.device_count():
            raise UserError(
                f"{self.local_size} ranks were started on a machine with {torch.cuda.device_count()} CUDA devices; "
                "lower --nproc-per-node"
            )
        return torch.device("cuda", self.local)

    def agree(self, loss: float, stop: bool, device: torch.device) -> tuple[float, bool]:
        """Returns the mean of the loss over the ranks, and whether one of them was told to stop."""
        if self.size == 1:
            return loss, stop
        values = torch.tensor([loss, float(stop)], dtype=torch.float64, device=device)
        dist.all_reduce(values)
        mean, stops = values.tolist()
        return mean / self.size, stops > 0

    def gather(self, value: Any) -> list[Any]:
        """Returns what every rank gives, tensors on the CPU or anything that pickles, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def tell(self, name: str, value: str) -> None:
        """Says something to the ranks that `hear` it."""
        if self.store is not None:
            self.store.set(name, value)

    def hear(self, name: str) -> str:
        """Waits until a rank has told it, for as long as none has failed.

        Raises:
            PeerFailedError: if one has.
        """
        while not self.store.check([name]):
            self.raise_if_failed()
            time.sleep(POLL_SECONDS)
        told: bytes = self.store.get(name)
        return told.decode()

    def raise_if_failed(self) -> None:
        """Raises PeerFailedError if a rank has failed."""
        if self.store is not None and self.store.check(["failed"]):
            raise PeerFailedError

    def end_together(self, name: str) -> None:
        """Lets the other ranks wait until the first one has come here, however long that takes.

        Raises:
            PeerFailedError: if one has failed.
        """
        if self.first:
            self.tell(name, "yes")
        else:
            self.hear(name)

    def provenance(self) -> dict[str, Any]:
        """Returns what results.json says of the ranks, if there are several."""
        if self.size == 1:
            return {}
        return {"ranks": {"count": self.size, "ledger": f"of rank 0, whose part of every batch is 1/{self.size}"}}

    def is_first_to_fail(self) -> bool:
        """Notes a failure; says whether it is this rank's to report."""
        mine = str(self.rank).encode()
        return bool(self.store.compare_set("failed", "", mine.decode()) == mine)


ALONE = Ranks()
_now = ALONE


def ranks_now() -> Ranks:
    """Returns the ranks that this process has joined."""
    return _now


@contextmanager
def joined(again: str = "start the run again with --resume") -> Iterator[Ranks]:
    """Joins the ranks that torchrun started; inside, an error of one of them ends all, with its message alone.

    Without torchrun, or with one rank, this does nothing.

    Args:
        again: what the user does after a rank was lost.
    """
    global _now
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "LOCAL_RANK" not in os.environ:
        yield ALONE
        return
    ranks = _join()
    _now = ranks
    try:
        yield ranks
    except (PeerFailedError, SystemExit):
        raise SystemExit(2) from None
    except UserError:
        if ranks.is_first_to_fail():
            raise
        raise SystemExit(2) from None
    except RuntimeError as error:  # also of a collective call whose other side has ended
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the others by it, this one within seconds anyway
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and not ranks.store.check(["failed"]):
            time.sleep(POLL_SECONDS)
        if not ranks.is_first_to_fail():
            raise SystemExit(2) from None
        if isinstance(error, dist.DistError) or "onnection" in str(error):
            raise UserError(
                f"rank {ranks.rank} has lost another rank of this run, which ended without a word (killed, or out of "
                f"memory?); {again}"
            ) from None
        raise
    except BaseException:
        # Whatever it is, a rank that ends because another failed has nothing to add.
        if not ranks.is_first_to_fail():
            raise SystemExit(2) from None
        raise
    finally:
        _now = ALONE
    dist.destroy_process_group()


def _join() -> Ranks:
    local = int(os.environ["LOCAL_RANK"])
    backend = "gloo"
    if torch.cuda.is_available() and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=PATIENCE)))  # type: ignore[attr-defined]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = dist.PrefixStore(f"genssl/{attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    local_size, node = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("GROUP_RANK", "0"))
    return Ranks(rank, size, local, local_size, node, own)
