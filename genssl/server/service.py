"""The RPCs of the generation service: what is refused, and who answers the rest."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc

from genssl import __version__
from genssl.base.wording import counted
from genssl.config.server import ServerFile
from genssl.errors import RequestRefusedError, suggest
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc
from genssl.server.admission import Admission, Claim
from genssl.server.auth import Token, current_token, holder_of
from genssl.server.batching.jobs import Caller, DeadlinePassedError
from genssl.server.batching.schedule import BatchKey, Priority, Submitter
from genssl.server.codec import OUTPUT_ENCODINGS, CodecPool, Failure, ReadyVariant, encode_variants
from genssl.server.guard import RefusedError, invalid, refuse
from genssl.server.hosted import Hosted, RequestPlan
from genssl.server.statistics import CLIENT_ID_CHARACTERS, Origin, Statistics
from genssl.variants.engine import Settings
from genssl.wire.channel import MESSAGE_OVERHEAD, ROW_OVERHEAD

log = logging.getLogger(__name__)

CODEC_THREADS = 2
BATCHING = {"dynamic": pb.BATCHING_DYNAMIC, "deterministic": pb.BATCHING_DETERMINISTIC}
ORIGINS: dict[int, Origin] = {pb.ORIGIN_GENERATED: "generated", pb.ORIGIN_STORE: "store", pb.ORIGIN_MEMORY: "memory"}
# What a client that is refused waits before the cost of its generator has been measured, in seconds.
FIRST_RETRY, LEAST_RETRY = 0.5, 0.05


class GenerationService(pb_grpc.GenerationServiceServicer):
    """Answers for the generators in `hosted`, which is empty until all of them are loaded.

    The limits of the server file are checked before anything is decoded. `threads` are torch's on CPU, 0 elsewhere.
    """

    def __init__(
        self, file: ServerFile, device_name: str, threads: int, admission: Admission, statistics: Statistics
    ) -> None:
        self.hosted: dict[str, Hosted] = {}
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
            max_queued_variants_per_client=self._admission.most_variants(token.max_queued_variants if token else None),
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
        try:
            return await self._generate(request, context.peer(), context.time_remaining())
        except RefusedError as error:
            await refuse(context, self._statistics, error.code, error.reason, str(error), error.retry_after)
        except asyncio.CancelledError:
            remaining = context.time_remaining()
            self._statistics.rejected("cancelled" if remaining is None or remaining > 0 else "deadline")
            raise

    async def _generate(
        self, request: pb.GenerateVariantsRequest, peer: str, remaining: float | None
    ) -> pb.GenerateVariantsResponse:
        started, loop, token = time.perf_counter(), asyncio.get_running_loop(), current_token()

        # --- who asks for what, and whether there is room for it ------------------------------------------------------
        hosted = self._find_generator(request)
        plan = hosted.plan(request, self._check(request, hosted))
        client = "/".join(filter(None, (token.name if token else "", request.client_id))) or peer
        client = client[:CLIENT_ID_CHARACTERS]
        priority = Priority(request.priority or pb.PRIORITY_TRAINING)
        caller = Caller(
            Submitter(client, token.lowered(priority) if token else priority, holder_of(token, peer)),
            None if remaining is None else loop.time() + remaining,
        )
        claim = self._admit(request, hosted, plan, token.name if token else client, token)
        counts, charged, waiting = self._statistics.client(client), 0, self._statistics.waiting
        waiting[client] += claim.variants
        done = self._admission.hold(claim)

        # --- find, make, encode ---------------------------------------------------------------------------------------
        try:
            await hosted.find(plan)
            self._check_in_time(hosted, plan, caller)
            charged = self._charge(token, len(plan.left))
            await hosted.make(plan, caller)
            encoding = time.perf_counter()
            items = plan.finished()
            variants = await encode_variants(items, request.output.encoding, self.codec, caller.submitter)
        except RequestRefusedError as error:
            raise invalid(str(error), "too_large") from None
        except DeadlinePassedError as error:
            raise RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline", str(error)) from None
        finally:
            done()
            waiting[client] -= claim.variants
            if not waiting[client]:
                del waiting[client]
            # On every way out: what was not made costs nothing, whether it was there, could not be, or came too late.
            if token is not None and token.rate is not None and charged:
                token.rate.give_back(charged - caller.spent)

        # --- count and answer -----------------------------------------------------------------------------------------
        ended = time.perf_counter()
        counts.variants += self._count(hosted, items, ended - encoding)
        queue_seconds = max(0.0, encoding - started - plan.device_seconds)
        log.debug(
            "served",
            extra={
                "request_id": request.request_id,
                "client": client,
                "generator": hosted.generator_id,
                "variants": len(variants),
                "wait_ms": round(1000 * queue_seconds, 2),
                "generate_ms": round(1000 * plan.device_seconds, 2),
            },
        )
        return pb.GenerateVariantsResponse(
            variants=variants,
            missing_digests=plan.missing,
            timings=pb.Timings(
                queue_seconds=queue_seconds, generate_seconds=plan.device_seconds, encode_seconds=ended - encoding
            ),
        )

    async def close(self) -> None:
        """Stops every queue."""
        for hosted in self.hosted.values():
            await hosted.close()
        self._codec_threads.shutdown(wait=False, cancel_futures=True)

    def _find_generator(self, request: pb.GenerateVariantsRequest) -> Hosted:
        """Returns the generator that a request is for, or refuses."""
        if self._statistics.state != "serving":
            # A client that was here before a restart asks again; NOT_FOUND would end its run.
            raise RefusedError(grpc.StatusCode.UNAVAILABLE, "not_ready", f"the server is {self._statistics.state}", 0.5)
        hosted = self.hosted.get(request.generator_id)
        if hosted is None:
            raise RefusedError(
                grpc.StatusCode.NOT_FOUND,
                "invalid",
                f"there is no generator {request.generator_id!r} here{suggest(request.generator_id, self.hosted)}",
            )
        spec = hosted.engine.generator.spec
        if request.expected_fingerprint and request.expected_fingerprint != spec.fingerprint:
            raise RefusedError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "invalid",
                f"generator {request.generator_id!r} has the fingerprint {spec.fingerprint.hex()}, "
                f"not {request.expected_fingerprint.hex()}: its weights, config or code have changed",
            )
        return hosted

    def _check(self, request: pb.GenerateVariantsRequest, hosted: Hosted) -> Settings:
        """Refuses what this server never takes, before any work is done; returns the request's settings."""
        count, most = len(request.variants), self._limits.max_variants_per_request
        variants, sources = counted(count, "variant"), counted(len(request.sources), "source")
        if not 0 < count <= most:
            raise invalid(f"the request asks for {variants}; 1 to {most} are allowed", "too_large")
        if len(request.sources) > count:
            raise invalid(f"the request has {sources} for {variants}")
        if request.output.encoding not in (pb.IMAGE_ENCODING_UNSPECIFIED, *OUTPUT_ENCODINGS):
            raise invalid("output.encoding must be RAW or PNG")
        if request.priority not in pb.Priority.values():
            raise invalid("priority must be INTERACTIVE, TRAINING or BULK")
        try:
            return hosted.settings(request.parameters)
        except RequestRefusedError as error:
            raise invalid(str(error)) from None

    def _admit(
        self, request: pb.GenerateVariantsRequest, hosted: Hosted, plan: RequestPlan, holder: str, token: Token | None
    ) -> Claim:
        """Refuses what would take more than there is room for; returns what the request holds from now on."""
        count = len(plan.answers)
        variants = counted(count, "variant")
        sizes = [hosted.variant_bytes(item.settings) for item in plan.left.values()]
        answer = sum(sizes) + count * ROW_OVERHEAD + MESSAGE_OVERHEAD
        if answer > self._limits.max_message_bytes:
            room = self._limits.max_message_bytes - MESSAGE_OVERHEAD
            raise invalid(
                f"{variants} of up to {max(sizes):,} bytes would exceed a message's "
                f"{self._limits.max_message_bytes:,} bytes; "
                f"ask for at most {room // (max(sizes) + ROW_OVERHEAD)} at once",
                "too_large",
            )
        decoded = hosted.source_bytes * sum(bool(source.data) for source in request.sources)
        claim = Claim(holder, count, request.ByteSize() + decoded + answer)
        if claim.num_bytes > self._admission.most_bytes():
            raise invalid(
                f"the request, its decoded images and its answer would hold {claim.num_bytes:,} bytes; a client may "
                f"hold {self._admission.most_bytes():,}; ask for fewer variants at once",
                "too_large",
            )
        token_most = token.max_queued_variants if token else None
        most = self._admission.most_variants(token_most)
        if count > most:
            raise invalid(f"the request asks for {variants}; {most} may be queued at once", "too_large")
        full = self._admission.refuses(claim, token_most)
        if full is not None:
            key = next((item.settings.batch_key for item in plan.left.values()), None)
            seconds = hosted.batcher.cost.predict(key, full.excess, hosted.engine.buckets)
            retry_after = FIRST_RETRY if seconds is None else max(LEAST_RETRY, seconds)
            raise RefusedError(grpc.StatusCode.RESOURCE_EXHAUSTED, full.reason, full.message, retry_after)
        return claim

    def _check_in_time(self, hosted: Hosted, plan: RequestPlan, caller: Caller) -> None:
        """Refuses at once what has to be made and would be late."""
        if caller.deadline is None or not plan.left:
            return
        remaining = caller.deadline - asyncio.get_running_loop().time()
        rows: Counter[BatchKey] = Counter(item.settings.batch_key for item in plan.left.values())
        wait = hosted.batcher.predicted_wait(rows, caller.submitter)
        if wait is not None and wait > remaining:
            raise RefusedError(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "deadline",
                f"these variants would be ready in {wait:.2f} s, after the deadline in {remaining:.2f} s",
                wait - remaining,
            )

    def _charge(self, token: Token | None, variants: int) -> int:
        """Takes variants that may have to be made from the token's rate, or refuses; returns how many it took."""
        if token is None or token.rate is None:
            return 0
        pause = token.rate.take(variants)
        if pause > 0:
            raise RefusedError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "rate",
                f"the token {token.name!r} may take {counted(token.rate.per_second, 'variant')} a second",
                pause,
            )
        return variants

    def _count(self, hosted: Hosted, items: Sequence[ReadyVariant | Failure], encode_seconds: float) -> int:
        """Enters what became of a request's items; returns how many got a variant."""
        counters = hosted.counters
        counters.encode.observe(encode_seconds)
        made = 0
        for item in items:
            if isinstance(item, ReadyVariant):
                counters.delivered("shared" if item.shared else ORIGINS[item.origin])
                made += 1
            elif item.code in (pb.ITEM_CODE_BAD_IMAGE, pb.ITEM_CODE_DIGEST_MISMATCH):
                self._statistics.rejected("bad_image")
            elif item.code == pb.ITEM_CODE_BAD_SPEC:
                self._statistics.rejected("invalid")
            elif item.code == pb.ITEM_CODE_GENERATOR_FAILED:
                counters.failed.inc()
        return made
