"""gRPC settings that client and server share; each number is argued in the comment beside it."""

from __future__ import annotations

from collections.abc import Mapping

from genssl.config.limits import MESSAGE_ROOM, LimitsConfig

# Bytes that protobuf fields take beside the pixels, a message and a variant, generously.
MESSAGE_OVERHEAD, ROW_OVERHEAD = MESSAGE_ROOM, 128

# What comes in of a message before it is asked for, and how far one connection may run ahead.
WINDOW_BYTES = 16 * 2**10

SERVICE = "genssl.generation.v1.GenerationService"

# The server's limit, which clients ask for and keep, is what counts; this one only bounds what a wrong server can send.
CLIENT_MESSAGE_BYTES = 256 * 2**20

# What a server is asked beside variants, at once: who it is, and its statistics.
OTHER_CALLS = 2
# At a server that does not say how many calls a connection may have; the first ones allowed 64 streams.
UNSTATED_CALLS = 32

CLIENT_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", CLIENT_MESSAGE_BYTES),
    ("grpc.max_send_message_length", CLIENT_MESSAGE_BYTES),
    # Slower than the server's minimum interval of 30 s, so that it never answers GOAWAY too_many_pings; together well
    # under the default deadline of 60 s, so that a call at a stuck server is repeated at another one in time.
    ("grpc.keepalive_time_ms", 35_000),
    # This ends a connection whose ping is not answered; keepalive_timeout_ms alone does not (grpcio 1.85 waits 60 s).
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # By default only two pings watch a call under which no data comes; a slow generator's calls may last longer.
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted server should be found again within a second or two, not after the default two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Our own retries know what may be repeated; the channel's would hide them from the ledger.
    ("grpc.enable_retries", 0),
    # Loopback and private addresses must not be sent through a web proxy.
    ("grpc.enable_http_proxy", 0),
    # Otherwise all clients of a process share one connection, and together exceed the calls that it may have.
    ("grpc.use_local_subchannel_pool", 1),
]


# Connections whose other end has vanished, or that never speak, must not be held for ever: each costs a descriptor.
SERVER_KEEPALIVE: dict[str, int] = {
    "grpc.keepalive_time_ms": 60_000,
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.http2.ping_timeout_ms": 20_000,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.http2.max_pings_without_data": 0,
    "grpc.server_handshake_timeout_ms": 20_000,  # for TLS and the first HTTP/2 frame
    # Without a call, a health watch being one, for so long; clients connect anew when they have one, and do not notice.
    "grpc.max_connection_idle_ms": 1_800_000,
}


def server_options(
    limits: LimitsConfig, keepalive: Mapping[str, int] = SERVER_KEEPALIVE
) -> list[tuple[str, int | str]]:
    """Returns the options of a server that keeps these limits."""
    return [
        *keepalive.items(),
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.max_concurrent_streams", limits.streams_per_connection()),
        # Before a message is asked for, only a window of it comes in. gRPC would widen windows to what the line can
        # carry: a connection could push 1 GB into 64 calls that nobody read.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 30_000),
        # A second server on the same port must fail, not share its connections.
        ("grpc.so_reuseport", 0),
    ]
