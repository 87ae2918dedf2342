"""Messages in and out of every call, within bounds: each comes in at its turn and in time, and is taken in time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc

from genssl.config.limits import LimitsConfig
from genssl.server.admission import Admission
from genssl.server.auth import current_token, holder_of
from genssl.server.guard import refuse
from genssl.server.statistics import Reason, Statistics
from genssl.server.transport.reception import Reception
from genssl.server.transport.release import drop_after, drop_timer
from genssl.wire.channel import SERVICE

LARGE = f"/{SERVICE}/GenerateVariants"  # the one method whose messages carry images
SMALL_BYTES, SMALL_SECONDS = 2**16, 2.0  # of all other methods' messages
QUICK_SECONDS = 1.0  # a message that takes longer needs one of the places for those


class TransferInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Asks for each message itself, where gRPC would take it in before anyone is asked.

    Must be the first of a server's interceptors: what the others refuse is then refused before its message comes in.
    """

    def __init__(self, limits: LimitsConfig, admission: Admission, statistics: Statistics) -> None:
        self._limits, self._admission, self._statistics = limits, admission, statistics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Gives the handler of one call the shape in which messages are asked for; on the wire nothing changes."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        receiver = _Receiver(self._limits, self._admission, self._statistics, method, handler.request_deserializer)
        if handler.response_streaming:
            function = handler.stream_stream if handler.request_streaming else handler.unary_stream
            call = _streaming(function, receiver, many=handler.request_streaming)
            return grpc.stream_stream_rpc_method_handler(call, None, handler.response_serializer)
        assert not handler.request_streaming, "there is no such method"
        unary = self._unary(handler.unary_unary, receiver, handler.response_serializer)
        return grpc.stream_unary_rpc_method_handler(unary)

    def _unary(
        self, function: Callable[..., Any], receiver: _Receiver, serialize: Callable[[Any], bytes]
    ) -> Callable[..., Any]:
        async def call(_: object, context: grpc.aio.ServicerContext) -> bytes:
            message = await receiver.receive(context)
            if message is grpc.aio.EOF:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call ended without a message")
            answer = [await function(message, context)]
            message = None  # neither it nor the parsed answer may wait for the client beside the answer's bytes
            data = serialize(answer.pop())
            drop_after(self._limits.send_seconds)
            return data

        return call


def _streaming(function: Callable[..., Any], receiver: _Receiver, *, many: bool) -> Callable[..., Any]:
    """Returns what runs a handler that answers with a stream; it takes one message, or `many`."""

    async def messages(context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        while (message := await receiver.receive(context)) is not grpc.aio.EOF:
            yield message

    async def call(_: object, context: grpc.aio.ServicerContext) -> None:
        request = messages(context) if many else await receiver.receive(context)
        if request is grpc.aio.EOF:
            return
        ahead = _WritingAhead(context)
        try:
            if inspect.isasyncgenfunction(function):
                async for answer in function(request, ahead):
                    await ahead.write(answer)
            else:
                await function(request, ahead)
            await ahead.written()
        finally:
            ahead.close()

    return call


class _Receiver:
    """Takes in the messages of one call."""

    def __init__(
        self,
        limits: LimitsConfig,
        admission: Admission,
        statistics: Statistics,
        method: str,
        deserialize: Callable[[bytes], Any] | None,
    ) -> None:
        self._admission, self._statistics, self._method = admission, statistics, method
        self._deserialize, self._most = deserialize, limits.max_message_bytes
        self._large = method == LARGE
        self._reception: Reception = admission.large if self._large else admission.small
        self._seconds = limits.receive_seconds if self._large else min(SMALL_SECONDS, limits.receive_seconds)

    async def receive(self, context: grpc.aio.ServicerContext) -> Any:
        """Returns the next message, parsed; EOF if there is none, or the client went away. Or refuses."""
        peer = context.peer()
        holder = holder_of(current_token(), peer)
        started = time.perf_counter()
        async with self._reception.place(holder, peer) as place:
            # Never cancelled: gRPC would not free a message that comes in for a reader who is gone.
            reading = asyncio.ensure_future(context.read())
            reading.add_done_callback(lambda task: task.cancelled() or task.exception())
            place.reading = reading  # what has come in is held until then, though its call be refused before
            await asyncio.wait([reading], timeout=min(QUICK_SECONDS, self._seconds))
            if not reading.done():
                kept = place.keep_for_long()
                if kept:
                    await asyncio.wait([reading], timeout=self._seconds - QUICK_SECONDS)
                if not reading.done():
                    await self._refuse_slow(context, kept, started)
            message = reading.result()
            if message is grpc.aio.EOF:
                return message
            self._admission.heap.freed(len(message))
            if not self._large and len(message) > SMALL_BYTES:
                found = f"the message has {len(message):,} bytes; this method takes {SMALL_BYTES:,}"
                await self._refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "too_large", found, started)
            return message if self._deserialize is None else self._deserialize(message)

    async def _refuse_slow(self, context: grpc.aio.ServicerContext, kept: bool, started: float) -> NoReturn:
        self._admission.heap.freed(self._most)
        if kept:
            message = (
                f"the message was not finished within {self._seconds:g} s (limits.receive_seconds); "
                "send smaller ones, or over a faster line"
            )
            await self._refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED, "deadline", message, started)
        message = (
            "as many messages as may take long come in already; come back when RetryInfo says, or send smaller ones"
        )
        await self._refuse(
            context, grpc.StatusCode.RESOURCE_EXHAUSTED, "queue_full", message, started, retry_after=QUICK_SECONDS
        )

    async def _refuse(
        self,
        context: grpc.aio.ServicerContext,
        code: grpc.StatusCode,
        reason: Reason,
        message: str,
        started: float,
        retry_after: float | None = None,
    ) -> NoReturn:
        self._statistics.request(self._method.rpartition("/")[2], code.name, time.perf_counter() - started)
        await refuse(context, self._statistics, code, reason, message, retry_after)


class _WritingAhead:
    """A call's context whose `write` waits for the client's taking of the answer before, and not for long.

    The health service holds a lock while it writes: one watcher that reads nothing would keep it from telling the
    others, and the server from stopping.
    """

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context
        self._writing: asyncio.Future[None] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, message: Any) -> None:
        await self.written()
        self._writing = asyncio.ensure_future(self._context.write(message))
        timer = drop_timer(SMALL_SECONDS)
        self._writing.add_done_callback(lambda _: timer.cancel())

    async def written(self) -> None:
        if self._writing is not None:
            await self._writing

    def close(self) -> None:
        if self._writing is not None and not self._writing.cancel() and not self._writing.cancelled():
            self._writing.exception()  # the client went away; nobody else is to be told
