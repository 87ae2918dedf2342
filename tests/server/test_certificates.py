"""Which certificates a server takes, when it warns of their end, and that new ones are served without a restart."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import urllib.request

import grpc
import pytest
import trustme
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from issued_certificates import issue
from server_without_generator import server_without_generator

from genssl.config.server import ServerFile, TLSConfig
from genssl.errors import UserError
from genssl.generators.configs import StableUnCLIPConfig
from genssl.server.app import serve
from genssl.server.certificates import ServerCertificate

DAY = 86400.0


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(record.levelno, record.getMessage()) for record in caplog.records if record.name.startswith("genssl")]


def reaches(address: str, trusted: bytes) -> bool:
    """Says whether a client that trusts this certificate is answered."""
    options = [("grpc.ssl_target_name_override", "localhost"), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(trusted), options) as channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
        except grpc.RpcError:
            return False
    return True


def until(condition) -> None:
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


@pytest.mark.parametrize("kind", ["RSA 2048", "P-256", "P-384"])
def test_the_kinds_that_are_named_work(tmp_path, kind, caplog):
    ServerCertificate(issue(tmp_path, kind))
    assert said(caplog) == []


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("RSA 1024", r"certificate\.pem cannot be used: its key is too small"),
        ("P-521", r"gRPC's own client fails the handshake with .*certificate\.pem and .*key\.pem"),
        ("Ed25519", r"gRPC's own client fails the handshake with .*certificate\.pem and .*key\.pem"),
        ("Ed448", r"gRPC cannot serve .*certificate\.pem with .*key\.pem"),
        ("secp256k1", r"gRPC cannot serve .*certificate\.pem with .*key\.pem"),
    ],
)
def test_kinds_that_clients_do_not_take_are_refused_at_the_start(tmp_path, kind, found):
    tls = issue(tmp_path, kind)
    with pytest.raises(
        UserError, match=found + ".*RSA key of 2048 bits or more, or for an ECDSA key on P-256 or P-384"
    ):
        ServerCertificate(tls)


@pytest.mark.parametrize("name", ["localhost", "gpu7.cluster.example", "*.example.org", "10.1.2.3"])
@pytest.mark.parametrize("whole", [True, False], ids=["chain", "alone"])
def test_neither_names_nor_issuers_are_a_false_alarm(tmp_path, name, whole, caplog):
    issued = trustme.CA().create_child_ca().issue_cert(name)
    tls = TLSConfig(certificate=tmp_path / "certificate.pem", key=tmp_path / "key.pem")
    issued.private_key_pem.write_to_path(tls.key)
    for blob in issued.cert_chain_pems if whole else issued.cert_chain_pems[:1]:
        blob.write_to_path(tls.certificate, append=True)
    ServerCertificate(tls)
    assert said(caplog) == []


def test_the_end_of_a_certificate_is_told_from_14_days_before_and_once(tmp_path, caplog):
    tls, now = issue(tmp_path, days=100), time.time()
    certificate = ServerCertificate(tls, lambda: now)
    ends = x509.load_pem_x509_certificate(tls.certificate.read_bytes()).not_valid_after_utc.timestamp()
    assert certificate.expires == ends
    for days in (-14.1, -13, -12, 0.1, 1):
        now = ends + days * DAY
        certificate.refresh()
    warnings = [message for level, message in said(caplog) if level == logging.WARNING]
    assert len(warnings) == 2
    assert f"{tls.certificate} expires on" in warnings[0]
    assert "in 13.0 days" in warnings[0]
    assert "has expired" in warnings[1]
    caplog.clear()
    ServerCertificate(tls, lambda: ends - 10 * DAY)
    assert "in 10.0 days" in caplog.text, "at the start"


@pytest.mark.parametrize(("days", "since"), [(-3, -400), (800, 30)])
def test_what_is_not_valid_now_may_be_so_later(tmp_path, days, since, caplog):
    ServerCertificate(issue(tmp_path, days=days, since=since))
    assert ("has expired" in caplog.text) == (days < 0)


def test_the_end_is_a_metric(tmp_path):
    tls = issue(tmp_path, days=5)
    ends = x509.load_pem_x509_certificate(tls.certificate.read_bytes()).not_valid_after_utc.timestamp()
    with server_without_generator(tls=tls.model_dump(mode="json", exclude_none=True)) as server:
        with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=20) as answer:
            metrics = answer.read().decode()
        log = server.stop()
    (line,) = [line for line in metrics.splitlines() if line.startswith("genssl_tls_certificate_expiry")]
    assert line.split()[0] == "genssl_tls_certificate_expiry_timestamp_seconds"
    assert float(line.split()[1]) == ends
    assert "expires on" in log


def test_a_new_certificate_is_served_and_a_broken_one_is_not(tmp_path):
    (tmp_path / "next").mkdir()
    tls = issue(tmp_path)
    first = tls.certificate.read_bytes()
    renewed = issue(tmp_path / "next")
    second = renewed.certificate.read_bytes()
    with server_without_generator(tls=tls.model_dump(mode="json", exclude_none=True)) as server:
        assert (reaches(server.address, first), reaches(server.address, second)) == (True, False)
        renewed.certificate.replace(tls.certificate)  # for a moment certificate and key do not belong together
        renewed.key.replace(tls.key)
        until(lambda: reaches(server.address, second))
        assert not reaches(server.address, first)
        tls.certificate.write_bytes(second[:100])
        time.sleep(0.3)  # six looks at the files; were it a look too early, the test would pass all the same
        assert reaches(server.address, second)
        log = server.stop()
    assert log.count("holds no certificate in PEM form") <= 1
    assert "Traceback" not in log


def test_a_broken_new_file_is_told_once_and_a_good_one_taken(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tls = issue(tmp_path)
    certificate, good = ServerCertificate(tls), tls.certificate.read_bytes()
    ends = certificate.expires
    for content in (b"no PEM", b"no PEM", b"neither"):
        if tls.certificate.read_bytes() != content:
            tls.certificate.write_bytes(content)
        certificate.refresh()
    assert [level for level, _ in said(caplog)] == [logging.ERROR] * 2
    assert said(caplog)[0][1].endswith("the certificate that was read before stays in use")
    assert certificate.expires == ends
    tls.certificate.write_bytes(good)
    certificate.refresh()
    assert said(caplog)[-1][0] == logging.INFO
    issue(tmp_path, days=500)
    certificate.refresh()
    assert certificate.expires == pytest.approx(time.time() + 500 * DAY, abs=600)


def test_a_taken_port_and_a_bad_certificate_are_two_messages(tmp_path):
    def message(address: str, kind: str) -> str:
        generator = StableUnCLIPConfig(model="builtin:digits-unclip")
        file = ServerFile(address=address, threads=1, tls=issue(tmp_path, kind), generators=[generator])
        with pytest.raises(UserError) as caught:
            asyncio.run(serve(file))
        return str(caught.value)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert message(address, "P-256").startswith(
            f"address {address}: cannot be bound (Address already in use). Choose"
        )
    assert message("127.0.0.1:0", "Ed25519").startswith("tls.certificate: ")
