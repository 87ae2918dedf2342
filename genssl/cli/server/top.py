"""`genssl top`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from genssl.cli.server.top_tables import History
    from genssl.generation.v1 import generation_pb2 as pb

CALL_SECONDS = 5.0


def top(
    target: Annotated[str, typer.Option(metavar="HOST:PORT|unix:/PATH", help="The server.", show_default=False)],
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one table and exit.")] = False,
    token_file: Annotated[
        Path | None, typer.Option(help="A file with the bearer token that the server asks for.", show_default=False)
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(help="PEM certificates that the server's is signed by: use TLS.", show_default=False),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="PEM; shown to a server that asks who you are.", show_default=False)
    ] = None,
    key: Annotated[Path | None, typer.Option(help="PEM; the key of --certificate.", show_default=False)] = None,
) -> None:
    """Show what a generation server does: queues, batches, clients, refusals.

    On a terminal the table is redrawn at every interval; elsewhere one line a generator is printed.

    \b
    genssl top --target 127.0.0.1:50051
    genssl top --target gpu7:50051 --ca ca.pem --token-file token
    """
    from genssl.config.address import check_target_address
    from genssl.errors import UserError

    try:
        check_target_address(target)
    except ValueError as error:
        raise UserError(f"--target {target}: {error}") from None
    if (certificate is None) != (key is None) or (certificate and not ca):
        raise UserError("--certificate and --key belong together, and need --ca")

    import os

    # gRPC's C core would write its own remarks on a lost connection into the table.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")

    from rich.console import Console

    from genssl.cli.server.top_tables import History, lines, screen
    from genssl.client.messages import read_token_file
    from genssl.generation.v1 import generation_pb2 as pb
    from genssl.generation.v1 import generation_pb2_grpc as pb_grpc

    token = read_token_file(token_file, "--token-file") if token_file else ""
    console = Console(highlight=False)
    with _channel(target, ca, certificate, key) as channel:
        call = pb_grpc.GenerationServiceStub(channel).GetStatistics  # type: ignore[no-untyped-call]
        metadata = (("authorization", f"Bearer {token}"),) if token else ()

        def look() -> pb.GetStatisticsResponse:
            answer: pb.GetStatisticsResponse = call(pb.GetStatisticsRequest(), timeout=CALL_SECONDS, metadata=metadata)
            return answer

        history = History(target)
        _first_look(look, history)
        if once:
            if not console.is_terminal:  # a file has no edge to wrap at
                console.width = 160
            console.print(screen(history))
        elif console.is_terminal:
            from rich.live import Live

            with Live(screen(history), console=console, screen=True, auto_refresh=False) as live:
                _keep_looking(look, history, interval, lambda: live.update(screen(history), refresh=True))
        else:

            def print_lines() -> None:
                for line in lines(history):
                    print(line, flush=True)

            print_lines()
            _keep_looking(look, history, interval, print_lines)


def _channel(target: str, ca: Path | None, certificate: Path | None, key: Path | None) -> grpc.Channel:
    import grpc

    from genssl.wire.channel import CLIENT_OPTIONS

    if ca is None:
        return grpc.insecure_channel(target, options=CLIENT_OPTIONS)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_read("--ca", ca),
        private_key=_read("--key", key) if key else None,
        certificate_chain=_read("--certificate", certificate) if certificate else None,
    )
    return grpc.secure_channel(target, credentials, options=CLIENT_OPTIONS)


def _read(option: str, path: Path) -> bytes:
    from genssl.errors import UserError

    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from None


def _first_look(look: Callable[[], pb.GetStatisticsResponse], history: History) -> None:
    """Asks once; whatever goes wrong now will not pass by itself."""
    import grpc

    from genssl.errors import RequestRefusedError, ServerUnavailableError
    from genssl.wire.refusals import read_refusal

    try:
        history.add(look())
    except grpc.RpcError as error:
        refusal = read_refusal(error)
        if refusal.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise ServerUnavailableError(
                f"--target {history.target}: no answer ({refusal.message}); is a server running there, and does it use "
                "TLS (--ca)?"
            ) from None
        if refusal.code == grpc.StatusCode.UNIMPLEMENTED:
            raise RequestRefusedError(
                f"--target {history.target}: what runs there has no statistics; it is older than this genssl, or "
                "another service"
            ) from None
        hint = "; give it with --token-file" if refusal.code == grpc.StatusCode.UNAUTHENTICATED else ""
        raise RequestRefusedError(f"--target {history.target}: {refusal.message}{hint}") from None


def _keep_looking(
    look: Callable[[], pb.GetStatisticsResponse], history: History, interval: float, show: Callable[[], None]
) -> None:
    """Asks until interrupted; a server that went away may come back."""
    import time

    import grpc

    while True:
        time.sleep(interval)
        try:
            history.add(look())
        except grpc.RpcError as error:
            history.trouble = " ".join(f"{error.details() or error.code().name}".split())
        show()
