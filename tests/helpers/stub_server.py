"""A server made of the stubs alone in a process of its own, for what real servers do too rarely, or cannot do alone.

Its variants are grey: the source's first byte plus the index. It writes what it saw to a JSON file, call by call.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc

SIDE = 4
GREY = [np.full((1, 4, 4), level, np.uint8) for level in range(200)]


class Stub(pb_grpc.GenerationServiceServicer):
    def __init__(self, settings: dict) -> None:
        self.settings, self.known, self.seen = settings, {}, []
        self.refusals = settings.get("refusals", 0)

    def _admit(self, context: grpc.ServicerContext) -> None:
        token = self.settings.get("token")
        if token and ("authorization", f"Bearer {token}") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token is wrong or absent")

    def GetServerInfo(self, request, context):
        self._admit(context)
        return pb.GetServerInfoResponse(
            max_variants_per_request=self.settings.get("max_variants", 64),
            max_message_bytes=2**20,
            max_image_bytes=self.settings.get("max_image_bytes", 2**20),
            instance_id=str(os.getpid()),
        )

    def ListGenerators(self, request, context):
        self._admit(context)
        names = self.settings.get("names", ["grey"])
        fingerprint = bytes([self.settings.get("fingerprint", 0)]) * 16
        return pb.ListGeneratorsResponse(
            generators=[pb.GeneratorInfo(generator_id=name, fingerprint=fingerprint, image_size=SIDE) for name in names]
        )

    def GenerateVariants(self, request, context):
        self._admit(context)
        self.seen.append(
            {
                "at": time.time(),
                "pid": os.getpid(),
                "peer": context.peer(),
                "rows": len(request.variants),
                "uploads": sum(bool(source.data) for source in request.sources),
                "priority": pb.Priority.Name(request.priority),
                "remaining": context.time_remaining(),
                "seeds": [variant.seed for variant in request.variants if variant.HasField("seed")],
            }
        )
        Path(self.settings["log"]).write_text(json.dumps(self.seen))
        if self.refusals:
            self.refusals -= 1
            packed = any_pb2.Any()
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(int(1000 * self.settings["retry_after"]))
            packed.Pack(retry)
            status = status_pb2.Status(code=8, message="full", details=[packed])
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        response = pb.GenerateVariantsResponse()
        for source in request.sources:
            if source.data:
                self.known[source.digest] = source.data[0]
        for position, variant in enumerate(request.variants):
            digest = request.sources[variant.source_index].digest
            if digest not in self.known:
                missing = pb.ItemStatus(code=pb.ITEM_CODE_SOURCE_MISSING)
                response.variants.add(spec_index=position, status=missing)
                continue
            if self.known[digest] == self.settings.get("bad"):
                bad = pb.ItemStatus(code=pb.ITEM_CODE_BAD_IMAGE, message="not to its taste")
                response.variants.add(spec_index=position, status=bad)
                continue
            response.variants.add(
                spec_index=position,
                data=bytes([(self.known[digest] + variant.variant_index) % 256]) * (3 * SIDE * SIDE),
                channels=3,
                height=SIDE,
                width=SIDE,
                origin=pb.ORIGIN_MEMORY,
                status=pb.ItemStatus(code=pb.ITEM_CODE_OK),
            )
        return response


@contextmanager
def stopped(pid: int):
    """Holds a child process still; the signal alone lets its other threads answer until they are told."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def stub_server(folder: Path, **settings):
    log = folder / f"calls-{time.monotonic_ns()}.json"
    log.write_text("[]")
    command = [sys.executable, __file__, json.dumps({**settings, "log": str(log)})]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip(), lambda: json.loads(log.read_text())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def main() -> None:
    settings = json.loads(sys.argv[1])
    server = grpc.server(futures.ThreadPoolExecutor(8))
    pb_grpc.add_GenerationServiceServicer_to_server(Stub(settings), server)
    if "certificate" in settings:
        key, chain = Path(settings["key"]).read_bytes(), Path(settings["certificate"]).read_bytes()
        client_ca = Path(settings["client_ca"]).read_bytes() if "client_ca" in settings else None
        credentials = grpc.ssl_server_credentials([(key, chain)], client_ca, client_ca is not None)
        port = server.add_secure_port("localhost:0", credentials)
    else:
        port = server.add_insecure_port(settings.get("address", "localhost:0"))
    server.start()
    print(f"localhost:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
