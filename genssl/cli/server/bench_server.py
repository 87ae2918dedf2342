"""`genssl bench-server`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from genssl.base.files import write_atomically
from genssl.base.wording import counted


def bench_server(
    target: Annotated[str, typer.Option(metavar="HOST:PORT|unix:/PATH", help="The server.", show_default=False)],
    generator: Annotated[
        str | None, typer.Option(help="Id of the generator; needed if the server has several.", show_default=False)
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="Connections.")] = 1,
    rows: Annotated[int, typer.Option(min=1, help="Variants a request.")] = 64,
    in_flight: Annotated[int, typer.Option(min=1, help="Requests each client keeps under way (closed loop).")] = 2,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Variants a second sent whatever the server does (open loop).", show_default=False
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of server time, over all rounds.")] = 10.0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that server and in-process generation take.")] = 5,
    in_process: Annotated[
        bool, typer.Option(help="Also load the generator here and take turns with it, on equal threads.")
    ] = True,
    json: Annotated[Path | None, typer.Option(help="Write everything measured here.", show_default=False)] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="A file with the bearer token that the server asks for.", show_default=False)
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(help="PEM certificates that the server's is signed by: use TLS.", show_default=False),
    ] = None,
) -> None:
    """Measure a generation server: throughput, latency, and their ratio to generating in process.

    Every variant asked for is a new one. Run it on the server's machine for the ratio: the server's generator is loaded
    here too, and both take turns.

    \b
    genssl bench-server --target 127.0.0.1:50051 --seconds 10 --json bench.json
    genssl bench-server --target 127.0.0.1:50051 --clients 4 --rows 16
    genssl bench-server --target gpu7:50051 --rate 100 --no-in-process \\
        --ca ca.pem --token-file token
    """
    from genssl.config.address import check_target_address
    from genssl.errors import UserError

    try:
        check_target_address(target)
    except ValueError as error:
        raise UserError(f"--target {target}: {error}") from None
    if json is not None and not json.parent.is_dir():
        raise UserError(f"--json {json}: the folder {json.parent} does not exist")

    import asyncio
    import json as json_module

    from rich.console import Console

    from genssl.bench.server import Load, bench
    from genssl.client.messages import read_token_file
    from genssl.config.recipe import ClientTLSConfig

    load = Load(clients=clients, rows=rows, in_flight=in_flight, rate=rate, seconds=seconds, rounds=rounds)
    report = asyncio.run(
        bench(
            target,
            load,
            generator=generator,
            in_process=in_process,
            token=None if token_file is None else read_token_file(token_file, "--token-file"),
            tls=None if ca is None else ClientTLSConfig(ca=ca),
        )
    )
    if json is not None:
        text = json_module.dumps(report, indent=2) + "\n"
        write_atomically(json, lambda partial: partial.write_text(text))
    Console(highlight=False).print(_table(report))


def _table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    loop, latency = report["load"], report["latency_seconds"]
    kind = f"{counted(loop['clients'], 'client')}, {counted(loop['rows_per_request'], 'variant')} a request"
    table = Table(
        title=f"{report['generator']['id']} at {report['target']}: {loop['loop']} loop, {kind}",
        show_header=False,
        title_justify="left",
    )
    table.add_column()
    table.add_column(justify="right")
    table.add_row("variants a second", f"{report['variants_per_second']:,.1f}")
    table.add_row("latency p50 / p99", f"{1000 * latency['p50']:,.1f} / {1000 * latency['p99']:,.1f} ms")
    table.add_row("mean batch, occupancy", f"{report['mean_batch_size']:.1f}, {report['occupancy']:.1%}")
    table.add_row("requests, refused and repeated", f"{report['requests']:,}, {report['refusals']:,}")
    table.add_section()
    if report["ratio_to_in_process"] is None:
        table.add_row("ratio to in process", f"none: {report['why_no_ratio']}")
    else:
        here = report["in_process"]
        table.add_row(
            "in process", f"{here['variants_per_second']:,.1f} variants a second in batches of {here['batch_size']}"
        )
        table.add_row("ratio to in process", f"{report['ratio_to_in_process']:.3f} (median of {loop['rounds']} rounds)")
    return table
