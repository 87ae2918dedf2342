"""How the server refuses a call, and what becomes of one that fails by a bug: it is counted and logged by its id."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from genssl.server.statistics import Reason, Statistics
from genssl.server.transport.release import REFUSAL_SECONDS, drop_after
from genssl.wire.channel import SERVICE
from genssl.wire.refusals import refusal_status

log = logging.getLogger(__name__)

DEADLINE_TOLERANCE = 0.05
REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)


class RefusedError(Exception):
    """A call that must be refused; `refuse` has the meaning of the fields."""

    def __init__(self, code: grpc.StatusCode, reason: Reason, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code, self.reason, self.retry_after = code, reason, retry_after


def invalid(message: str, reason: Reason = "invalid") -> RefusedError:
    """Returns the refusal of a request that this server never takes."""
    return RefusedError(grpc.StatusCode.INVALID_ARGUMENT, reason, message)


async def refuse(
    context: grpc.aio.ServicerContext,
    statistics: Statistics,
    code: grpc.StatusCode,
    reason: Reason,
    message: str,
    retry_after: float | None = None,
) -> NoReturn:
    """Counts a refusal and ends the call with it.

    The client is told the reason in capitals, the message, and the seconds after which the same request may succeed.
    """
    statistics.rejected(reason)
    await _abort(context, code, reason.upper(), message, retry_after, {})


async def _abort(
    context: grpc.aio.ServicerContext,
    code: grpc.StatusCode,
    reason: str,
    message: str,
    retry_after: float | None,
    metadata: Mapping[str, str],
) -> NoReturn:
    text, trailers = refusal_status(code, reason, message, retry_after, metadata)
    drop_after(REFUSAL_SECONDS)
    await context.abort(code, text, trailing_metadata=trailers)
    raise AssertionError("abort raises")


class GuardInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Counts every call, and turns an exception that escapes a handler into INTERNAL with a request id.

    gRPC would send the exception's text to the client; the client gets the id alone, and the server's log has the
    traceback under it. Must come before the interceptors that answer calls, so that it sees their answers.
    """

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self._answering = 0
        self._answered = asyncio.Event()
        self._answered.set()

    async def answered(self) -> None:
        """Returns once every unary call has been answered; streams, which may wait for ever, do not count."""
        await self._answered.wait()

    def _begin(self) -> None:
        call = asyncio.current_task()
        assert call is not None, "a handler runs in a task"
        self._answering += 1
        self._answered.clear()
        # The task ends after the answer has left. A callback of the context would make a cycle of references, and a
        # call that is dropped would keep its stream until the garbage is collected; see `release`.
        call.add_done_callback(self._end)

    def _end(self, _: object) -> None:
        self._answering -= 1
        if not self._answering:
            self._answered.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Wraps the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            # Not under its own name: every made-up method would be a time series.
            self._statistics.request("unknown", grpc.StatusCode.UNIMPLEMENTED.name, 0.0)
            return None
        method = handler_call_details.method.lstrip("/").removeprefix(f"{SERVICE}/")
        shapes = {True: "stream", False: "unary"}
        kind = f"{shapes[handler.request_streaming]}_{shapes[handler.response_streaming]}"
        guarded = self._guard(method, getattr(handler, kind), streams=handler.response_streaming)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(guarded, _forgiving(handler.request_deserializer), handler.response_serializer)

    def _guard(self, method: str, function: Callable[..., Any], *, streams: bool) -> Callable[..., Any]:
        """Returns the handler's function with everything around it that this class promises."""
        if inspect.isasyncgenfunction(function):

            async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
                with self._watched(method, request, context) as failed:
                    async for response in function(request, context):
                        yield response
                if failed:
                    await _abort_internal(context, failed[0])

            return stream

        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            response = None
            if not streams:
                self._begin()
            with self._watched(method, request, context) as failed:
                if request is _GARBLED:
                    message = "the message is not the protocol buffer that this method takes"
                    await refuse(context, self._statistics, grpc.StatusCode.INVALID_ARGUMENT, "invalid", message)
                response = await function(request, context)
            if failed:
                await _abort_internal(context, failed[0])
            return response

        return call

    @contextmanager
    def _watched(self, method: str, request: Any, context: grpc.aio.ServicerContext) -> Iterator[list[str]]:
        """Counts the call, and swallows an unexpected exception after logging it: its id is put into the list."""
        started, code, failed = time.perf_counter(), None, list[str]()
        try:
            yield failed
        except grpc.aio.AbortError:
            raise
        except grpc.aio.InternalError:  # gRPC has nobody left to send an answer or a refusal to
            code = _left_or_late(context)
            raise asyncio.CancelledError from None
        except Exception:
            given = getattr(request, "request_id", "")
            request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex[:12]
            log.exception("%s failed unexpectedly, request %s", method, request_id, extra={"request_id": request_id})
            failed.append(request_id)
            code = grpc.StatusCode.INTERNAL
        except BaseException:  # the call was cancelled: its client went away, or its deadline passed
            code = _left_or_late(context)
            raise
        finally:
            name = (code or context.code() or grpc.StatusCode.OK).name
            self._statistics.request(method, name, time.perf_counter() - started)


def _left_or_late(context: grpc.aio.ServicerContext) -> grpc.StatusCode:
    left = context.time_remaining()
    # A client whose clock is a little ahead hangs up just before the deadline that it set.
    late = left is not None and left <= DEADLINE_TOLERANCE
    return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED


_GARBLED = object()  # stands for a request that could not be parsed


def _forgiving(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """Returns a deserializer that lets the handler refuse; gRPC itself would answer UNKNOWN with Python's error."""
    if deserialize is None:
        return None

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _GARBLED

    return parse


async def _abort_internal(context: grpc.aio.ServicerContext, request_id: str) -> NoReturn:
    message = f"the server failed on this request; its log says more under the request id {request_id}"
    try:
        await _abort(context, grpc.StatusCode.INTERNAL, "INTERNAL", message, None, {"request_id": request_id})
    except grpc.aio.InternalError:  # the client has left; the log has said what there is to say
        raise asyncio.CancelledError from None
