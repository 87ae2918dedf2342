"""A small server made of the real interceptors, statistics and metrics, without a generator; a process of its own.

Run as a script with one JSON argument: tls and tokens as in a server file. Its answers depend on the generator_id that
is asked for. Prints its addresses as JSON once it listens, and logs to standard error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from genssl.config.server import MetricsConfig, TLSConfig, TokenConfig
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc
from genssl.server.auth import TokenInterceptor, Tokens, current_token
from genssl.server.batching.jobs import BatchReport
from genssl.server.certificates import ServerCertificate, keep_rereading
from genssl.server.guard import GuardInterceptor, refuse
from genssl.server.logs import set_up_logging
from genssl.server.metrics import MetricsServer
from genssl.server.statistics import Statistics
from genssl.wire.channel import SERVICE

SECRET = "a detail of /the/server that no client may see"


class Queue:
    """What seems to wait and run."""

    running, largest_bucket = 3, 16

    def queued_by_priority(self) -> dict[str, int]:
        return {"training": 7}


class Service(pb_grpc.GenerationServiceServicer):
    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics

    async def GetStatistics(self, request, context):
        return self.statistics.to_proto()

    async def GetServerInfo(self, request, context):
        """Under `device` the name of the caller's token, asked for after other calls have come and gone."""
        await asyncio.sleep(0.05)
        token = current_token()
        return pb.GetServerInfoResponse(device=token.name if token else "nobody")

    async def GenerateVariants(self, request, context):
        match request.generator_id:
            case "bug":
                raise RuntimeError(SECRET)
            case "full":
                code = grpc.StatusCode.RESOURCE_EXHAUSTED
                await refuse(context, self.statistics, code, "queue_full", "the queue is full; come back later", 2.5)
            case "bad":
                await refuse(context, self.statistics, grpc.StatusCode.FAILED_PRECONDITION, "invalid", "ä" * 10_000)
            case "left":
                with contextlib.suppress(asyncio.CancelledError):
                    await context.send_initial_metadata(())  # by this the client knows that it is time to leave
                    await asyncio.sleep(30)
                code = grpc.StatusCode.RESOURCE_EXHAUSTED
                await refuse(context, self.statistics, code, "queue_full", "nobody is there to read it")
            case "slow":
                await asyncio.sleep(30)
            case "block":
                import time

                time.sleep(3)
        token = current_token()
        if token is not None and token.rate is not None and (wait := token.rate.take(len(request.variants))):
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
            await refuse(context, self.statistics, code, "rate", "too many variants a second", wait)
        client = self.statistics.client(request.client_id)
        client.variants += len(request.variants)
        self.statistics.waiting[request.client_id] = len(request.client_id)
        counters = self.statistics.generators["digits"]
        counters.delivered("generated", 3)
        counters.delivered("memory")
        counters.batch_done(BatchReport(4, 3, 0.5, [0.1, 0.1, 0.4], False))
        return pb.GenerateVariantsResponse()


async def main(settings: dict[str, Any]) -> None:
    set_up_logging(settings.get("log", "human"))
    statistics = Statistics("cpu", [1, 4, 16], queued_bytes=lambda: 2**20)
    statistics.register("digits").watch(Queue())
    interceptors: list[grpc.aio.ServerInterceptor] = [GuardInterceptor(statistics)]
    reread = []
    if configs := [TokenConfig.model_validate(token) for token in settings.get("tokens", [])]:
        tokens = Tokens(configs, largest_request=64)
        interceptors.append(TokenInterceptor(tokens, statistics))
        reread.append(tokens)
    server = grpc.aio.server(interceptors=interceptors)
    pb_grpc.add_GenerationServiceServicer_to_server(Service(statistics), server)
    health_service = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    await health_service.set("", health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection((SERVICE, reflection.SERVICE_NAME), server)
    address = settings.get("address", "127.0.0.1:0")
    if "tls" in settings:
        certificate = ServerCertificate(TLSConfig.model_validate(settings["tls"]))
        statistics.watch_certificate(lambda: certificate.expires)
        port = server.add_secure_port(address, certificate.credentials())
        reread.append(certificate)
    else:
        port = server.add_insecure_port(address)
    await server.start()
    statistics.state = "serving"
    metrics = MetricsServer(MetricsConfig(address="127.0.0.1:0"), statistics.registry)
    watching = [asyncio.create_task(watch) for watch in (statistics.watch_loop(), keep_rereading(reread, 0.05))]
    print(json.dumps({"address": f"127.0.0.1:{port}", "metrics": metrics.address}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for watch in watching:
        watch.cancel()
    metrics.close()
    await server.stop(0)


class RunningServer:
    """The server's process, its addresses, and its log, which is complete once it has been stopped."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        addresses = json.loads(process.stdout.readline() or "{}")
        self.address, self.metrics = addresses.get("address"), addresses.get("metrics")
        self.log = ""

    def stop(self) -> str:
        if not self.process.stdin.closed:
            _, self.log = self.process.communicate(timeout=20)
        return self.log


@contextmanager
def server_without_generator(environment: dict[str, str] | None = None, **settings: Any) -> Iterator[RunningServer]:
    """Starts the server; it stops when its standard input closes."""
    process = subprocess.Popen(
        [sys.executable, __file__, json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        server = RunningServer(process)
        assert server.address, process.communicate()[1]
        yield server
        server.stop()
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
