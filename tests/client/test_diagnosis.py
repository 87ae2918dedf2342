"""What a client is told that meets TLS without TLS, TLS with the wrong files, or no server at some addresses."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from pathlib import Path

import pytest
import trustme
from stub_server import stub_server

from genssl.client.balancer import TargetPool
from genssl.client.diagnosis import diagnose
from genssl.config.recipe import ClientTLSConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Has a server's and a client's certificate, the authority of both, and another authority."""
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    for name, issued in {
        "server": authority.issue_cert("localhost"),
        "client": authority.issue_cert("a@b.org"),
    }.items():
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    trustme.CA().cert_pem.write_to_path(folder / "other.pem")
    return folder


@pytest.fixture(scope="module")
def secure(folder, tmp_path_factory):
    files = {"certificate": str(folder / "server.pem"), "key": str(folder / "server.key")}
    with stub_server(tmp_path_factory.mktemp("secure"), **files) as (address, _):
        yield address


@pytest.fixture(scope="module")
def mutual(folder, tmp_path_factory):
    files = {"certificate": str(folder / "server.pem"), "key": str(folder / "server.key")}
    with stub_server(tmp_path_factory.mktemp("mutual"), **files, client_ca=str(folder / "ca.pem")) as (address, _):
        yield address


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    with stub_server(tmp_path_factory.mktemp("plain")) as (address, _):
        yield address


def told(address: str, tls: ClientTLSConfig | None) -> str:
    """Returns what a client that connects says of its server, once it has found out."""

    async def run() -> str:
        pool = TargetPool([address], tls=tls, token=None, max_in_flight=1)
        connecting = asyncio.create_task(pool.connect())
        ends = time.monotonic() + 60
        while "there is no connection" not in pool.state():
            assert time.monotonic() < ends, pool.state()
            assert not connecting.done()
            await asyncio.sleep(0.02)
        state = pool.state()
        connecting.cancel()
        await pool.close()
        return state

    return asyncio.run(run())


def test_tls_where_none_was_expected(secure):
    assert "it speaks TLS, and this client does not; give it tls" in told(secure, None)


def test_no_tls_where_it_was_expected(plain, folder):
    assert "it does not speak TLS, and this client does" in told(plain, ClientTLSConfig(ca=folder / "ca.pem"))


def test_another_authority(secure, folder):
    said = told(secure, ClientTLSConfig(ca=folder / "other.pem"))
    assert f"its certificate is signed by none of the authorities in {folder / 'other.pem'}" in said


def test_another_name(secure, folder):
    said = told(secure.replace("localhost", "127.0.0.1"), ClientTLSConfig(ca=folder / "ca.pem"))
    assert "its certificate does not name 127.0.0.1" in said


def test_no_certificate_of_the_client(mutual, folder):
    said = told(mutual, ClientTLSConfig(ca=folder / "ca.pem"))
    assert "it hangs up as one that wants a certificate of the client; give tls.certificate and tls.key" in said


def test_a_certificate_of_the_client_from_elsewhere(mutual, folder, tmp_path):
    issued = trustme.CA().issue_cert("a@b.org")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "mine.pem")
    tls = ClientTLSConfig(ca=folder / "ca.pem", certificate=tmp_path / "mine.pem", key=tmp_path / "key.pem")
    assert "it hangs up as one that does not accept the client's certificate" in told(mutual, tls)


def test_nothing_is_found_where_nothing_is_wrong(secure, mutual, plain, folder):
    tls = ClientTLSConfig(ca=folder / "ca.pem", certificate=folder / "client.pem", key=folder / "client.key")
    found = [diagnose(secure, tls), diagnose(mutual, tls), diagnose(plain, None)]
    assert not any(reasons.startswith("TLS: ") for reasons in found)
    assert "; ".join(found).count(":") == 3 * "; ".join(found).count("Connection refused"), "of other families alone"


def test_every_address_has_its_reason_and_tls_comes_first(secure, monkeypatch):
    port = int(secure.rpartition(":")[2])
    looked_up = socket.getaddrinfo

    def two(host, *arguments, **named):
        return [entry for host in ("127.0.0.9", "127.0.0.1") for entry in looked_up(host, *arguments, **named)]

    monkeypatch.setattr("genssl.client.diagnosis.socket.getaddrinfo", two)
    assert diagnose(f"localhost:{port}", None) == (
        f"TLS: 127.0.0.1:{port}: it speaks TLS, and this client does not; give it tls (variants.tls in a recipe); "
        f"127.0.0.9:{port}: Connection refused"
    )


def test_a_socket_file_that_nobody_serves(tmp_path):
    assert diagnose(f"unix:{tmp_path}/nobody.sock", None) == f"{tmp_path}/nobody.sock: No such file or directory"


@pytest.mark.parametrize("form", ["dns:///127.0.0.1:{}", "dns:127.0.0.1:{}", "ipv4:127.0.0.1:{}"])
def test_the_forms_of_grpc_are_looked_at_by_the_hosts_they_name(secure, form):
    port = secure.rpartition(":")[2]
    assert diagnose(form.format(port), None).startswith(f"TLS: 127.0.0.1:{port}: it speaks TLS")


@pytest.mark.parametrize("tls", [True, False])
def test_one_that_hangs_up_at_once_is_not_taken_for_one_without_tls(folder, tls):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                listener.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        said = diagnose(f"127.0.0.1:{port}", ClientTLSConfig(ca=folder / "ca.pem") if tls else None)
        thread.join()
    assert said.startswith(f"127.0.0.1:{port}: it hangs up at once")
