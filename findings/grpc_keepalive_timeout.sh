#!/usr/bin/env bash
# grpcio 1.85.3: grpc.keepalive_timeout_ms does not bound how long a dead peer is waited for; the ping's own timeout
# (grpc.http2.ping_timeout_ms, 60 s) does.
#
# Expected, from the documentation ("how long to wait for the keepalive ping to be acknowledged before the connection is
# closed"): with a keepalive time and timeout of 1 s, a call at a peer that is silent after its HTTP/2 settings fails
# after 2 s. Seen: it fails after 61 s with "ping timeout"; with grpc.http2.ping_timeout_ms=1000 it fails after 2 s.
# A server that watches its clients behaves in the same way. This script waits 15 s, not 61.
#
# Output seen:
#   grpcio 1.85.3
#   keepalive_timeout_ms=1000: DEADLINE_EXCEEDED after 15 s
#   ping_timeout_ms=1000: UNAVAILABLE after 2 s
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet grpcio==1.85.3
"$folder/venv/bin/python" - <<'PYTHON'
import socket
import threading
import time

import grpc

SETTINGS, ACKNOWLEDGED = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), bytes([0, 0, 0, 4, 1, 0, 0, 0, 0])


def silent_peer(listener):
    connection, _ = listener.accept()
    connection.sendall(SETTINGS + ACKNOWLEDGED)
    while connection.recv(65536):
        pass


print("grpcio", grpc.__version__)
codes = []
for option in ("keepalive_timeout_ms", "http2.ping_timeout_ms"):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=silent_peer, args=(listener,), daemon=True).start()
        options = [("grpc.keepalive_time_ms", 1000), (f"grpc.{option}", 1000), ("grpc.enable_retries", 0)]
        started = time.monotonic()
        with grpc.insecure_channel(f"127.0.0.1:{listener.getsockname()[1]}", options) as channel:
            try:
                channel.unary_unary("/a/b")(b"", timeout=15)
            except grpc.RpcError as error:
                codes.append(error.code().name)
        print(f"{option.removeprefix('http2.')}=1000: {codes[-1]} after {time.monotonic() - started:.0f} s")
raise SystemExit(0 if codes == ["DEADLINE_EXCEEDED", "UNAVAILABLE"] else 1)
PYTHON
