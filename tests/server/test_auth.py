"""TLS, mTLS and tokens against a real server process, over real sockets."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from server_without_generator import server_without_generator

from genssl.config.server import TLSConfig, TokenConfig
from genssl.errors import UserError
from genssl.generation.v1 import generation_pb2 as pb
from genssl.generation.v1 import generation_pb2_grpc as pb_grpc
from genssl.server.auth import RateLimit, Tokens, read_tokens
from genssl.server.certificates import ServerCertificate
from genssl.wire.refusals import read_refusal

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    issued = authority.issue_cert("localhost", "127.0.0.1")
    for blob in issued.cert_chain_pems:
        blob.write_to_path(folder / "certificate.pem", append=True)
    issued.private_key_pem.write_to_path(folder / "key.pem")
    return folder


@pytest.fixture(scope="module")
def with_tokens(tmp_path_factory):
    """Alice's token lies in a file, Bob's in a variable, and Bob may take 10 variants a second."""
    file = tmp_path_factory.mktemp("tokens") / "alice"
    file.write_text(ALICE + "\n")
    tokens = [
        {"name": "alice", "file": str(file)},
        {"name": "bob", "env": "BOBS_TOKEN", "max_variants_per_second": 10, "max_queued_variants": 9},
    ]
    with server_without_generator({"BOBS_TOKEN": BOB}, tokens=tokens) as running:
        yield running


@pytest.fixture(scope="module")
def stub(with_tokens):
    with grpc.insecure_channel(with_tokens.address) as channel:
        yield pb_grpc.GenerationServiceStub(channel)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def who(channel: grpc.Channel, timeout: float = 5) -> str:
    return pb_grpc.GenerationServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout).device


def refusal(channel: grpc.Channel) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        who(channel, timeout=3)
    return caught.value.code()


# ---- TLS ----


def test_tls(authority, files):
    settings = {"certificate": str(files / "certificate.pem"), "key": str(files / "key.pem")}
    trusted = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    with server_without_generator(tls=settings) as server:
        with grpc.secure_channel(server.address, trusted) as channel:
            assert who(channel) == "nobody"
        with grpc.insecure_channel(server.address) as channel:
            assert refusal(channel) == grpc.StatusCode.UNAVAILABLE, "plain text to a TLS port"
        stranger = grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes())
        with grpc.secure_channel(server.address, stranger) as channel:
            assert refusal(channel) == grpc.StatusCode.UNAVAILABLE, "a server that this client does not trust"


def test_mtls(authority, files):
    settings = {
        "certificate": str(files / "certificate.pem"),
        "key": str(files / "key.pem"),
        "client_ca": str(files / "ca.pem"),
    }

    def credentials(issuer: trustme.CA) -> grpc.ChannelCredentials:
        mine = issuer.issue_cert("client@example.org")
        chain = b"".join(blob.bytes() for blob in mine.cert_chain_pems)
        return grpc.ssl_channel_credentials(authority.cert_pem.bytes(), mine.private_key_pem.bytes(), chain)

    with server_without_generator(tls=settings) as server:
        with grpc.secure_channel(server.address, credentials(authority)) as channel:
            assert who(channel) == "nobody"
        with grpc.secure_channel(server.address, credentials(trustme.CA())) as channel:
            assert refusal(channel) == grpc.StatusCode.UNAVAILABLE, "signed by someone else"
        with grpc.secure_channel(server.address, grpc.ssl_channel_credentials(authority.cert_pem.bytes())) as channel:
            assert refusal(channel) == grpc.StatusCode.UNAVAILABLE, "no certificate"


ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    ("changed", "content", "message"),
    [
        ("certificate", None, r"tls\.certificate: .*/changed: No such file or directory"),
        ("certificate", b"no PEM", r"tls\.certificate: .*/changed holds no certificate in PEM form"),
        ("key", None, r"tls\.key: .*/changed: No such file or directory"),
        ("key", b"no PEM", r"tls\.key: .*/changed holds no private key in PEM form"),
        ("key", "another", r"tls\.key: .*/changed is not the key of the first certificate in .*certificate\.pem"),
        ("key", "encrypted", r"tls\.key: .*/changed is encrypted; .*openssl pkey -in"),
        ("client_ca", None, r"tls\.client_ca: .*/changed: No such file or directory"),
        ("client_ca", b"no PEM", r"tls\.client_ca: .*/changed holds no certificate in PEM form"),
    ],
)
def test_a_bad_file_is_a_users_error(files, tmp_path, changed, content, message):
    if content == "another":
        content = trustme.CA().issue_cert("localhost").private_key_pem.bytes()
    elif content == "encrypted":
        from cryptography.hazmat.primitives import serialization

        key = serialization.load_pem_private_key((files / "key.pem").read_bytes(), None)
        content = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    if content is not None:
        (tmp_path / "changed").write_bytes(content)
    paths = {"certificate": files / "certificate.pem", "key": files / "key.pem", "client_ca": files / "ca.pem"}
    with pytest.raises(UserError, match=message):
        ServerCertificate(TLSConfig(**{**paths, changed: tmp_path / "changed"}))


# ---- Tokens ----


def test_a_token_opens_the_server_and_the_handler_knows_whose_it_is(stub):
    assert stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=bearer(ALICE), timeout=5).device == "alice"
    lower = (("authorization", f"bearer {BOB}"),)
    assert stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=lower, timeout=5).device == "bob"


def test_calls_at_the_same_time_do_not_mix_their_tokens_up(stub):
    def ask(number: int) -> bool:
        token, name = ((ALICE, "alice"), (BOB, "bob"))[number % 2]
        return stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=bearer(token), timeout=10).device == name

    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(ask, range(60)))


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ((), "this server asks for a token"),
        (bearer("wrong-0123456789abcdef"), "the token is not known here"),
        (bearer(ALICE[:-1]), "the token is not known here"),
        (bearer(ALICE + "0"), "the token is not known here"),
        (bearer(""), "the token is not known here"),
        ((("authorization", ALICE),), "the token is not known here"),
        ((("authorization", f"Basic {ALICE}"),), "the token is not known here"),
        ((("authorization", f"Bearer {'x' * 4000}"),), "the token is not known here"),
        (bearer(ALICE) + bearer(BOB), "the token is not known here"),
    ],
    ids=["none", "wrong", "cut", "longer", "empty", "no scheme", "other scheme", "huge", "two"],
)
def test_others_are_told_what_to_do_and_never_what_they_sent(stub, metadata, found):
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=metadata, timeout=5)
    told = read_refusal(caught.value)
    assert (told.code, told.reason) == (grpc.StatusCode.UNAUTHENTICATED, "AUTH")
    assert told.message.startswith(found)
    assert "`authorization: Bearer <token>`" in told.message
    assert not any(value.split()[-1] in told.message for _, value in metadata if len(value) > 10)


def test_health_needs_no_token_and_reflection_does(with_tokens):
    with grpc.insecure_channel(with_tokens.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            ProtoReflectionDescriptorDatabase(channel).get_services()
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_reflection_and_the_health_stream_pass_the_guard():
    with server_without_generator() as server, grpc.insecure_channel(server.address) as channel:
        assert "genssl.generation.v1.GenerationService" in ProtoReflectionDescriptorDatabase(channel).get_services()
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=5)
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        watched.cancel()


def test_refused_calls_are_counted(stub):
    statistics = stub.GetStatistics(pb.GetStatisticsRequest(), metadata=bearer(ALICE), timeout=5)
    with pytest.raises(grpc.RpcError):
        stub.GetStatistics(pb.GetStatisticsRequest(), timeout=5)
    again = stub.GetStatistics(pb.GetStatisticsRequest(), metadata=bearer(ALICE), timeout=5)
    assert again.rejections["auth"] == statistics.rejections["auth"] + 1


def test_a_holder_who_takes_too_much_is_told_when_to_come_back(stub):
    request = pb.GenerateVariantsRequest(variants=[pb.VariantSpec()] * 64)
    stub.GenerateVariants(request, metadata=bearer(BOB), timeout=5)
    with pytest.raises(grpc.RpcError) as caught:
        stub.GenerateVariants(request, metadata=bearer(BOB), timeout=5)
    told = read_refusal(caught.value)
    assert (told.code, told.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE")
    assert 5 < told.retry_after <= 6.4
    for _ in range(2):
        stub.GenerateVariants(request, metadata=bearer(ALICE), timeout=5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"tokens\.0\.file: .*/token: No such file or directory"),
        ("\n", r"tokens\.0\.file: .*/token holds no token, it is empty; .*openssl rand -hex 32"),
        ("0123456789abcde\n", r"tokens\.0\.file: the token in .*/token has 15 characters; at least 16 are needed"),
        ("0123456789 abcdef", r"tokens\.0\.file: the token in .*/token has characters that a header cannot carry"),
        ("0123456789äabcdef", r"tokens\.0\.file: the token in .*/token has characters that a header cannot carry"),
    ],
    ids=["missing", "empty", "short", "space", "umlaut"],
)
def test_a_token_that_cannot_be_used_is_a_users_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "token").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_tokens([TokenConfig(name="alice", file=tmp_path / "token")], 64)
    assert "0123" not in str(caught.value)


def test_variables_and_equal_tokens(monkeypatch):
    configs = [TokenConfig(name="alice", env="FIRST"), TokenConfig(name="bob", env="SECOND")]
    with pytest.raises(UserError, match=r"tokens\.0\.env: the environment variable FIRST is not set"):
        read_tokens(configs, 64)
    monkeypatch.setenv("FIRST", ALICE)
    monkeypatch.setenv("SECOND", ALICE)
    with pytest.raises(UserError, match=r"tokens\.1\.env: 'bob' is the same token as 'alice'"):
        read_tokens(configs, 64)
    monkeypatch.setenv("SECOND", BOB)
    tokens = read_tokens(configs, 64)
    assert [token.name for token in tokens] == ["alice", "bob"]
    assert ALICE not in repr(tokens)


def test_a_token_whose_file_is_replaced_is_let_in_and_the_old_one_is_not(tmp_path):
    file = tmp_path / "token"
    file.write_text(ALICE)
    with (
        server_without_generator(tokens=[{"name": "alice", "file": str(file)}]) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = pb_grpc.GenerationServiceStub(channel)

        def code(token: str) -> str:
            try:
                return stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=bearer(token), timeout=10).device
            except grpc.RpcError as error:
                return error.code().name

        assert (code(ALICE), code(BOB)) == ("alice", "UNAUTHENTICATED")
        file.write_text(BOB)
        ends = time.monotonic() + 60
        while code(BOB) != "alice":
            assert time.monotonic() < ends
        assert code(ALICE) == "UNAUTHENTICATED"


def test_reading_tokens_anew_keeps_what_was_taken_and_survives_a_broken_file(tmp_path, caplog):
    for name in ("alice", "bob"):
        (tmp_path / name).write_text({"alice": ALICE, "bob": BOB}[name])
    configs = [TokenConfig(name=name, file=tmp_path / name, max_variants_per_second=1) for name in ("alice", "bob")]
    tokens = Tokens(configs, 64)
    assert tokens.known[0].rate.take(64) == 0
    (tmp_path / "alice").write_text("another-0123456789abcdef")
    tokens.refresh()
    assert [token.secret for token in tokens.known] == [b"another-0123456789abcdef", BOB.encode()]
    assert tokens.known[0].rate.take(64) > 0, "a new token is no new allowance"
    (tmp_path / "bob").write_text("short")
    tokens.refresh()
    tokens.refresh()
    (tmp_path / "bob").unlink()
    tokens.refresh()
    assert tokens.known[1].secret == BOB.encode()
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 2
    assert "tokens.1.file: the token in" in errors[0]
    assert "No such file" in errors[1]


def test_a_rate_limit_holds_two_seconds_worth():
    now = 0.0
    limit = RateLimit(10, largest_request=8, clock=lambda: now)
    assert limit.burst == 20
    assert limit.take(20) == 0
    assert limit.take(5) == pytest.approx(0.5)
    assert limit.take(5) == pytest.approx(0.5), "a refusal takes nothing"
    now = 0.5
    assert limit.take(5) == 0
    limit.give_back(3)
    assert limit.take(3) == 0
    now = 100
    assert limit.take(21) > 0, "no more than the burst is saved up"
    assert limit.take(20) == 0
    assert RateLimit(1, largest_request=64).take(64) == 0, "the largest request always fits"
