"""Refusals on the wire: how one is written into trailers, and read from them.

Every refusal carries a google.rpc.Status in its trailers: an ErrorInfo that programs can act on, a RetryInfo if coming
back later helps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "genssl"
DETAILS_KEY = "grpc-status-details-bin"
# Trailers of more than 8 KB may be dropped on the way, and a message stands in them twice, once percent-encoded.
MESSAGE_BYTES, METADATA_BYTES = 1024, 200
LONGEST_RETRY = 600.0


@dataclass(frozen=True)
class Refusal:
    """A refusal as the client reads it.

    Attributes:
        retry_after: seconds after which the same request may succeed; None if the server does not say.
    """

    code: grpc.StatusCode  # the gRPC status
    reason: str  # in capitals, such as "QUEUE_FULL"; empty if the refusal is not genssl's own
    message: str  # for people
    retry_after: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)  # further facts by name


def read_refusal(error: grpc.RpcError) -> Refusal:
    """Returns what a failed call says; works for errors of the synchronous and of the asyncio API.

    Never raises: details that are absent, damaged or not genssl's leave `reason` empty.
    """
    call: Any = error
    code, message = call.code(), call.details() or ""
    status = status_pb2.Status()
    for key, value in call.trailing_metadata() or ():
        if key == DETAILS_KEY:
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                break
    reason, retry_after, metadata = "", None, {}
    for packed in status.details:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        try:
            if packed.Unpack(info) and info.domain == DOMAIN:
                reason, metadata = info.reason, dict(info.metadata)
            elif packed.Unpack(retry):
                retry_after = max(0.0, retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9)
        except DecodeError:
            continue
    return Refusal(code, reason, message, retry_after, metadata)


def refusal_status(
    code: grpc.StatusCode, reason: str, message: str, retry_after: float | None, metadata: Mapping[str, str]
) -> tuple[str, tuple[tuple[str, bytes], ...]]:
    """Returns the message, cut to what trailers can carry, and the trailers."""
    text = _cut(message, MESSAGE_BYTES)
    status = status_pb2.Status(code=code.value[0], message=text)
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
    for name, value in metadata.items():
        info.metadata[name] = _cut(value, METADATA_BYTES)
    status.details.add().Pack(info)
    if retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(1e9 * min(max(retry_after, 0.0), LONGEST_RETRY)))
        status.details.add().Pack(retry)
    return text, ((DETAILS_KEY, status.SerializeToString()),)


def _cut(text: str, most: int) -> str:
    """Returns the text, shortened to so many bytes of UTF-8."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= most:
        return encoded.decode()
    return encoded[: most - 3].decode("utf-8", "ignore") + "…"
