"""The client for trainers that are not genssl's: plain calls, from any thread, in any process."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, TypeVar

from genssl.client.aio import AsyncVariantClient
from genssl.client.channel import ClientTLS, check_target
from genssl.client.images import Wanted, wanted_variants
from genssl.client.messages import Priority, VariantBatch, check_priority
from genssl.errors import ServerUnavailableError, UserError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.variants.prefetch.loop import Tasks, Work, background_loop

T = TypeVar("T")

SLACK_SECONDS = 5.0  # the loop ends a call at its deadline; this is for a loop that does not come to it
_inherited: list[object] = []  # a forked child must not even free its parent's channels


@dataclass(frozen=True)
class HostedGenerator:
    """A generator that a server offers.

    Attributes:
        generator_id: the name under which it is asked for.
        name: the kind of generator, such as "stable_unclip".
        model: as the server's file names it; of a folder on its disk the name alone.
        fingerprint: 16 bytes over weights, configs, dtype and sampler version.
        embedding_dim: width of its conditioner's embedding.
        image_size: side of a variant in pixels, by default.
        licence: of the weights.
        default_parameters: every parameter there is, with its default.
        settings: what else was fixed when the server loaded it.
        tflops: TFLOP of a variant at the defaults (a multiply-add is two FLOP), conditioner left out; None if unknown.
    """

    generator_id: str
    name: str
    model: str
    fingerprint: bytes
    embedding_dim: int
    image_size: int
    licence: str
    default_parameters: dict[str, float]
    settings: dict[str, str]
    tflops: float | None

    @classmethod
    def of(cls, info: pb.GeneratorInfo) -> HostedGenerator:
        """Returns what a server's message says."""
        told = {one.name: getattr(info, one.name) for one in fields(cls)}
        mappings = {name: dict(told[name]) for name in ("default_parameters", "settings")}
        return cls(**told | mappings | {"tflops": info.tflops or None})


class VariantClient:
    """Fetches variants from one generation server or from several that share the work.

    Connects when it is first used, and in every process by itself: make it anywhere, use it in DataLoader workers, but
    start them by `multiprocessing_context="forkserver"`, since gRPC does not survive fork. Picklable, token included.
    Thread-safe.

    Example:
        with VariantClient("127.0.0.1:50051") as client:
            batch = client.variants([open("cat.jpg", "rb").read()], indices=0)  # batch.images: uint8 [1, 3, h, w]

    Args:
        targets: host:port or unix:/path, one or several. All must offer the same generator, with one fingerprint.
        client_id: names this client in the servers' logs and fair shares.
        token: the bearer token that the servers want.
        tls: the files of a secure channel, such as `genssl.config.recipe.ClientTLSConfig(ca=...)`; None: unencrypted.
        max_in_flight: requests in flight at each server; fewer while it says that it is full.
        priority: of its requests: "interactive", "training" or "bulk".
        deadline_seconds: how long a call may take, connecting included.
        allow_fork: works in forked children all the same; gRPC may crash or hang there.

    Raises:
        UserError: if an address is wrong.
        ValueError: if the priority or a number is.
    """

    def __init__(
        self,
        targets: str | Sequence[str],
        *,
        client_id: str = "",
        token: str | None = None,
        tls: ClientTLS | None = None,
        max_in_flight: int = 8,
        priority: Priority = "training",
        deadline_seconds: float = 60.0,
        allow_fork: bool = False,
    ) -> None:
        addresses = [targets] if isinstance(targets, str) else list(targets)
        if not addresses:
            raise UserError("targets: the list is empty; give the address of at least one generation server")
        if not deadline_seconds > 0:
            raise ValueError(f"deadline_seconds is {deadline_seconds}; it must be above 0")
        self._settings: dict[str, Any] = {
            "targets": [check_target(address) for address in addresses],
            "client_id": client_id,
            "token": token,
            "tls": tls,
            "max_in_flight": max_in_flight,
            "priority": check_priority(priority),
        }
        self._deadline, self._allow_fork = deadline_seconds, allow_fork
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._tasks = Tasks(allow_fork=self._allow_fork)
        self._client: AsyncVariantClient | None = None

    def __repr__(self) -> str:
        return f"VariantClient({self._settings['targets']!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self._settings, "deadline_seconds": self._deadline, "allow_fork": self._allow_fork}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __enter__(self) -> VariantClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def targets(self) -> list[str]:
        """The addresses of the servers."""
        return list(self._settings["targets"])

    @property
    def allow_fork(self) -> bool:
        """Whether it works in forked children all the same."""
        return self._allow_fork

    def reachable(self) -> bool:
        """Says, without waiting, whether a call may be answered now, as far as this process knows.

        Servers that have failed are probed in the background; before the first call nothing is known against them.
        """
        client = self._client if self._process == os.getpid() else None
        return client is None or client.reachable

    def with_deadline(self, seconds: float) -> VariantClient:
        """Returns another client of the same servers, with another `deadline_seconds` and connections of its own."""
        return VariantClient(**{**self.__getstate__(), "deadline_seconds": seconds})

    def generators(self) -> list[HostedGenerator]:
        """Returns what the servers offer; waits while they load.

        Raises:
            ServerUnavailableError: if there is no server.
            RequestRefusedError: if it does not let this client in.
            UserError: in a forked child of a process with a live client.
        """

        async def ask() -> list[HostedGenerator]:
            client = self._connected()
            await client.connect()
            return [HostedGenerator.of(info) for info in await client.list_generators()]

        return self._start(ask()).result()

    def variants(
        self,
        images: Sequence[Any] | Wanted,
        indices: int | Sequence[int] = 0,
        *,
        generator: str | None = None,
        parameters: Mapping[str, float] | None = None,
        seeds: int | Sequence[int] | None = None,
        priority: Priority | None = None,
    ) -> VariantBatch:
        """Fetches a variant of each image; one asked for twice is sent once.

        Args:
            images: N of: the bytes or the path of an image file, a PIL image, a uint8 array or torch tensor [3, H, W],
                [1, H, W], [H, W, 3] or [H, W], or a genssl StoredImage. Or all of it as `wanted_variants` returns it.
                Files go as they are; pixels of more than 16 MiB are shrunk first, by the rule of `images.stored_image`.
            indices: number of the variant wanted, for each image or one for all: a variant is a function of image,
                generator, parameters and index.
            generator: its id on the server; None: the only one there is.
            parameters: on top of the generator's defaults.
            seeds: of the noise, in place of those that follow from the index; for each image or one for all.
            priority: None: the client's.

        Raises:
            ServerUnavailableError: if the variants are not there after `deadline_seconds`; says why.
            RequestRefusedError: if a server refuses the request or one of its images.
            TypeError, ValueError, DataError: if an image is not one, or the numbers do not fit.
            UserError: in a forked child of a process with a live client.
        """
        future = self.submit(
            images, indices, generator=generator, parameters=parameters, seeds=seeds, priority=priority
        )
        try:
            return future.result(self._deadline + SLACK_SECONDS)
        except TimeoutError:
            if future.done():
                raise
            future.cancel()
            raise ServerUnavailableError(
                f"after {self._deadline + SLACK_SECONDS:g} s the thread that talks to {', '.join(self.targets)} has "
                "not ended the call at its deadline: this process is short of processor time or memory, or stopped"
            ) from None
        except BaseException:
            future.cancel()  # Ctrl-C; without effect on what has ended
            raise

    def submit(
        self,
        images: Sequence[Any] | Wanted,
        indices: int | Sequence[int] = 0,
        *,
        generator: str | None = None,
        parameters: Mapping[str, float] | None = None,
        seeds: int | Sequence[int] | None = None,
        priority: Priority | None = None,
    ) -> concurrent.futures.Future[VariantBatch]:
        """Like `variants`, but returns at once; the future has the result, or raises. Cancel it to drop the request.

        The images have been read when it returns; they may be changed then.
        """
        if priority is not None:
            check_priority(priority)
        background_loop(allow_fork=self._allow_fork)  # a forked worker should be told before it reads images
        wanted = images if isinstance(images, Wanted) else wanted_variants(images, indices, seeds)
        options: dict[str, Any] = {"generator": generator, "parameters": dict(parameters or {}), "priority": priority}

        async def fetch() -> VariantBatch:
            return await self._connected().variants(wanted, **options, deadline=self._deadline)

        return self._start(fetch())

    def close(self) -> None:
        """Cancels what is under way and closes the channels. The next call connects anew."""
        if self._process == os.getpid():
            self._tasks.close(self._disconnect())
            self._begin()

    def _start(self, work: Work[T]) -> concurrent.futures.Future[T]:
        if self._process != os.getpid():
            _inherited.append((self._client, self._tasks))
            self._begin()
        return self._tasks.start(work)

    # ---- On the loop ----

    def _connected(self) -> AsyncVariantClient:
        if self._client is None:
            self._client = AsyncVariantClient(**self._settings, allow_fork=self._allow_fork)
        return self._client

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()
