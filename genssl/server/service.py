"""The RPCs of the generation service: what is refused, and who answers the rest."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NoReturn

import grpc

from genssl import __version__
from genssl.base.wording import counted
from genssl.config.server import ServerFile
from genssl.errors import RequestRefusedError, suggest
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc
from genssl.server.admission import Admission, Claim
from genssl.server.auth import Token, current_token, holder_of
from genssl.server.batching.jobs import DeadlinePassedError
from genssl.server.batching.schedule import BatchKey, Priority
from genssl.server.codec import OUTPUT_ENCODINGS, Failure, Ready, encode_variants
from genssl.server.codec_pool import CodecPool
from genssl.server.guard import refuse
from genssl.server.hosted import Caller, Hosted, Wanted
from genssl.server.statistics import CLIENT_ID_CHARACTERS, Origin, Reason, Statistics
from genssl.variants.engine import Settings
from genssl.wire.channel import MESSAGE_OVERHEAD, ROW_OVERHEAD

log = logging.getLogger(__name__)

CODEC_THREADS = 2
BATCHING = {"dynamic": pb.BATCHING_DYNAMIC, "deterministic": pb.BATCHING_DETERMINISTIC}
ORIGINS: dict[int, Origin] = {
    pb.ORIGIN_GENERATED: "generated",
    pb.ORIGIN_STORE: "store",
    pb.ORIGIN_MEMORY: "memory",
}
# What a client that is refused waits before the cost of its generator has been measured, in seconds.
FIRST_RETRY, LEAST_RETRY = 0.5, 0.05


class GenerationService(pb_grpc.GenerationServiceServicer):
    """Answers for the generators in `hosted`, which is empty until all of them are loaded.

    Args:
        file: has the limits, which are checked before anything is decoded.
        device_name: for GetServerInfo.
        threads: torch threads on CPU, 0 elsewhere.
        admission: counts what is under way.
        statistics: counts what happens here.
    """

    def __init__(
        self, file: ServerFile, device_name: str, threads: int, admission: Admission, statistics: Statistics
    ) -> None:
        self.hosted: dict[str, Hosted] = {}
        self.state: Literal["loading", "serving", "draining"] = "loading"
        self._codec_threads = ThreadPoolExecutor(CODEC_THREADS, thread_name_prefix="genssl-codec")
        self.codec = CodecPool(
            self._codec_threads,
            threads=CODEC_THREADS,
            most_pixels=file.limits.pixels_at_once(),
            ageing_seconds=file.ageing_seconds,
        )
        self._file, self._limits = file, file.limits
        self._device_name, self._threads, self._statistics = device_name, threads, statistics
        self._admission = admission
        self.queued: Counter[str] = Counter()
        self._instance_id = secrets.token_hex(8)

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        """Returns version, device, and the limits that this caller must keep."""
        limits, token = self._limits, current_token()
        return pb.GetServerInfoResponse(
            version=__version__,
            device=self._device_name,
            max_variants_per_request=limits.max_variants_per_request,
            max_message_bytes=limits.max_message_bytes,
            max_image_bytes=limits.max_image_bytes,
            max_image_pixels=limits.max_image_pixels,
            max_queued_variants=limits.max_queued_variants,
            max_queued_variants_per_client=self._admission.most(token.max_queued_variants if token else None),
            max_queued_bytes=limits.most_queued_bytes(),
            max_queued_bytes_per_client=limits.max_queued_bytes_per_client,
            buckets=self._file.buckets[-1:] if self._file.batching == "deterministic" else self._file.buckets,
            batching=BATCHING[self._file.batching],
            instance_id=self._instance_id,
            threads=self._threads,
            max_concurrent_calls=limits.max_calls_per_connection,
        )

    async def ListGenerators(
        self, request: pb.ListGeneratorsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListGeneratorsResponse:
        """Returns the generators that are loaded."""
        return pb.ListGeneratorsResponse(generators=[hosted.info() for hosted in self.hosted.values()])

    async def GetStatistics(
        self, request: pb.GetStatisticsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetStatisticsResponse:
        """Returns the counters since the server started."""
        return self._statistics.to_proto()

    async def GenerateVariants(
        self, request: pb.GenerateVariantsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateVariantsResponse:
        """Makes the variants of a request; see the .proto for the contract."""
        started = time.perf_counter()
        hosted = await self._hosted(request, context)
        settings = await self._check(request, hosted, context)
        wanted = hosted.read(request, settings)
        token = current_token()
        client = "/".join(filter(None, (token.name if token else "", request.client_id))) or context.peer()
        client = client[:CLIENT_ID_CHARACTERS]
        claim = await self._admit(request, hosted, wanted, client, context)
        counters, charged, caller = self._statistics.client(client), 0, None
        self.queued[client] += claim.variants
        done = self._admission.hold(claim)
        try:
            found = await hosted.find(wanted)
            left = [item for item in wanted if isinstance(item, Wanted) and item.name not in found]
            caller = await self._in_time(request, hosted, left, client, context)
            charged = await self._charge(token, len(left), context)
            outcome = await hosted.make(request, wanted, found, caller)
            encoded = time.perf_counter()
            variants = await encode_variants(outcome.items, request.output.encoding, self.codec, caller)
        except RequestRefusedError as error:
            await self._refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "too_large", str(error))
        except DeadlinePassedError as error:
            await self._refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, "deadline", str(error))
        except asyncio.CancelledError:
            remaining = context.time_remaining()
            self._statistics.rejected("cancelled" if remaining is None or remaining > 0 else "deadline")
            raise
        finally:
            done()
            self.queued[client] -= claim.variants
            if not self.queued[client]:
                del self.queued[client]
            # On every way out: what was not made costs nothing, whether it was there, could not be, or came too late.
            if token is not None and token.rate is not None and caller is not None:
                token.rate.give_back(charged - caller.spent.rows)
        ended = time.perf_counter()
        counters.variants += self._count(hosted, outcome.items, ended - encoded)
        queue_seconds = max(0.0, encoded - started - outcome.device_seconds)
        log.debug(
            "served",
            extra={
                "request_id": request.request_id,
                "client": client,
                "generator": hosted.generator_id,
                "variants": len(variants),
                "wait_ms": round(1000 * queue_seconds, 2),
                "generate_ms": round(1000 * outcome.device_seconds, 2),
            },
        )
        return pb.GenerateVariantsResponse(
            variants=variants,
            missing_digests=outcome.missing,
            timings=pb.Timings(
                queue_seconds=queue_seconds,
                generate_seconds=outcome.device_seconds,
                encode_seconds=ended - encoded,
            ),
        )

    async def close(self) -> None:
        """Stops every queue."""
        for hosted in self.hosted.values():
            await hosted.close()
        self._codec_threads.shutdown(wait=False, cancel_futures=True)

    async def _hosted(self, request: pb.GenerateVariantsRequest, context: grpc.aio.ServicerContext) -> Hosted:
        """Returns the generator that a request is for, or refuses."""
        if self.state != "serving":
            # A client that was here before a restart asks again; NOT_FOUND would end its run.
            await self._refuse(
                context, grpc.StatusCode.UNAVAILABLE, "not_ready", f"the server is {self.state}", retry_after=0.5
            )
        hosted = self.hosted.get(request.generator_id)
        if hosted is None:
            await self._refuse(
                context,
                grpc.StatusCode.NOT_FOUND,
                "invalid",
                f"there is no generator {request.generator_id!r} here{suggest(request.generator_id, self.hosted)}",
            )
        spec = hosted.engine.generator.spec
        if request.expected_fingerprint and request.expected_fingerprint != spec.fingerprint:
            await self._refuse(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                "invalid",
                f"generator {request.generator_id!r} has the fingerprint {spec.fingerprint.hex()}, "
                f"not {request.expected_fingerprint.hex()}: its weights, config or code have changed",
            )
        return hosted

    async def _check(
        self, request: pb.GenerateVariantsRequest, hosted: Hosted, context: grpc.aio.ServicerContext
    ) -> Settings:
        """Refuses what this server never takes, before any work is done; returns the request's settings."""
        limits = self._limits
        count, most = len(request.variants), limits.max_variants_per_request

        async def refuse_as(reason: Reason, message: str) -> NoReturn:
            await self._refuse(context, grpc.StatusCode.INVALID_ARGUMENT, reason, message)

        if not 0 < count <= most:
            await refuse_as("too_large", f"the request asks for {counted(count, 'variant')}; 1 to {most} are allowed")
        if len(request.sources) > count:
            of_sources = f"the request has {counted(len(request.sources), 'source')}"
            await refuse_as("invalid", f"{of_sources} for {counted(count, 'variant')}")
        if request.output.encoding not in (pb.IMAGE_ENCODING_UNSPECIFIED, *OUTPUT_ENCODINGS):
            await refuse_as("invalid", "output.encoding must be RAW or PNG")
        if request.priority not in pb.Priority.values():
            await refuse_as("invalid", "priority must be INTERACTIVE, TRAINING or BULK")
        try:
            settings = hosted.settings(request.parameters)
        except RequestRefusedError as error:
            await refuse_as("invalid", str(error))
        return settings

    async def _admit(
        self,
        request: pb.GenerateVariantsRequest,
        hosted: Hosted,
        wanted: Sequence[Wanted | Failure],
        client: str,
        context: grpc.aio.ServicerContext,
    ) -> Claim:
        """Refuses what would take more than there is room for; returns what the request holds from now on."""
        token = current_token()
        sizes = [hosted.variant_bytes(item.settings) for item in wanted if isinstance(item, Wanted)]
        answer = sum(sizes) + len(wanted) * ROW_OVERHEAD + MESSAGE_OVERHEAD
        if answer > self._limits.max_message_bytes:
            room = self._limits.max_message_bytes - MESSAGE_OVERHEAD
            await self._refuse(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                "too_large",
                f"{counted(len(wanted), 'variant')} of up to {max(sizes):,} bytes would exceed a message's "
                f"{self._limits.max_message_bytes:,} bytes; "
                f"ask for at most {room // (max(sizes) + ROW_OVERHEAD)} at once",
            )
        decoded = hosted.source_bytes * sum(bool(source.data) for source in request.sources)
        claim = Claim(token.name if token else client, len(wanted), request.ByteSize() + decoded + answer)
        if claim.num_bytes > self._admission.most_bytes():
            await self._refuse(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                "too_large",
                f"the request, its decoded images and its answer would hold {claim.num_bytes:,} bytes; a client may "
                f"hold {self._admission.most_bytes():,}; ask for fewer variants at once",
            )
        token_most = token.max_queued_variants if token else None
        most = self._admission.most(token_most)
        if len(wanted) > most:
            await self._refuse(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                "too_large",
                f"the request asks for {counted(len(wanted), 'variant')}; {most} may be queued at once",
            )
        full = self._admission.refuses(claim, token_most)
        if full is not None:
            key = next((item.settings.batch_key for item in wanted if isinstance(item, Wanted)), None)
            seconds = hosted.batcher.cost.predict(key, full.excess, hosted.engine.buckets)
            await self._refuse(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                full.reason,
                full.message,
                retry_after=FIRST_RETRY if seconds is None else max(LEAST_RETRY, seconds),
            )
        return claim

    async def _in_time(
        self,
        request: pb.GenerateVariantsRequest,
        hosted: Hosted,
        left: Sequence[Wanted],
        client: str,
        context: grpc.aio.ServicerContext,
    ) -> Caller:
        """Refuses at once what has to be made and would be late; returns who asks, and until when."""
        remaining, token = context.time_remaining(), current_token()
        priority = Priority(request.priority or pb.PRIORITY_TRAINING)
        if token is not None:
            priority = token.lowered(priority)
        holder = holder_of(token, context.peer())
        if remaining is None:
            return Caller(holder, client, priority)
        rows: Counter[BatchKey] = Counter(item.settings.batch_key for item in left)
        wait = hosted.batcher.predicted_wait(rows, priority, client=client, holder=holder) if rows else None
        if wait is not None and wait > remaining:
            await self._refuse(
                context,
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "deadline",
                f"these variants would be ready in {wait:.2f} s, after the deadline in {remaining:.2f} s",
                retry_after=wait - remaining,
            )
        return Caller(holder, client, priority, asyncio.get_running_loop().time() + remaining)

    async def _charge(self, token: Token | None, variants: int, context: grpc.aio.ServicerContext) -> int:
        """Takes variants that may have to be made from the token's rate, or refuses; returns how many it took."""
        if token is None or token.rate is None:
            return 0
        pause = token.rate.take(variants)
        if pause > 0:
            await self._refuse(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "rate",
                f"the token {token.name!r} may take {counted(token.rate.per_second, 'variant')} a second",
                retry_after=pause,
            )
        return variants

    def _count(self, hosted: Hosted, items: Sequence[Ready | Failure], encode_seconds: float) -> int:
        """Enters what became of a request's items; returns how many got a variant."""
        counters = hosted.counters
        counters.encode.observe(encode_seconds)
        made = 0
        for item in items:
            if isinstance(item, Ready):
                counters.variants["shared" if item.shared else ORIGINS[item.origin]] += 1
                made += 1
            elif item.code in (pb.ITEM_CODE_BAD_IMAGE, pb.ITEM_CODE_DIGEST_MISMATCH):
                self._statistics.rejected("bad_image")
            elif item.code == pb.ITEM_CODE_BAD_SPEC:
                self._statistics.rejected("invalid")
            elif item.code == pb.ITEM_CODE_GENERATOR_FAILED:
                counters.failed += 1
        return made

    async def _refuse(
        self,
        context: grpc.aio.ServicerContext,
        code: grpc.StatusCode,
        reason: Reason,
        message: str,
        retry_after: float | None = None,
    ) -> NoReturn:
        await refuse(context, self._statistics, code, reason, message, retry_after=retry_after)
