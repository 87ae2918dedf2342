"""`genssl serve-generator`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from genssl.cli.options import overrides_argument


def serve_generator(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A server file, such as servers/digits_unclip.yaml.", show_default=False),
    ],
    overrides: Annotated[list[str] | None, overrides_argument("address=127.0.0.1:0")] = None,
    address_file: Annotated[
        Path | None, typer.Option(help="Write the bound address here, once the port is known.", show_default=False)
    ] = None,
    exit_with_stdin: Annotated[
        bool, typer.Option("--exit-with-stdin", help="Also stop when standard input closes.")
    ] = False,
) -> None:
    """Serve generators to training clients over gRPC.

    SIGTERM or Ctrl-C finishes the requests under way, then stops; a second one stops at once.

    \b
    genssl serve-generator servers/digits_unclip.yaml
    genssl serve-generator servers/digits_unclip.yaml address=[::1]:50051
    genssl serve-generator servers/digits_unclip.yaml 'store={path: variants}'
    genssl serve-generator servers/digits_unclip.yaml \\
        address=127.0.0.1:0 --address-file /tmp/address
    """
    from genssl.config.load import load
    from genssl.config.server import ServerFile

    loaded = load(ServerFile, file, overrides or [])

    import asyncio
    import logging
    import os

    from genssl.server.app import serve
    from genssl.server.logs import set_up_logging

    set_up_logging(loaded.log)
    asyncio.run(serve(loaded, address_file=address_file, exit_with_stdin=exit_with_stdin))
    # Python would now wait for the device's thread, and a download or a long batch in it cannot be interrupted.
    logging.shutdown()
    os._exit(0)
