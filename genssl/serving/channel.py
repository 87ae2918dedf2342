"""gRPC settings that client and server share; each number is argued in the comment beside it."""

from __future__ import annotations

# Bytes that protobuf fields take beside the pixels, a message and a variant, generously.
MESSAGE_OVERHEAD, ROW_OVERHEAD = 2**16, 128

# What comes in of a message before it is asked for, and how far one connection may run ahead.
WINDOW_BYTES = 16 * 2**10

SERVICE = "genssl.generation.v1.GenerationService"

# The server's limit, which clients ask for and keep, is what counts; this one only bounds what a wrong server can send.
CLIENT_MESSAGE_BYTES = 256 * 2**20

CLIENT_OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", CLIENT_MESSAGE_BYTES),
    ("grpc.max_send_message_length", CLIENT_MESSAGE_BYTES),
    # Slower than the server's minimum interval of 30 s, so that it never answers GOAWAY too_many_pings; together well
    # under the default deadline of 60 s, so that a call at a stuck server is repeated at another one in time.
    ("grpc.keepalive_time_ms", 35_000),
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
]


def server_options(max_message_bytes: int, *, connections: int = 128, calls: int = 32) -> list[tuple[str, int | str]]:
    """Returns the options of a server for messages of at most this size, so many connections, and calls of each."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.max_concurrent_streams", calls),
        # Before a message is asked for, only a window of it comes in. gRPC would widen windows to what the line can
        # carry: a connection could push 1 GB into 64 calls that nobody read.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 30_000),
        # A second server on the same port must fail, not share its connections.
        ("grpc.so_reuseport", 0),
    ]


def host_of(peer: str) -> str:
    """Returns the host of a gRPC peer, such as "ipv4:127.0.0.1" of "ipv4:127.0.0.1:40012"; of a socket file "unix"."""
    return peer.rpartition(":")[0]
