"""A client that speaks HTTP/2 frame by frame, and so can leave undone what a gRPC library would do for it."""

from __future__ import annotations

import select
import socket
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
END_STREAM = ACK = 1
END_HEADERS = 4
INITIAL_WINDOW_SIZE = 4
FRAME_BYTES = 16384


def message(data: bytes) -> bytes:
    """Returns a gRPC message as it stands in a stream."""
    return b"\0" + struct.pack(">I", len(data)) + data


def _header(name: str, value: str) -> bytes:
    """Returns a header literally, neither indexed nor compressed (RFC 7541, 6.2.2); both are short."""
    return b"\0" + b"".join(bytes([len(part)]) + part for part in (name.encode(), value.encode()))


class Connection:
    """One connection.

    Args:
        address: host:port.
        window: what the server may send of each answer, in bytes; with 0 it can send none.

    Attributes:
        ended: streams that the server ended or reset.
        received: bytes of answers that came.
        closed: whether the server closed the connection.
    """

    def __init__(self, address: str, window: int = 65535) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._buffer = b""
        self._next, self._window, self._initial = 1, 65535, 65535
        self._windows: dict[int, int] = {}
        self._unsent: dict[int, memoryview] = {}
        self.ended: set[int] = set()
        self.received, self.closed = 0, False
        self._socket.sendall(PREFACE)
        self._frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, window))

    def fileno(self) -> int:
        return self._socket.fileno()

    def call(self, method: str, data: bytes) -> int:
        """Begins a call; `data` goes out as far as the server lets it, see `poll`. The call's end is not told."""
        stream, self._next = self._next, self._next + 2
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": method,
            ":authority": "genssl",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        self._frame(HEADERS, END_HEADERS, stream, b"".join(_header(*header) for header in headers.items()))
        self._windows[stream], self._unsent[stream] = self._initial, memoryview(data)
        self._send()
        return stream

    def unsent(self) -> int:
        """Returns how many bytes the server has not let in."""
        return sum(map(len, self._unsent.values()))

    def poll(self, seconds: float = 0.0) -> None:
        """Reads what came, waiting so long at most, and sends what may be sent."""
        if not self.closed and select.select([self._socket], [], [], seconds)[0]:
            try:
                came = self._socket.recv(2**20)
            except ConnectionError:
                came = b""
            self.closed = not came
            self._buffer += came
        while len(self._buffer) >= 9:
            length = int.from_bytes(self._buffer[:3], "big")
            if len(self._buffer) < 9 + length:
                break
            kind, flags, stream = struct.unpack(">BBI", self._buffer[3:9])
            payload, self._buffer = self._buffer[9 : 9 + length], self._buffer[9 + length :]
            self._take(kind, flags, stream, payload)
        if not self.closed:
            self._send()

    def close(self) -> None:
        self._socket.close()

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == WINDOW_UPDATE and stream == 0:
            self._window += int.from_bytes(payload, "big")
        elif kind == WINDOW_UPDATE:
            self._windows[stream] += int.from_bytes(payload, "big")
        elif kind == SETTINGS and not flags & ACK:
            for key, value in struct.iter_unpack(">HI", payload):
                if key == INITIAL_WINDOW_SIZE:
                    self._windows = {at: left + value - self._initial for at, left in self._windows.items()}
                    self._initial = value
            self._frame(SETTINGS, ACK, 0)
        elif kind == PING and not flags & ACK:
            self._frame(PING, ACK, 0, payload)
        elif kind == DATA:
            self.received += len(payload)
        if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
            self.ended.add(stream)
            self._unsent.pop(stream, None)

    def _send(self) -> None:
        for stream, data in list(self._unsent.items()):
            while room := min(FRAME_BYTES, len(data), self._windows[stream], self._window):
                if room < 0 or not select.select([], [self._socket], [], 0)[1]:
                    break
                self._frame(DATA, 0, stream, bytes(data[:room]))
                data = data[room:]
                self._windows[stream] -= room
                self._window -= room
            self._unsent[stream] = data

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes = b"") -> None:
        try:
            self._socket.sendall(
                struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload
            )
        except ConnectionError:
            self.closed = True
