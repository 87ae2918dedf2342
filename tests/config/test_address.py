"""Which addresses are refused when they are read, and what is said instead of waiting for a server that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from genssl import AsyncVariantClient, GenerativeViews, VariantClient
from genssl.cli.main import app
from genssl.config.address import check_address, check_target_address
from genssl.config.load import load
from genssl.config.recipe import Recipe
from genssl.errors import ConfigError, UserError
from genssl.variants.prefetch import loop as background

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "simclr_sd.yaml"
FORM = "an address is host:port (such as 127.0.0.1:50051) or unix:/path"

WRONG = {
    "": "and this is empty",
    "  ": "and this is empty",
    "http://gpu7:50051": "without http://; write gpu7:50051",
    "https://gpu7:50051/": "without https://; write gpu7:50051",
    "grpc://[::1]:50051": "without grpc://; write [::1]:50051",
    "http://gpu7": "without http://",
    "gpu7": "and this has no port",
    "[::1]": "and this has no port",
    ":50051": "and this has no host",
    "gpu7:": "and '' is not a port",
    "gpu7:http": "and 'http' is not a port",
    "gpu7:-1": "and '-1' is not a port",
    "gpu7:65536": "and '65536' is not a port: they go to 65535",
    "gpu7:5\u0660": "is not a port",
    "gpu7:50051/api": "and nothing may follow the port; write gpu7:50051",
    "gpu 7:50051": "and this has blanks",
    " gpu7:50051": "and this has blanks",
    "gpu7:50051\n": "and this has blanks",
    "me@gpu7:50051": "is not the name of a host",
    "a/b:50051": "is not the name of a host",
    "::1:50051": "such as [::1]:50051",
    "[::g]:50051": "[::g] is not an IP address",
    "10.0.0.256:50051": "10.0.0.256 is not an IP address",
    "dns:///gpu7": "and this has no port",
    "ipv4:10.0.0.1:50051,10.0.0.2": "and this has no port",
    "unix:": "unix: needs the path of a socket",
    "unix:///": "unix: needs the path of a socket",
    "unix:/" + "a" * 107: "the path of a socket may have 107 bytes",
}
RIGHT = [
    "127.0.0.1:50051",
    "localhost:1",
    "gpu-7.group_a.example.org:65535",
    "[::1]:50051",
    "[fe80::1%eth0]:50051",
    "dns:///genssl-headless.default.svc:50051",
    "dns://10.0.0.53/gpu7:50051",
    "dns:gpu7:50051",
    "ipv4:10.0.0.1:50051,10.0.0.2:50051",
    "ipv6:[::1]:50051",
    "unix:/run/a folder/genssl.sock",
    "unix:relative.sock",
    "unix:///run/genssl.sock",
]


@pytest.mark.parametrize("address", WRONG)
def test_an_address_that_cannot_be_is_refused_with_the_right_form(address):
    for check in (check_address, check_target_address):
        with pytest.raises(ValueError, match=r".") as caught:
            check(address)
        assert WRONG[address] in str(caught.value)
        if "unix:" not in address and "[::1]:" not in WRONG[address]:
            assert str(caught.value).startswith(FORM)


@pytest.mark.parametrize("address", RIGHT)
def test_the_forms_that_grpc_knows_are_left_as_they_are(address):
    assert check_target_address(address) == check_address(address) == address


def test_port_0_is_for_servers_alone():
    assert check_address("127.0.0.1:0") == "127.0.0.1:0"
    with pytest.raises(ValueError, match="port 0 is not the port of a running server"):
        check_target_address("127.0.0.1:0")


@pytest.mark.parametrize("address", ["http://gpu7:50051", "gpu7:0", "gpu7", ""])
def test_every_way_to_give_a_client_an_address_refuses_it_at_once(address):
    with pytest.raises(UserError, match=f"targets: '{address}' is not the address of a server: "):
        VariantClient(address)
    with pytest.raises(UserError, match="is not the address of a server"):
        VariantClient(["127.0.0.1:50051", address])
    with pytest.raises(UserError, match="is not the address of a server"):
        GenerativeViews([], address)

    async def asynchronous() -> None:
        AsyncVariantClient(address)

    with pytest.raises(UserError, match="is not the address of a server"):
        background.run(asynchronous(), 30)
    for value in (address, f"[127.0.0.1:50051, '{address}']"):
        with pytest.raises(ConfigError, match=r"variants\.server"):
            load(Recipe, RECIPE, [f"variants.server={value if value else repr(value)}"])
    for command in ("top", "bench-server"):
        done = CliRunner().invoke(app, [command, "--target", address])
        assert isinstance(done.exception, UserError)
        assert str(done.exception).startswith(f"--target {address}: ")
